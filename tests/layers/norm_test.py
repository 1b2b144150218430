from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning.layers import norm


class NormTest(absltest.TestCase):
  def test_rms_norm(self):
    x = jnp.array([[3.0, 4.0], [30.0, 40.0]])
    out = norm.rms_norm(jnp.array([1.0, 2.0]), x)
    np.testing.assert_allclose(
      out, np.array([[3.0, 8.0]] * 2) / np.sqrt(12.5), rtol=1e-6
    )

  def test_rms_norm_is_wide_inside(self):
    x = jnp.full((1, 4), 300.0, jnp.float16)  # its square is no float16
    out = norm.rms_norm(jnp.ones(4), x)
    self.assertEqual(out.dtype, jnp.float16)
    np.testing.assert_allclose(out, 1.0, rtol=1e-3)

  def test_l2_normalize(self):
    out = norm.l2_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(out, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(norm.l2_normalize(x)))(jnp.zeros(3))
    self.assertTrue(np.all(np.isfinite(grad)))
