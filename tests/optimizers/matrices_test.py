"""Tests which parameters of a model are found to be matrices."""

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

from nested_learning import optimizers


def numbers_by_name(model, *inputs):
  """Returns ((reduction axes), (output axes)) or None by the path's names."""
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)['params']

  def loss_fn(params, *inputs):
    outputs = model.apply({'params': params}, *inputs)
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(outputs))

  found = optimizers.dimension_numbers(loss_fn, params, *inputs)
  paths = jax.tree.leaves_with_path(params)
  leaves = jax.tree.leaves(
    found, is_leaf=lambda leaf: leaf is None or hasattr(leaf, 'output_axis')
  )
  return {
    '/'.join(key.key for key in path): leaf and tuple(leaf)
    for (path, _), leaf in zip(paths, leaves, strict=True)
  }


class DimensionNumbersTest(parameterized.TestCase):
  def test_attention(self):
    attention = nn.MultiHeadDotProductAttention(2, qkv_features=12)
    expected = {'out/bias': None, 'out/kernel': ((0, 1), (2,))}
    for name in ('key', 'query', 'value'):
      expected |= {f'{name}/bias': None, f'{name}/kernel': ((0,), (1, 2))}
    self.assertEqual(numbers_by_name(attention, jnp.ones((2, 5, 8))), expected)

  @parameterized.parameters(
    (((3, 3), 1), ((0, 1, 2), (3,))),
    (((1, 1), 1), ((0, 1, 2), (3,))),
    (((3, 3), 4), None),  # depthwise
    (((3, 3), 2), None),  # two groups
  )
  def test_convolutions(self, settings, expected):
    size, groups = settings
    model = nn.Sequential([
      nn.Dense(4),
      nn.Conv(4, size, feature_group_count=groups),
    ])  # fmt: skip
    found = numbers_by_name(model, jnp.ones((2, 6, 6, 4)))
    self.assertEqual(found['layers_1/kernel'], expected)
    self.assertIsNone(found['layers_1/bias'])

  def test_experts_are_side_by_side(self):
    def loss_fn(params, x):
      hidden = jnp.einsum('ti,eif->tef', x, params['up'])
      outputs = jnp.einsum('tef,efo->teo', jnp.tanh(hidden), params['down'])
      gates = jax.nn.softmax(x @ params['router'])
      return jnp.sum(outputs * gates[..., None])

    shapes = {'up': (4, 8, 16), 'down': (4, 16, 8), 'router': (8, 4)}
    params = jax.tree.map(
      lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
      shapes,
      is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    found = optimizers.dimension_numbers(loss_fn, params, jnp.ones((5, 8)))
    self.assertEqual(found['up'], ((1,), (2,)))
    self.assertEqual(found['down'], ((1,), (2,)))
    self.assertEqual(found['router'], ((0,), (1,)))

  def test_two_different_maps_are_refused(self):
    def loss_fn(params, x):
      y = jnp.einsum('ba,aef->bef', x, params['w'])
      return jnp.sum(jnp.einsum('bae,aef->bf', y, params['w']))

    with self.assertRaisesRegex(ValueError, r"\['w'\].*\[0\] -> \[1, 2\]"):
      optimizers.dimension_numbers(
        loss_fn, {'w': jnp.ones((4, 4, 4))}, jnp.ones((3, 4))
      )

  def test_model_without_maps_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'no product of a parameter'):
      optimizers.dimension_numbers(
        lambda params, x: jnp.sum(params['b'] * x),
        {'b': jnp.ones(3)},
        jnp.ones(3),
      )

  def test_nnx_module(self):
    model = nnx.MultiHeadAttention(2, 8, 12, decode=False, rngs=nnx.Rngs(0))
    loss_fn = lambda model, x: jnp.sum(model(x))
    found = optimizers.dimension_numbers(loss_fn, model, jnp.ones((2, 5, 8)))
    self.assertEqual(found['out']['kernel'].get_value(), ((0, 1), (2,)))
    self.assertIsNone(found['out']['bias'].get_value())


if __name__ == '__main__':
  absltest.main()
