"""Tests Newton-Schulz against singular values and its own definition."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import newton_schulz


class NewtonSchulzTest(parameterized.TestCase):
  @parameterized.product(shape=((6, 6), (3, 8), (8, 3)))
  def test_cubic_converges_to_the_polar_factor(self, shape):
    with jax.enable_x64(True):
      x = np.random.default_rng(0).normal(size=shape)
      u, _, v = np.linalg.svd(x, full_matrices=False)
      y = newton_schulz.orthogonalize(
        jnp.array(x), coefficients='cubic', num_steps=40
      )
      np.testing.assert_allclose(y, u @ v, atol=1e-10)

  def test_quintic_brings_singular_values_near_one(self):
    x = jax.random.normal(jax.random.key(0), (3, 16, 24))
    values = jnp.linalg.svd(newton_schulz.orthogonalize(x), compute_uv=False)
    self.assertGreater(values.min(), 0.6)
    self.assertLess(values.max(), 1.3)

  def test_stack_is_matrix_by_matrix(self):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 7))
    y = newton_schulz.orthogonalize(x)
    for i in range(2):
      for j in range(3):
        np.testing.assert_allclose(
          y[i, j], newton_schulz.orthogonalize(x[i, j]), atol=1e-5
        )

  @parameterized.product(
    coefficients=('cubic', 'quintic'), num_steps=(1, 3, 5), condition=(1e1, 1e5)
  )
  def test_long_matrices_take_the_same_steps(
    self, coefficients, num_steps, condition
  ):
    # Their steps are taken on Gram matrices; the definition, one by one.
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 8)))[0] for n in (8, 32))
    x = u * np.geomspace(1, 1 / condition, 8) @ v.T
    a, b, c = newton_schulz.COEFFICIENTS[coefficients]
    expected = x / np.linalg.norm(x)
    for _ in range(num_steps):
      gram = expected @ expected.T
      expected = a * expected + (b * gram + c * gram @ gram) @ expected
    for long, result in ((x, expected), (x.T, expected.T)):
      actual = newton_schulz.orthogonalize(
        jnp.array(long, jnp.float32),
        coefficients=coefficients,
        num_steps=num_steps,
      )
      np.testing.assert_allclose(actual, result, atol=1e-5)

  def test_zero_stays_zero(self):
    np.testing.assert_array_equal(
      newton_schulz.orthogonalize(jnp.zeros((2, 3, 4))), 0
    )

  def test_first_step_is_the_one_of_the_regression(self):
    # NL eq. 44 from O = g at rate 1/4: a gradient step on |O^T O - I|^2.
    with jax.enable_x64(True):
      g = jax.random.normal(jax.random.key(0), (4, 4))
      g /= jnp.linalg.norm(g)
      objective = lambda o: jnp.sum((o.T @ o - jnp.eye(4)) ** 2)
      step = g - 1 / 8 * jax.grad(objective)(g)
      y = newton_schulz.orthogonalize(g, coefficients='cubic', num_steps=1)
      np.testing.assert_allclose(y, step, atol=1e-8)
