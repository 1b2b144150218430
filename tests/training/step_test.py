import pathlib

from absl.testing import parameterized
import jax
from jax import sharding as jsharding
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import data
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from nested_learning import sharding
from nested_learning import training
from tests.training import tiny


class StepTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    tiny.share_executables(self)
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def parts(self, **changes):
    config = tiny.experiment(self.root, **changes)
    model = models.make_model(config.model)
    optimizer = training.make_optimizer(config, model.table)
    return config, model, optimizer

  def init(self, *parts):
    return jax.jit(training.make_init(*parts))(jax.random.key(0))

  def take_steps(self, num_steps, **changes):
    config, model, optimizer = self.parts(**changes)
    step = jax.jit(training.make_step(config, model, optimizer))
    state = self.init(config, model, optimizer)
    batches, losses = data.make_iterator(config.data), []
    for _ in range(num_steps):
      batch = next(batches)
      del batch['document']
      state, metrics = step(state, batch)
      losses.append(float(metrics['loss']))
    return state, losses

  @parameterized.parameters('document', 'never')
  def test_a_bad_step_is_as_if_it_had_not_been(self, reset):
    config, model, optimizer = self.parts(
      data={'reset': reset, 'sequence_length': 16},
      train={'spike_factor': 2.0},
    )
    bad = config.model.vocab_size - 1  # no byte, so that no text has it

    def token_loss(outputs, targets):
      loss = evaluation.cross_entropy(outputs, targets)
      return jnp.where(targets == bad, jnp.nan, loss)

    step = jax.jit(training.make_step(config, model, optimizer, token_loss))
    batches = data.make_iterator(config.data)
    good = [next(batches) for _ in range(3)]
    for batch in good:
      del batch['document']
    start, _ = step(self.init(config, model, optimizer), good[0])
    with_nan = {**good[1], 'targets': np.full_like(good[1]['targets'], bad)}
    # Steps enough to know what is usual, and that is far less.
    known = start.guard._replace(
      num_taken=jnp.int32(50), usual_norm=jnp.float32(1e-6)
    )
    for batch, guard in ((with_nan, start.guard), (good[1], known)):
      state, metrics = step(start._replace(guard=guard), batch)
      self.assertEqual(metrics['skipped'], 1)
      self.assertEqual(metrics['skipped_in_a_row'], 1)
      for field in ('params', 'optimizer', 'stream'):
        jax.tree.map(
          np.testing.assert_array_equal,
          getattr(state, field),
          getattr(start, field),
        )
      again = state._replace(guard=start.guard)
      jax.tree.map(
        np.testing.assert_array_equal,
        step(again, good[2])[0],
        step(start, good[2])[0],
      )

  def test_loss_is_the_mean_over_targets(self):
    config, model, optimizer = self.parts()
    state = self.init(config, model, optimizer)
    batch = next(data.make_iterator(config.data))
    batch['mask'][:, 20:] = False
    step = jax.jit(training.make_step(config, model, optimizer))
    _, metrics = step(state, batch)
    logits, _ = jax.jit(model.forward)(
      state.params, None, batch['tokens'], reset=batch['reset']
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['targets']
    )
    np.testing.assert_allclose(
      metrics['loss'], np.mean(np.asarray(loss)[:, :20]), rtol=1e-6
    )

  def test_learns(self):
    _, losses = self.take_steps(30)
    self.assertLess(losses[-1], losses[0] - 1)

  def test_micro_batches_give_the_gradient_of_the_batch(self):
    whole, losses = self.take_steps(3)
    parts, losses_in_parts = self.take_steps(3, train={'accumulate': 4})
    np.testing.assert_allclose(losses, losses_in_parts, rtol=1e-5)
    # Adam divides by the gradient's own size: digits lost in tiny gradients
    # come back as differences of up to the learning rate, 1e-2.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
      whole.params,
      parts.params,
    )

  @parameterized.parameters(1, 4)
  def test_a_stream_goes_on_from_step_to_step(self, accumulate):
    # With next to no learning rate, the loss of the second step is that of the
    # second half of rows read in one piece.
    changes = {
      'data': {'reset': 'never'},
      'train': {
        'num_steps': 2,
        'learning_rate': 1e-20,
        'accumulate': accumulate,
      },
    }
    state, losses = self.take_steps(2, **changes)
    config, model, _ = self.parts(**changes)
    batches = data.make_iterator(config.data)
    first, second = next(batches), next(batches)
    join = lambda name: np.concatenate([first[name], second[name]], axis=1)
    logits, _ = jax.jit(model.forward)(
      state.params, None, join('tokens'), reset=join('reset')
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, join('targets')
    )
    length = config.data.sequence_length
    expected = [
      float(np.mean(loss[:, :length])),
      float(np.mean(loss[:, length:])),
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)

  def test_sharded_is_unsharded(self):
    alone, losses = self.take_steps(3)
    config, model, optimizer = self.parts()
    mesh = sharding.make_mesh(sharding.MeshConfig(4, 2))
    abstract = training.abstract_state(config, model, optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    rows = sharding.batch_sharding(mesh)
    state = jax.jit(
      training.make_init(config, model, optimizer), out_shardings=shardings
    )(jax.random.key(0))
    step = jax.jit(
      training.make_step(config, model, optimizer),
      in_shardings=(shardings, rows),
      out_shardings=(shardings, None),
    )
    batches = data.make_iterator(config.data)
    for loss in losses:
      batch = next(batches)
      del batch['document']
      state, metrics = step(state, batch)
      np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
      alone.params,
      state.params,
    )

  def test_the_optimiser_is_sharded_like_the_parameters(self):
    config, model, optimizer = self.parts()
    mesh = sharding.make_mesh(sharding.MeshConfig(4, 2))
    state = training.abstract_state(config, model, optimizer, mesh)
    expected = state.params['blocks']['levels']['slow']['up'].sharding
    self.assertIn('model', expected.spec)
    found = [
      leaf.sharding
      for path, leaf in jax.tree.leaves_with_path(state.optimizer)
      if jax.tree_util.keystr(path).endswith("['levels']['slow']['up']")
    ]
    self.assertLen(found, 3)  # both moments and the gradients of the chunk
    self.assertEqual(set(found), {expected})

  def test_the_stream_is_sharded_over_its_rows(self):
    config, model, optimizer = self.parts(
      data={'reset': 'never'}, train={'num_steps': 2}
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(4, 2))
    state = training.abstract_state(config, model, optimizer, mesh)
    key = state.stream.key  # [micro-batch, layer, row, slot, head, dim]
    self.assertEqual(key.shape[:3], (1, 1, 8))
    self.assertEqual(
      key.sharding.spec, jsharding.PartitionSpec(None, None, sharding.ROWS)
    )

  def test_refuses_rows_that_do_not_divide_over_the_mesh(self):
    config, model, optimizer = self.parts(train={'accumulate': 2})
    mesh = sharding.make_mesh(sharding.MeshConfig(8, 1))
    with self.assertRaisesRegex(errors.UserError, '4 rows .* 8 devices'):
      training.abstract_state(config, model, optimizer, mesh)
