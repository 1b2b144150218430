"""MLPs of levels and norms of residual parts, against NumPy."""

import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import parameters
from nested_learning.layers import mlp
from nested_learning.layers import norm

_ACTIVATIONS = {
  'silu': lambda x: x / (1 + np.exp(-x)),
  'gelu': lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
  'gelu_tanh': lambda x: (
    x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
  ),
}


def norm_by_hand(config, params, x):
  if config.kind == 'rms':
    rms = np.sqrt(np.mean(x**2, -1, keepdims=True) + config.epsilon)
    return x / rms * (config.offset + params)
  x = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt(np.mean(x**2, -1, keepdims=True) + config.epsilon)
  return x / deviation * (config.offset + params['scale']) + params['bias']


def mlp_by_hand(config, params, x):
  normed = norm_by_hand(config.norm, params['norm'], x)
  linear = lambda name, x: x @ params[name] + params.get(f'{name}_bias', 0.0)
  act = _ACTIVATIONS[config.activation]
  if config.kind == 'gated':
    hidden = act(linear('gate', normed)) * linear('up', normed)
  else:
    hidden = act(linear('up', normed))
  out = linear('down', hidden)
  if config.norm.place == 'both':
    out = norm_by_hand(config.norm, params['norm_after'], out)
  return out


class MlpTest(parameterized.TestCase):
  @parameterized.parameters(
    {},
    {'activation': 'gelu'},
    {'kind': 'plain', 'activation': 'gelu_tanh', 'bias': 'all'},
    {'bias': 'all'},
    {'norm': norm.NormConfig(kind='layer', epsilon=1e-2)},
    {'norm': norm.NormConfig(epsilon=1e-2, offset=1.0, place='both')},
    {'norm': norm.NormConfig(kind='layer', offset=1.0, place='both')},
  )
  def test_equals_numpy(self, **settings):
    config = mlp.MlpConfig(**settings)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
      table = config.table(embed_dim=5, mlp_dim=7)
      params = parameters.init(jax.random.key(0), table, jnp.float64)
      params = jax.tree.map(lambda x: x + rng.normal(size=x.shape), params)
      x = rng.normal(size=(2, 3, 5))
      out = config.apply(params, jnp.asarray(x))
      np.testing.assert_allclose(
        out, mlp_by_hand(config, params, x), atol=1e-12
      )

  def test_norms_start_as_plain_ones(self):
    x = np.random.default_rng(0).normal(size=(2, 5))
    for config in (norm.NormConfig(offset=1.0), norm.NormConfig('layer')):
      params = parameters.init(jax.random.key(0), {'norm': config.param(5)})
      centred = x - x.mean(-1, keepdims=True) if config.kind == 'layer' else x
      expected = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True))
      np.testing.assert_allclose(
        config.apply(params['norm'], jnp.asarray(x)), expected, atol=1e-4
      )

  def test_half_precision_adds_the_offset_in_float32(self):
    config = norm.NormConfig(offset=1.0)
    scale = jnp.full((4,), 2.0**-9, jnp.bfloat16)  # 1 + 2^-9 is 1 in bfloat16
    out = config.apply(scale, jnp.ones((1, 4)))
    self.assertGreater(float(out[0, 0]), 1.001)
