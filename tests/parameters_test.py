"""The table of parameters and the values derived from it."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import parameters

_TABLE = {
  'a': parameters.Param(
    (64, 3), ('embed', None), parameters.fan_in(64), decay=True
  ),
  'b': {
    'scale': parameters.Param(
      (3,), (None,), parameters.constant(2.0), decay=False
    )
  },
}


class ParametersTest(absltest.TestCase):
  def test_everything_derives_from_the_table(self):
    params = parameters.init(jax.random.key(0), _TABLE)
    self.assertEqual(parameters.count(_TABLE), 195)
    self.assertEqual(
      jax.tree.map(lambda x: (x.shape, x.dtype), params),
      jax.tree.map(lambda x: (x.shape, x.dtype), parameters.abstract(_TABLE)),
    )
    np.testing.assert_array_equal(params['b']['scale'], 2.0)
    np.testing.assert_allclose(np.std(params['a']), 1 / 8, rtol=0.2)

  def test_a_new_parameter_leaves_the_others(self):
    more = {**_TABLE, '0': _TABLE['a']}
    params = parameters.init(jax.random.key(0), _TABLE)
    changed = parameters.init(jax.random.key(0), more)
    np.testing.assert_array_equal(params['a'], changed['a'])
    self.assertGreater(jnp.max(jnp.abs(params['a'] - changed['0'])), 0.1)

  def test_stacked_layers_differ_and_keep_their_scale(self):
    table = parameters.stack(_TABLE, 4)
    self.assertEqual(table['a'].axes, ('layers', 'embed', None))
    params = parameters.init(jax.random.key(0), table)
    self.assertEqual(params['a'].shape, (4, 64, 3))
    self.assertGreater(jnp.min(jnp.std(params['a'], axis=0)), 0.0)
    np.testing.assert_allclose(np.std(params['a']), 1 / 8, rtol=0.2)

  def test_values_per_head(self):
    init = parameters.values(lambda: np.arange(3.0))
    param = parameters.Param((2, 3), (None, 'heads'), init, decay=False)
    params = parameters.init(jax.random.key(0), {'x': param})
    np.testing.assert_array_equal(params['x'], [[0, 1, 2], [0, 1, 2]])

  def test_every_axis_has_a_name(self):
    with self.assertRaisesRegex(ValueError, 'differ in length; name every'):
      parameters.Param(
        (2, 3), ('embed',), parameters.constant(0.0), decay=False
      )
