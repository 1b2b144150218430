"""The chain of levels against the same chain in numpy."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import parameters
from nested_learning.levels import cms

_LEVELS = (
  cms.LevelConfig('fast', mlp_dim=5),
  cms.LevelConfig('middle', mlp_dim=7, chunk_size=4),
  cms.LevelConfig('slow', mlp_dim=3, chunk_size=16),
)


def mlp_by_hand(params, x):
  params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
  normed = normed * params['norm']
  gate = normed @ params['gate']
  return (gate / (1 + np.exp(-gate)) * (normed @ params['up'])) @ params['down']


class CmsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    table = cms.table(_LEVELS, embed_dim=6)
    self.params = parameters.init(jax.random.key(0), table)
    self.x = np.random.default_rng(0).normal(size=(2, 5, 6))

  def apply(self, levels, x):
    return jax.jit(lambda p, x: cms.apply(levels, p, x))(self.params, x)

  def test_equals_the_chain_by_hand(self):
    expected = self.x
    for level in _LEVELS:
      expected = expected + mlp_by_hand(self.params[level.name], expected)
    actual = self.apply(_LEVELS, self.x.astype(np.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    reverse = self.apply(_LEVELS[::-1], self.x.astype(np.float32))
    self.assertGreater(np.abs(reverse - expected).max(), 1e-3)

  def test_type_of_the_input_is_that_of_the_arithmetic(self):
    out = self.apply(_LEVELS, self.x.astype(jnp.bfloat16))
    self.assertEqual(out.dtype, jnp.bfloat16)

  @parameterized.parameters(
    ({'mlp_dim': 0}, "level 'a': .*mlp_dim=0 must be >= 1"),
    ({'mlp_dim': 4, 'chunk_size': 0}, "level 'a': .*chunk_size=0 must be"),
  )
  def test_bad_levels_name_the_value(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      cms.LevelConfig('a', **settings)


if __name__ == '__main__':
  absltest.main()
