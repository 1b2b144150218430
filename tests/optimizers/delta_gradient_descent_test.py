"""Tests Delta Gradient Descent against its objective, in all frameworks."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers
from tests.optimizers import small_models

printed_grad = functools.partial(
  optimizers.value_and_delta_grad, target='printed'
)


def defined_gradient(params, batch, erase):
  """Returns the gradient of the loss plus 1/2 |W x|^2 per map, x fixed."""
  x = batch[0]
  hidden = jnp.tanh(x @ params['first']['kernel'] + params['first']['bias'])

  def objective(params):
    first = x @ params['first']['kernel']
    second = jax.lax.stop_gradient(hidden) @ params['second']['kernel']
    pull = jnp.sum(first**2) + jnp.sum(second**2)
    return small_models.mlp_loss(params, batch) + erase / 2 * pull / x.shape[0]

  energy = {
    'first': {'kernel': jnp.sum(x**2) / 7, 'bias': 0.0},
    'second': {'kernel': jnp.sum(hidden**2) / 7},
  }
  return jax.grad(objective)(params), energy


def assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
    actual,
    expected,
  )


@functools.partial(jax.jit, static_argnums=0)
def minimise(objective, start):
  """Returns the minimum of a quadratic function, by Newton's method."""
  size = start.size
  gradient = jax.grad(objective)(start).reshape(size)
  hessian = jax.hessian(objective)(start).reshape(size, size)
  return start - jnp.linalg.solve(hessian, gradient).reshape(start.shape)


def train(tx, value_and_grad, params, batch, num_steps):
  """Returns the parameters after many steps on one batch."""

  def body(_, carry):
    params, state = carry
    _, gradients, extra = value_and_grad(params, batch)
    updates, state = tx.update(gradients, state, params, **extra)
    return optax.apply_updates(params, updates), state

  carry = params, tx.init(params)
  return jax.lax.fori_loop(0, num_steps, body, carry)[0]


