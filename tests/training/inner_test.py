"""Training and evaluating models whose levels learn inside a row."""

import dataclasses
import functools
import pathlib

from absl.testing import absltest
import jax
import numpy as np
import optax
import pytest

from nested_learning import data
from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import tasks
from nested_learning import training
from nested_learning.training import guard
from nested_learning.training import make_workload
from nested_learning.training import step as step_lib
from nested_learning.training import trainer
from nested_learning.training import workload as workload_lib
from tests import compiling
from tests.training import tiny


def inner(*rates):
  return levels.make_inner((8, 16), learning_rate=rates)


@functools.cache
def make_streams():
  """Returns a model with a memory, float64 parameters and a carried step."""
  mixer = layers.MemoryMixerConfig(
    num_heads=1, head_dim=4, kind='matrix', adaptive=(), chunk_size=8
  )
  config = dataclasses.replace(tiny.MODEL, mixer=mixer, dtype='float64')
  learning = dataclasses.replace(inner(0.3, 0.1), gradient='first_order')
  model = models.make_model(config, learning)
  params = jax.jit(model.init_params)(jax.random.key(0))
  params = jax.tree.map(lambda x: x.astype('float64'), params)

  def step(state, batch, rate):
    update = step_lib.make_update(model, optax.sgd(rate), carries_state=True)
    return update(state, batch)

  return model, params, jax.jit(step)


def make_batch(num_tokens=32):
  rng = np.random.default_rng(0)
  tokens = rng.integers(200, size=(2, num_tokens + 1)).astype(np.int32)
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'mask': np.ones((2, num_tokens), bool),
    'reset': np.arange(num_tokens) == np.zeros((2, 1)),
  }


def begin(model, params):
  stream = jax.tree.map(lambda x: x[None], model.init_state(params, 2))
  state = optax.sgd(0.1).init(params)  # gradient descent keeps nothing
  return step_lib.TrainState(params, state, stream, guard.init_guard())


class InnerTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def take_steps(self, num_steps, **changes):
    config = tiny.experiment(self.root, **changes)
    workload = make_workload.make_workload(config)
    optimizer = training.make_optimizer(config, workload.model.table)
    parts = config, workload.model, optimizer
    state = jax.jit(training.make_init(*parts))(jax.random.key(0))
    step = jax.jit(training.make_step(*parts, workload.token_loss))
    batches, losses = data.make_iterator(config.data), []
    for _ in range(num_steps):
      batch = next(batches)
      del batch['document']
      state, metrics = step(state, batch)
      losses.append(float(metrics['loss']))
    return workload, state, losses

  @pytest.mark.slow
  def test_rates_of_zero_train_like_the_plain_model(self):
    _, plain, losses = self.take_steps(2)
    _, state, losses_inner = self.take_steps(2, inner=inner(0.0, 0.0))
    np.testing.assert_allclose(losses_inner, losses, rtol=1e-5)
    # Adam makes steps of gradients that are nothing but rounding.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
      state.params,
      plain.params,
    )

  def test_learns_to_learn_and_evaluates(self):
    workload, state, losses = self.take_steps(25, inner=inner(0.3, 0.1))
    self.assertLess(losses[-1], losses[0] - 1)
    mesh = trainer.make_mesh(tiny.experiment(self.root))  # a row per device
    with jax.set_mesh(mesh):
      batches = list(workload_lib.validation_batches(workload, 2, mesh))
      learned = workload.evaluate(state.params, batches).loss
      plain = make_workload.make_workload(tiny.experiment(self.root))
      rested = plain.evaluate(state.params, batches).loss
    self.assertLess(learned, rested - 1e-3)
    again = workload.summarize(state.params, mesh, None).numbers
    self.assertEqual(again['validation_loss'], learned)

  def test_a_stream_carries_its_levels(self):
    changes = {
      'data': {'reset': 'never'},
      'train': {'num_steps': 2, 'accumulate': 2},
      'inner': inner(0.3, 0.3),
    }
    _, state, _ = self.take_steps(2, **changes)
    slow = state.stream.levels['slow']
    self.assertEqual(slow.num_updates.shape, (2, 4))  # micro-batch, row
    np.testing.assert_array_equal(slow.num_updates, np.full((2, 4), 4))
    self.assertGreater(slow.drift.min(), 0)

  @pytest.mark.slow
  def test_half_rows_that_carry_are_a_row(self):
    with jax.enable_x64(True):
      (model, params, step), batch = make_streams(), make_batch()
      whole, found = step(begin(model, params), batch, 0.0)
      state, losses = begin(model, params), []
      for half in (slice(0, 16), slice(16, 32)):
        cut = {name: x[:, half] for name, x in batch.items()}
        state, metrics = step(state, cut, 0.0)
        losses.append(metrics['loss'])
    # The loss of a step is a sum in float32; its state is not.
    np.testing.assert_allclose(np.mean(losses), found['loss'], rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, atol=1e-12)
    jax.tree.map(close, state.stream, whole.stream)
    slow = state.stream.levels['slow']
    np.testing.assert_array_equal(slow.num_updates, [[2, 2]])

  @pytest.mark.slow
  def test_a_stream_follows_training_and_begins_anew(self):
    with jax.enable_x64(True):
      (model, params, step), batch = make_streams(), make_batch(16)
      first, _ = step(begin(model, params), batch, 0.0)
      again = {**batch, 'reset': np.zeros_like(batch['reset'])}
      rested, _ = step(first, again, 0.0)
      moved, _ = step(first, again, 0.1)
      learned = [
        models.follow(model, x.stream, x.params, params).levels
        for x in (rested, moved)
      ]
      one_anew = {**again, 'reset': again['reset'].copy()}
      one_anew['reset'][0, 0] = True
      renewed, _ = step(first, one_anew, 0.0)
      fresh, _ = step(begin(model, params), batch, 0.0)
    # Levels get the gradient of what they began with, and keep what they
    # learned.
    for name in ('fast', 'slow'):
      old, new = (
        x.params['blocks']['levels'][name]['up'] for x in (first, moved)
      )
      self.assertGreater(np.abs(new - old).max(), 1e-6)
    close = functools.partial(np.testing.assert_allclose, atol=1e-12)
    jax.tree.map(close, *(x['fast'].params for x in learned))
    # A row that begins anew forgets everything; the other one goes on.
    for row, expected in ((0, fresh), (1, rested)):
      jax.tree.map(
        lambda a, b, row=row: close(a[:, row], b[:, row]),
        renewed.stream,
        expected.stream,
      )

  def test_refuses_what_does_not_fit(self):
    with self.assertRaisesRegex(errors.UserError, '32 is not a multiple of'):
      tiny.experiment(self.root, inner=levels.make_inner((12, 24)))
    with self.assertRaisesRegex(errors.UserError, 'of the 2 levels'):
      tiny.experiment(self.root, inner=levels.make_inner((8,)))
    task = tasks.RegressionConfig(num_points=8)
    with self.assertRaisesRegex(errors.UserError, 'no next token'):
      make_workload.make_workload(
        training.ExperimentConfig(
          name='a',
          model=tiny.MODEL,
          data=tasks.TaskDataConfig(task),
          inner=inner(0.1, 0.1),
        )
      )
