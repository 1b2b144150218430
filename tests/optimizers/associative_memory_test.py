"""Shows optimisers as associative memories: Nested Learning's claim in numbers.

Each test writes down a regression over the gradients seen so far, minimises it
numerically, and finds a known optimiser in the answer. Read as examples.
"""

import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import optax


def minimise(objective, start):
  """Newton's method; every objective here is quadratic."""

  @jax.jit
  def newton(x):
    return x - jnp.linalg.solve(
      jax.hessian(objective)(x), jax.grad(objective)(x)
    )

  return newton(start)


@functools.partial(jax.jit, static_argnums=0)
def last_update(tx, gradients):
  state = tx.init(gradients[0])
  for g in gradients:
    updates, state = tx.update(g, state)
  return updates


class AssociativeMemoryTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))
    rng = np.random.default_rng(0)
    self.gradients = jnp.array(rng.normal(size=(6, 5)))

  def test_backpropagation_stores_errors_under_inputs(self):
    # NL eq. 29-31: W_{t+1} = argmin <W x, delta> + 1/(2 lr) |W - W_t|^2.
    weights = jnp.arange(6.0).reshape(2, 3)
    x, label, rate = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 0.7]), 0.1
    loss = lambda y: jnp.sum(jnp.tanh(y - label))
    error = jax.grad(loss)(weights @ x)

    def objective(flat):
      w = flat.reshape(2, 3)
      distance = jnp.sum((w - weights) ** 2)
      return jnp.vdot(w @ x, error) + distance / (2 * rate)

    stored = minimise(objective, jnp.zeros(6)).reshape(2, 3)
    gradient = jax.grad(lambda w: loss(w @ x))(weights)
    np.testing.assert_allclose(stored, weights - rate * gradient, atol=1e-12)

  def test_momentum_is_gradient_descent_on_its_inner_product(self):
    # NL eq. 33-35: the objective <m, g>, one step per gradient, and a decay.
    decay, rate = 0.9, 0.1
    m = jnp.zeros(5)
    for g in self.gradients:
      m = decay * m - rate * jax.grad(lambda m, g=g: jnp.vdot(m, g))(m)
    expected = last_update(optax.sgd(rate, momentum=decay), self.gradients)
    np.testing.assert_allclose(m, expected, atol=1e-12)

  def test_adam_is_the_optimal_memory_from_gradients_to_their_size(self):
    # NL eq. 101-105: m maps every gradient to P, the root of their mean square.
    # Old pairs count less; with both decays alike this is Adam, corrections
    # for the first steps included.
    decay = 0.9
    weights = decay ** jnp.arange(len(self.gradients) - 1, -1, -1.0)
    weights /= jnp.sum(weights)
    size = jnp.sqrt(weights @ self.gradients**2)

    def objective(m):
      return weights @ jnp.sum((m * self.gradients - size) ** 2, axis=1)

    adam = optax.scale_by_adam(decay, decay, eps=0.0)
    np.testing.assert_allclose(
      minimise(objective, jnp.zeros(5)),
      last_update(adam, self.gradients),
      atol=1e-9,
    )

  def test_regularised_memory_is_adam_with_epsilon_in_the_division(self):
    ridge = 0.3
    total, squares = self.gradients.sum(0), (self.gradients**2).sum(0)

    def objective(m):
      errors = m * self.gradients - jnp.sqrt(squares)
      return jnp.sum(errors**2) + ridge * jnp.sum(m**2)

    np.testing.assert_allclose(
      minimise(objective, jnp.zeros(5)),
      total * jnp.sqrt(squares) / (squares + ridge),
      atol=1e-9,
    )

  def test_adagrad_maps_only_the_last_gradient_to_its_size(self):
    # The same memory, told to answer 0 to the gradients before.
    size = jnp.sqrt((self.gradients**2).sum(0))
    targets = jnp.zeros_like(self.gradients).at[-1].set(size)

    def objective(m):
      return jnp.sum((m * self.gradients - targets) ** 2)

    adagrad = optax.scale_by_rss(initial_accumulator_value=0.0, eps=0.0)
    np.testing.assert_allclose(
      minimise(objective, jnp.zeros(5)),
      last_update(adagrad, self.gradients),
      atol=1e-9,
    )
