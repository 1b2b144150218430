"""The triangular inverse of a chunk against numpy, and where keys repeat."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning.memory import chunked
from tests import compiling


def draw(*shape):
  rng = np.random.default_rng(0)
  return np.tril(rng.normal(size=(*shape, shape[-1])), -1) / shape[-1] ** 0.5


def repeated_keys(size, inner_lr):
  """Returns the matrix of equal keys: inner_lr below the diagonal."""
  return inner_lr * np.tril(np.ones((size, size)), -1)


class UnitLowerInverseTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(None, 4, 16, 64)
  def test_equals_numpy_at_many_sizes(self, small):
    sizes = (1, 2, 3, 7, 8, 9, 16, 31, 33, 64)
    matrices = [draw(3, size) for size in sizes]
    inverses = compiling.jit(
      lambda xs: [chunked.unit_lower_inverse(x, small) for x in xs]
    )(matrices)
    for matrix, inverse in zip(matrices, inverses, strict=True):
      expected = np.linalg.inv(np.eye(matrix.shape[-1]) + matrix)
      np.testing.assert_allclose(inverse, expected, rtol=1e-9, atol=1e-11)

  def test_reads_below_the_diagonal_alone(self):
    matrix = draw(17)
    dirty = matrix + np.triu(np.full((17, 17), np.nan))
    invert = compiling.jit(chunked.unit_lower_inverse)
    np.testing.assert_array_equal(invert(dirty), invert(matrix))

  @parameterized.product(inner_lr=(0.5, 1.0, 2.0), small=(16, 64))
  def test_repeated_keys_in_float32(self, inner_lr, small):
    matrix = repeated_keys(64, inner_lr)
    invert = compiling.jit(lambda x: chunked.unit_lower_inverse(x, small))
    inverse = invert(jnp.asarray(matrix, jnp.float32))
    # The entries are inner_lr (1 - inner_lr)^n, at most 2 in size.
    expected = np.linalg.inv(np.eye(64) + matrix)
    self.assertLess(np.abs(expected).max(), 2.001)
    np.testing.assert_allclose(inverse, expected, atol=2e-5)
    np.testing.assert_allclose(invert(matrix), expected, atol=1e-12)

  def test_gradient_equals_finite_differences(self):
    matrix, weights = draw(13), np.random.default_rng(1).normal(size=(13, 13))
    direction = np.random.default_rng(2).normal(size=(13, 13))

    @compiling.jit
    def value_and_grad(x):
      return jax.value_and_grad(
        lambda x: jnp.sum(weights * chunked.unit_lower_inverse(x))
      )(x)

    _, grad = value_and_grad(matrix)
    above, _ = value_and_grad(matrix + 1e-6 * direction)
    below, _ = value_and_grad(matrix - 1e-6 * direction)
    np.testing.assert_allclose(
      np.sum(grad * direction), (above - below) / 2e-6, rtol=1e-6
    )
    np.testing.assert_array_equal(np.triu(grad), 0.0)