class TargetTest(parameterized.TestCase):
  @parameterized.product(
    target=('corrected', 'printed'),
    length=(0.2, 1.0, 5.0),
    learning_rate=(0.1, 10.0),
  )
  def test_one_sample_is_the_exact_minimiser(
    self, target, length, learning_rate
  ):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      kernel = jnp.array(rng.normal(size=(4, 3)))
      x = jnp.array(rng.normal(size=4))
      x *= length / jnp.linalg.norm(x)
      label = rng.normal(size=3)
      loss_of = lambda y: jnp.sum(jnp.cos(y - label))
      loss_fn = lambda kernel, x: loss_of(x @ kernel)

      value_and_grad, tx = optimizers.dgd_for_model(
        loss_fn, kernel, x, learning_rate=learning_rate, target=target
      )
      _, grad, extra = value_and_grad(kernel, x)
      updates, _ = tx.update(grad, tx.init(kernel), kernel, **extra)

      u = -jax.grad(loss_of)(x @ kernel)
      if target == 'corrected':
        u = x @ kernel + u

      def objective(new):
        distance = jnp.sum((new - kernel) ** 2)
        fit = jnp.sum((x @ new - u) ** 2)
        return fit / 2 + distance / (2 * learning_rate)

      np.testing.assert_allclose(
        kernel + updates, minimise(objective, jnp.zeros((4, 3))), atol=1e-9
      )

  def test_many_samples_step_less_than_the_exact_minimiser(self):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      kernel = jnp.array(rng.normal(size=(4, 3)))
      x = jnp.array(rng.normal(size=(9, 4)) * [0.1, 0.5, 2.0, 6.0])
      y = jnp.array(rng.normal(size=(9, 3)))
      loss_fn = lambda kernel, x: jnp.mean(jnp.sum(jnp.sin(x @ kernel - y), 1))
      value_and_grad, tx = optimizers.dgd_for_model(
        loss_fn, kernel, x, learning_rate=3.0
      )
      _, grad, extra = value_and_grad(kernel, x)
      updates, _ = tx.update(grad, tx.init(kernel), kernel, **extra)
      target = x @ kernel - jnp.cos(x @ kernel - y)

      def objective(new):
        fit = jnp.mean(jnp.sum((x @ new - target) ** 2, axis=1))
        return fit / 2 + jnp.sum((new - kernel) ** 2) / 6.0

      exact = minimise(objective, kernel) - kernel
      # In every direction of the inputs, the same way and not as far.
      directions = jnp.linalg.svd(x, full_matrices=False)[2]
      ours, best = directions @ updates, directions @ exact
      ratio = ours / best
      self.assertGreater(jnp.min(ratio), 0.0)
      self.assertLess(jnp.max(ratio), 1.0)
      self.assertLess(objective(kernel + updates), objective(kernel))

  def test_fixed_points_of_corrected_are_those_of_the_loss(self):
    x = jax.random.normal(jax.random.key(0), (32, 4))
    y = x @ jax.random.normal(jax.random.key(1), (4, 2)) + 0.3
    loss_fn = lambda kernel, batch: jnp.mean(
      jnp.sum((batch[0] @ kernel - batch[1]) ** 2, axis=1)
    )
    solution = jnp.linalg.lstsq(x, y)[0]
    found = {}
    for target in ('corrected', 'printed'):
      value_and_grad, tx = optimizers.dgd_for_model(
        loss_fn, jnp.zeros((4, 2)), (x, y), learning_rate=1.0, target=target
      )
      found[target] = train(tx, value_and_grad, jnp.zeros((4, 2)), (x, y), 400)
    np.testing.assert_allclose(found['corrected'], solution, atol=1e-4)
    # Half the square error plus the paper's term: 2 / (2 + 1) of the way.
    np.testing.assert_allclose(found['printed'], solution * 2 / 3, atol=1e-4)

  @parameterized.named_parameters(
    ('momentum', optax.trace(0.9), 0.1),
    ('adam', optax.scale_by_adam(), 0.02),
    ('clip', optax.clip_by_global_norm(1.0), 0.3),
  )
  def test_other_rules_chain_onto_the_direction(self, rule, learning_rate):
    params, batch = small_models.make_mlp()
    value_and_grad = optimizers.value_and_delta_grad(small_models.mlp_loss)
    tx = optax.chain(
      optimizers.scale_by_dgd(learning_rate),
      rule,
      optax.scale_by_learning_rate(learning_rate),
    )
    trained = jax.jit(train, static_argnums=(0, 1, 4))(
      tx, value_and_grad, params, batch, 500
    )
    self.assertLess(
      small_models.mlp_loss(trained, batch),
      0.05 * small_models.mlp_loss(params, batch),
    )

  def test_corrected_step_is_safe_at_any_rate(self):
    # Inputs of very different lengths, where gradient descent diverges.
    x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.arange(1, 9)
    y = jax.random.normal(jax.random.key(1), (64, 4))
    loss_fn = lambda kernel, batch: (
      0.5 * jnp.mean(jnp.sum((batch[0] @ kernel - batch[1]) ** 2, axis=1))
    )
    value_and_grad, tx = optimizers.dgd_for_model(
      loss_fn, jnp.zeros((8, 4)), (x, y), learning_rate=1e6
    )
    losses = []
    for num_steps in (0, 1, 10, 100):
      kernel = train(tx, value_and_grad, jnp.zeros((8, 4)), (x, y), num_steps)
      losses.append(loss_fn(kernel, (x, y)))
    self.assertTrue(all(np.diff(losses) < 0))

  def test_rejects_settings_of_the_other_target(self):
    params, batch = small_models.make_mlp()
    with self.assertRaisesRegex(ValueError, "erase=0.5 .* target='printed'"):
      optimizers.dgd(1.0, erase=0.5)
    with self.assertRaisesRegex(ValueError, "erase=0.5 .* target='printed'"):
      optimizers.value_and_delta_grad(small_models.mlp_loss, erase=0.5)
    with self.assertRaisesRegex(ValueError, "target='paper' is not one of"):
      optimizers.dgd(1.0, target='paper')
    tx = optimizers.dgd(1.0)
    for energy in (jnp.ones(3), jnp.ones((2, 5))):
      with self.assertRaisesRegex(ValueError, r'does not fit .*\(5, 2\)'):
        tx.update(
          params['second'],
          tx.init(params),
          energy={'kernel': energy},
        )
    with self.assertRaisesRegex(ValueError, 'takes no projection'):
      tx.update(
        params, tx.init(params), params, energy=params, projection=params
      )


class PrintedTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.3, 1.0)
  def test_capture_adds_the_defined_term(self, erase):
    params, batch = small_models.make_mlp()
    loss, gradients, extra = jax.jit(
      optimizers.value_and_delta_grad(
        small_models.mlp_loss, target='printed', erase=erase
      )
    )(params, batch)
    expected, energy = defined_gradient(params, batch, erase)
    np.testing.assert_allclose(
      loss, small_models.mlp_loss(params, batch), rtol=1e-6
    )
    assert_close(gradients, expected)
    assert_close(extra['energy'], energy)

  def test_update_is_the_rule(self):
    params, batch = small_models.make_mlp()
    value_and_grad, tx = optimizers.dgd_for_model(
      small_models.mlp_loss, params, batch, learning_rate=0.5, target='printed'
    )
    _, gradients, extra = value_and_grad(params, batch)
    updates, _ = tx.update(gradients, tx.init(params), params, **extra)
    expected, energy = defined_gradient(params, batch, 1.0)
    for name in ('first', 'second'):
      rate = 0.5 / (1 + 0.5 * energy[name]['kernel'])
      np.testing.assert_allclose(
        updates[name]['kernel'], -rate * expected[name]['kernel'], rtol=1e-5
      )
    # The bias has no captured input: gradient descent by default.
    np.testing.assert_allclose(
      updates['first']['bias'], -0.5 * expected['first']['bias'], rtol=1e-5
    )

  def test_projection_can_be_an_extra_argument(self):
    params, batch = small_models.make_mlp()
    value_and_grad, tx = optimizers.dgd_for_model(
      small_models.mlp_loss,
      params,
      batch,
      learning_rate=0.5,
      target='printed',
      erase=0.7,
    )
    _, gradients, extra = value_and_grad(params, batch)
    folded, _ = tx.update(gradients, tx.init(params), params, **extra)
    plain = jax.grad(small_models.mlp_loss)(params, batch)
    whole, _ = defined_gradient(params, batch, 1.0)
    projection = jax.tree.map(jnp.subtract, whole, plain)
    updates, _ = tx.update(
      plain, tx.init(params), params, projection=projection, **extra
    )
    assert_close(updates, folded)

  def test_step_contracts_at_any_rate(self):
    x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.arange(1, 9)
    kernel = jax.random.normal(jax.random.key(1), (8, 4))
    # A loss that hardly depends on the map: the erasing term alone acts.
    loss_fn = lambda kernel, x: 1e-20 * jnp.sum(x @ kernel)
    value_and_grad, tx = optimizers.dgd_for_model(
      loss_fn, kernel, x, learning_rate=1e6, target='printed'
    )
    state = tx.init(kernel)
    for _ in range(5):
      _, gradient, extra = value_and_grad(kernel, x)
      updates, state = tx.update(gradient, state, kernel, **extra)
      shorter = kernel + updates
      self.assertLess(jnp.linalg.norm(x @ shorter), jnp.linalg.norm(x @ kernel))
      # No direction is pulled past zero.
      self.assertGreater(jnp.sum(shorter * kernel), 0)
      kernel = shorter

  def test_erase_zero_is_gradient_descent(self):
    params, batch = small_models.make_mlp()
    value_and_grad, tx = optimizers.dgd_for_model(
      small_models.mlp_loss,
      params,
      batch,
      learning_rate=0.1,
      target='printed',
      erase=0.0,
    )
    _, gradients, extra = value_and_grad(params, batch)
    updates, _ = tx.update(gradients, tx.init(params), params, **extra)
    expected = jax.tree.map(
      lambda g: -0.1 * g,
      jax.grad(small_models.mlp_loss)(*small_models.make_mlp()),
    )
    assert_close(updates, expected)

  def test_data_in_pieces_counts_as_one_batch(self):
    params, batch = small_models.make_mlp()
    batch = jax.tree.map(lambda leaf: leaf[:6], batch)

    def in_pieces(params, batch):
      def body(total, piece):
        return total + small_models.mlp_loss(params, piece) / 3, None

      pieces = jax.tree.map(lambda leaf: leaf.reshape(3, 2, -1), batch)
      return jax.lax.scan(body, 0.0, pieces)[0]

    expected = printed_grad(small_models.mlp_loss)(params, batch)
    actual = printed_grad(in_pieces)(params, batch)
    assert_close(actual, expected)

  def test_shared_map_sums_its_uses(self):
    kernel = jax.random.normal(jax.random.key(0), (3, 3))
    x = jax.random.normal(jax.random.key(1), (4, 3))
    twice = lambda kernel, x: jnp.sum(jnp.tanh(x @ kernel) @ kernel) / 4
    _, gradient, extra = printed_grad(twice)(kernel, x)
    hidden = jnp.tanh(x @ kernel)
    gram = (x.T @ x + hidden.T @ hidden) / 4
    expected = jax.grad(twice)(kernel, x) + gram @ kernel
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    np.testing.assert_allclose(extra['energy'], jnp.trace(gram), rtol=1e-5)
