"""The chain of levels against the same chain in numpy."""

import re

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from nested_learning import parameters
from nested_learning.layers import cms
from tests import compiling

_LEVELS = (
  cms.LevelConfig('fast', mlp_dim=5),
  cms.LevelConfig('middle', mlp_dim=7, train_every=4),
  cms.LevelConfig('slow', mlp_dim=3, train_every=16),
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

  def test_independent_levels_are_summed_with_their_weights(self):
    chain = cms.ChainConfig('independent')
    mix = parameters.init(jax.random.key(0), cms.mix_table(_LEVELS, chain))
    np.testing.assert_array_equal(mix['mix'], np.ones(3))
    weights = np.array([0.5, -1.0, 2.0])
    expected = self.x + sum(
      weight * mlp_by_hand(self.params[level.name], self.x)
      for weight, level in zip(weights, _LEVELS, strict=True)
    )
    actual = cms.apply(
      _LEVELS,
      self.params,
      self.x.astype(np.float32),
      chain=chain,
      mix=jnp.asarray(weights),
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

  @parameterized.parameters('sequential', 'nested')
  def test_slowest_first_is_the_chain_from_its_other_end(self, connection):
    chain = cms.ChainConfig(connection, order='slowest_first')
    x = self.x.astype(np.float32)
    actual = cms.apply(_LEVELS, self.params, x, chain=chain)
    expected = cms.apply(_LEVELS[::-1], self.params, x)
    np.testing.assert_array_equal(actual, expected)
    self.assertEqual(cms.mix_table(_LEVELS, chain), {})

  def test_the_default_model_has_the_parameters_of_the_chain_alone(self):
    sizes = {'mixer': layers.AttentionConfig(2, 2, 4), 'levels': _LEVELS}
    make = lambda **chain: models.make_model(
      models.ModelConfig(7, 2, 8, **sizes, chain=models.ChainConfig(**chain))
    )
    plain, independent = make(), make(connection='independent')
    table = dict(independent.table['blocks'])
    self.assertEqual(table.pop('mix').shape, (2, 3))
    self.assertEqual(table.keys(), plain.table['blocks'].keys())
    names = jax.tree.leaves(models.level_labels(independent.config))
    self.assertEqual(names.count('middle'), 4)
    params = compiling.jit(independent.init_params)(jax.random.key(0))
    tokens = np.arange(10).reshape(2, 5) % 7
    loss = lambda params: independent.forward(params, None, tokens)[0].std()
    grads = compiling.jit(jax.grad(loss))(params)
    self.assertGreater(np.abs(grads['blocks']['mix']).min(), 0)

  def test_type_of_the_input_is_that_of_the_arithmetic(self):
    out = self.apply(_LEVELS, self.x.astype(jnp.bfloat16))
    self.assertEqual(out.dtype, jnp.bfloat16)

  @parameterized.parameters(
    ({'mlp_dim': 0}, 'mlp_dim=0 must be at least 1'),
    ({'mlp_dim': -4}, 'mlp_dim=-4 must be at least 1'),
    ({'train_every': 0}, 'train_every=0 must be at least 1'),
    *[
      ({'name': name}, f'name={re.escape(repr(name))} must be a letter')
      for name in (
        '',
        '.',
        '..',
        'a/b',
        'a b',
        '_a',
        'é',
        'a\n',
        'a' * 65,
        'base',
      )
    ],
  )
  def test_bad_levels_name_the_value(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      cms.LevelConfig(**{'name': 'a', 'mlp_dim': 4, **changes})

  def test_two_levels_of_one_name(self):
    with self.assertRaisesRegex(errors.UserError, "two levels are named 'a'"):
      cms.check([cms.LevelConfig('a', 4)] * 2, cms.ChainConfig())

  @parameterized.named_parameters(
    ('nested', 'nested', (4, 10), "'b' has train_every=10, .* 8 or 12"),
    ('order', 'sequential', (8, 4), "'a' .* before 'b' .* fastest first"),
    ('none_is_fastest', 'sequential', (8, None), "'a' .* before 'b'"),
  )
  def test_levels_that_make_no_chain(self, connection, sizes, message):
    chain = cms.ChainConfig(connection)
    names = zip('ab', sizes, strict=True)
    levels = [cms.LevelConfig(name, 4, size) for name, size in names]
    with self.assertRaisesRegex(errors.UserError, message):
      cms.check(levels, chain)

  @parameterized.parameters({'connection': 'tree'}, {'order': 'random'})
  def test_unknown_chains_name_the_value(self, **settings):
    (value,) = settings.values()
    with self.assertRaisesRegex(errors.UserError, f"='{value}' must be"):
      cms.ChainConfig(**settings)
