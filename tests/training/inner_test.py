"""Training and evaluating models whose levels learn inside a row."""

import pathlib

from absl.testing import absltest
import jax
import numpy as np
import pytest

from nested_learning import data
from nested_learning import errors
from nested_learning import levels
from nested_learning import tasks
from nested_learning import training
from nested_learning.training import make_workload
from nested_learning.training import trainer
from nested_learning.training import workload as workload_lib
from tests import compiling
from tests.training import tiny


def inner(*rates):
  return levels.make_inner((8, 16), learning_rate=rates)


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


if __name__ == '__main__':
  absltest.main()
