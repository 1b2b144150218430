"""Tests deep momentum against its objectives, and the size of its state."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers


def deep_state(state):
  return state.inner_states['deep'].inner_state[0]  # of a chain with the rate


class DeepMomentumTest(parameterized.TestCase):
  @parameterized.product(
    shape=((64, 64), (16, 128), (128, 16), (3, 32, 48)), ratio=(0.1, 0.5, 2.0)
  )
  def test_state_size_is_bounded_by_its_ratio(self, shape, ratio):
    params = {'w': jax.ShapeDtypeStruct(shape, jnp.float32)}
    tx = optimizers.deep_momentum(0.1, state_ratio=ratio)
    state = deep_state(jax.eval_shape(tx.init, params))
    size = sum(leaf.size for leaf in jax.tree.leaves((state.down, state.up)))
    bound = ratio * params['w'].size
    self.assertLessEqual(size, bound)
    if ratio <= 0.5:  # And uses most of what it may.
      self.assertGreater(size, 0.5 * bound)

  def test_memory_learns_a_constant_gradient(self):
    gradient = jax.random.normal(jax.random.key(0), (8, 6))
    tx = optimizers.deep_momentum(1.0, decay=0.8, state_ratio=2.0)
    state = tx.init({'w': gradient})
    update = jax.jit(tx.update)
    errors = []
    for _ in range(60):
      updates, state = update({'w': gradient}, state)
      memory = deep_state(state)
      held = memory.up['w'] @ jnp.tanh(memory.down['w'])
      rms = jnp.sqrt(jnp.mean(gradient**2))
      errors.append(float(jnp.sum((held - gradient.T / rms) ** 2)))
    self.assertTrue(all(np.diff(errors) < 1e-6))
    self.assertLess(errors[-1], 0.1 * errors[0])
    difference = jnp.linalg.norm(updates['w'] + gradient / rms)
    self.assertLess(difference, 0.25 * jnp.linalg.norm(gradient / rms))

  def test_inner_step_descends_the_objective(self):
    # One step from a trained memory, against automatic differentiation.
    key = jax.random.key(0)
    tx = optimizers.deep_momentum(1.0, decay=0.9, state_ratio=1.0)
    params = {'w': jnp.zeros((6, 4))}
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(5):
      g = jax.random.normal(jax.random.fold_in(key, i), (6, 4))
      before = deep_state(state)
      _, state = update({'w': g}, state)
    after = deep_state(state)
    square = 0.9 * before.mean_square['w'] + 0.1 * jnp.mean(g**2)
    u = g.T / jnp.sqrt(square / (1 - 0.9**5))

    def objective(down, up):
      return 0.5 * jnp.sum((up @ jnp.tanh(down) - u) ** 2)

    down, up = before.down['w'], before.up['w']
    bound = lambda x: jnp.max(jnp.sum(jnp.abs(x @ x.T), -1))
    down_step, up_step = jax.grad(objective, (0, 1))(down, up)
    np.testing.assert_allclose(
      after.down['w'], down - 0.1 * down_step / bound(up.T), atol=1e-5
    )
    np.testing.assert_allclose(
      after.up['w'], up - 0.1 * up_step / bound(jnp.tanh(down)), atol=1e-5
    )

  def test_paper_form_descends_the_printed_objective(self):
    key = jax.random.key(0)
    # A rate of 1 is print to the letter.
    tx = optimizers.deep_momentum(
      1.0, form='paper', decay=0.9, inner_rate=0.1, state_ratio=1.0
    )
    state = tx.init({'w': jnp.zeros((5, 3))})
    memory = deep_state(state)
    down, up = memory.down['w'], memory.up['w']
    for i in range(4):
      g = jax.random.normal(jax.random.fold_in(key, i), (5, 3))
      updates, state = jax.jit(tx.update)({'w': g}, state)

      def objective(down, up, g=g):
        memory = lambda u: up @ jnp.tanh(down @ u)
        return jnp.trace(jax.vmap(memory)(g.T))

      steps = jax.grad(objective, (0, 1))(down, up)
      down, up = 0.9 * down - 0.1 * steps[0], 0.9 * up - 0.1 * steps[1]
      np.testing.assert_allclose(
        updates['w'], (up @ jnp.tanh(down)).T, atol=1e-5
      )

  def test_inner_steps_may_be_traced(self):
    gradient = jax.random.normal(jax.random.key(0), (6, 4))
    make = lambda steps: optimizers.scale_by_deep_momentum(inner_steps=steps)

    def direction(steps):
      tx = make(steps)
      return tx.update(gradient, tx.init(gradient))[0]

    np.testing.assert_allclose(
      jax.jit(direction)(3), direction(3), rtol=1e-4, atol=1e-5
    )
    self.assertGreater(jnp.max(jnp.abs(direction(3) - direction(1))), 1e-3)

  def test_dimension_numbers_are_those_of_a_matrix(self):
    numbers = optax.contrib.MuonDimensionNumbers
    tx = optimizers.deep_momentum(
      0.1, dimension_numbers={'w': numbers((0,), (1, 2)), 'b': None}
    )
    params = {'w': jnp.sin(jnp.arange(48.0)).reshape(6, 2, 4)}
    params['b'] = jnp.ones((2, 4))  # of rank 2, and no matrix
    updates, state = tx.update(params, tx.init(params), params)
    self.assertEqual(deep_state(state).down['w'].shape[-1], 6)
    self.assertEqual(deep_state(state).up['w'].shape[0], 8)

    flat = {'w': params['w'].reshape(6, 8), 'b': jnp.ones(8)}
    tx = optimizers.deep_momentum(0.1)
    expected, _ = tx.update(flat, tx.init(flat), flat)
    for key, update in updates.items():
      self.assertEqual(update.shape, params[key].shape)
      np.testing.assert_allclose(
        update.reshape(expected[key].shape), expected[key], atol=1e-6
      )
    tx = optimizers.scale_by_deep_momentum(dimension_numbers={'b': None})
    with self.assertRaisesRegex(ValueError, r"\['b'\] is no matrix"):
      tx.init({'b': params['b']})

  def test_fallback_updates_vectors(self):
    params = {'w': jnp.ones((4, 4)), 'b': jnp.ones(4), 'nothing': None}
    tx = optimizers.deep_momentum(0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    adam = optax.adam(0.1)
    expected, _ = adam.update(params['b'], adam.init(params['b']))
    np.testing.assert_allclose(updates['b'], expected)

  def test_rejects_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, 'state_ratio=-1'):
      optimizers.deep_momentum(0.1, state_ratio=-1)
    with self.assertRaisesRegex(ValueError, 'inner_steps=0'):
      optimizers.deep_momentum(0.1, inner_steps=0)
