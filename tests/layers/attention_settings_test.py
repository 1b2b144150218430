"""Settings of attention that pretrained models need, against NumPy."""

import dataclasses

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import parameters
from nested_learning.layers import norm
from nested_learning.layers import rotary
from tests import compiling

_EMBED, _TOKENS = 6, 23
_CONFIG = layers.AttentionConfig(4, 2, head_dim=4)
_LLAMA3 = rotary.Llama3Scaling(8.0, 1.0, 4.0, original_length=16)


def scaled_by_hand(frequency, scaling):
  """Scales frequencies one by one."""
  if scaling is None:
    return frequency
  if isinstance(scaling, rotary.LinearScaling):
    return frequency / scaling.factor
  out = []
  for f in frequency:
    wavelength = 2 * np.pi / f
    if wavelength < scaling.original_length / scaling.high_factor:
      out.append(f)
    elif wavelength > scaling.original_length / scaling.low_factor:
      out.append(f / scaling.factor)
    else:
      share = scaling.original_length / wavelength - scaling.low_factor
      share /= scaling.high_factor - scaling.low_factor
      out.append((1 - share) * f / scaling.factor + share * f)
  return np.array(out)


def rotate_by_hand(config, x, position):
  """Rotates one vector [d] by its position."""
  if config.rope_theta is None:
    return x
  half = len(x) // 2
  frequency = config.rope_theta ** (-np.arange(half) / half)
  turn = np.exp(1j * position * scaled_by_hand(frequency, config.rope_scaling))
  turned = (x[:half] + 1j * x[half:]) * turn
  return np.concatenate([turned.real, turned.imag])


def attend_by_hand(config, params, x, reset):
  """Attends within one row of tokens [t, e], score by score."""

  def project(name):
    out = np.einsum('te,ehd->thd', x, params[name])
    out = out + params.get(f'{name}_bias', 0.0)
    if f'{name}_norm' in params:
      rms = np.sqrt(np.mean(out**2, -1, keepdims=True) + config.qk_norm.epsilon)
      out = out / rms * (config.qk_norm.offset + params[f'{name}_norm'])
    return out

  query, key, value = map(project, ('query', 'key', 'value'))
  scale = config.score_scale or config.head_dim**-0.5
  group = config.num_heads // config.num_kv_heads
  out, start = np.zeros_like(query), 0
  for t in range(len(x)):
    start = t if reset[t] else start
    for head in range(config.num_heads):
      scores, values = [], []
      for s in range(start, t + 1):
        distance = t - s
        if config.window is not None and distance >= config.window:
          if s - start >= config.num_sinks:
            continue
          distance = config.window
        turned = rotate_by_hand(config, query[t, head], distance)
        score = turned @ key[s, head // group] * scale
        if config.score_cap is not None:
          score = config.score_cap * np.tanh(score / config.score_cap)
        scores.append(score)
        values.append(value[s, head // group])
      weights = np.exp(np.array(scores) - max(scores))
      out[t, head] = weights / weights.sum() @ np.array(values)
  out = np.einsum('thd,hde->te', out, params['out'])
  return out + params.get('out_bias', 0.0)


class AttentionSettingsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(2, _TOKENS, _EMBED))
    self.reset = np.zeros((2, _TOKENS), bool)
    self.reset[1, [3, 4, 14]] = True
    self.mask = rng.uniform(size=(2, _TOKENS)) < 0.7

  def parts(self, **changes):
    """Returns a config, its layer in float64 and random parameters."""
    config = dataclasses.replace(_CONFIG, **changes)
    layer = config.make(embed_dim=_EMBED, max_length=_TOKENS, dtype=jnp.float64)
    params = parameters.init(jax.random.key(0), layer.table, jnp.float64)
    rng = np.random.default_rng(1)
    # An initialiser leaves ones and zeros, which hide scales and biases.
    params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), params)
    return config, layer, params

  @parameterized.parameters(
    {'bias': 'qkv'},
    {'bias': 'all'},
    {'qk_norm': norm.NormConfig(epsilon=1e-3)},
    {'qk_norm': norm.NormConfig(offset=1.0)},
    {'score_scale': 1.7},
    {'score_cap': 0.8},
    {'score_scale': 1.7, 'score_cap': 0.8, 'window': 5},
    {'rope_theta': None},
    {'rope_theta': 100.0, 'rope_scaling': rotary.LinearScaling(4.0)},
    {'rope_theta': 100.0, 'rope_scaling': _LLAMA3},
    {'rope_theta': 100.0, 'rope_scaling': _LLAMA3, 'window': 5},
    {'window': 5, 'num_sinks': 1},
    {'window': 5, 'num_sinks': 3},
    {'window': 2, 'num_sinks': 4},
    {'window': 1, 'num_sinks': 2},
    {'window': 30, 'num_sinks': 4},
    {'window': 3, 'num_sinks': 2, 'num_persistent': 0, 'bias': 'all'},
  )
  def test_equals_scores_by_hand(self, **changes):
    with jax.enable_x64(True):
      config, layer, params = self.parts(**changes)
      apply = compiling.jit(layer.apply)
      info = layers.TokenInfo(self.reset)
      out, _ = apply(params, None, self.x, info)
      off = dataclasses.replace(_CONFIG, window=config.window)
      plain = set(self.parts()[1].table)
      for row in range(2):
        expected = attend_by_hand(config, params, self.x[row], self.reset[row])
        np.testing.assert_allclose(out[row], expected, atol=1e-10)
        if config != off and config.window != 30:  # the setting matters
          bare = {k: v for k, v in params.items() if k in plain}
          other = attend_by_hand(off, bare, self.x[row], self.reset[row])
          self.assertGreater(np.abs(out[row] - other).max(), 1e-3)

  @parameterized.parameters(
    {'num_sinks': 1, 'window': 5},
    {'num_sinks': 3, 'window': 5},
    {'num_sinks': 4, 'window': 2},
  )
  def test_pieces_of_a_stream_agree(self, **changes):
    with jax.enable_x64(True):
      _, layer, params = self.parts(**changes)
      apply = compiling.jit(layer.apply)
      whole, end = apply(params, None, self.x, layers.TokenInfo(self.reset))
      for cuts in ((7,), (1, 2, 3, 4, 15, 22), tuple(range(1, _TOKENS))):
        state, outs = layer.init_state(params, 2), []
        bounds = [0, *cuts, _TOKENS]
        for a, b in zip(bounds, bounds[1:], strict=False):
          info = layers.TokenInfo(self.reset[:, a:b])
          out, state = apply(params, state, self.x[:, a:b], info)
          outs.append(out)
        np.testing.assert_allclose(
          np.concatenate(outs, axis=1), whole, atol=1e-10
        )
      np.testing.assert_array_equal(state.sinks.position, [_TOKENS, 9])
      for row in range(2):
        held = min(int(state.sinks.position[row]), changes['num_sinks'])
        np.testing.assert_allclose(
          state.sinks.key[row, :held], end.sinks.key[row, :held], atol=1e-12
        )

  def test_padding_is_no_token_of_a_document(self):
    with jax.enable_x64(True):
      _, layer, params = self.parts(window=4, num_sinks=2)
      apply = compiling.jit(layer.apply)
      info = layers.TokenInfo(self.reset, self.mask)
      out, state = apply(params, None, self.x, info)
      for row in range(2):
        kept = np.flatnonzero(self.mask[row])
        info = layers.TokenInfo(self.reset[row, kept][None])
        alone, end = apply(params, None, self.x[row, kept][None], info)
        np.testing.assert_allclose(out[row, kept], alone[0], atol=1e-10)
        self.assertEqual(state.sinks.position[row], end.sinks.position[0])

  def test_sinks_have_a_gradient(self):
    with jax.enable_x64(True):
      _, layer, params = self.parts(window=2, num_sinks=1)

      def loss(x):
        out, _ = layer.apply(params, None, x, layers.TokenInfo())
        return jnp.sum(out[0, -1] ** 2)

      gradient = jax.grad(loss)(jnp.asarray(self.x))
      sizes = np.abs(gradient[0]).max(axis=-1)
      np.testing.assert_array_equal(
        np.flatnonzero(sizes), [0, _TOKENS - 2, _TOKENS - 1]
      )

  @parameterized.parameters(
    ({'num_sinks': 2}, 'num_sinks=2 must be 0 where window=None'),
    ({'num_sinks': -1, 'window': 3}, 'num_sinks=-1 must be at least 0'),
    ({'score_cap': 0.0}, 'score_cap=0.0 must be a finite number above 0'),
    ({'bias': 'some'}, "bias='some' must be one of 'none', 'qkv', 'all'"),
  )
  def test_refuses_settings(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(_CONFIG, **changes)

  @parameterized.parameters(
    (lambda: rotary.LinearScaling(0.5), 'factor=0.5 must be a finite'),
    (lambda: rotary.Llama3Scaling(high_factor=1.0), 'above low_factor=1.0'),
    (lambda: norm.NormConfig(epsilon=0.0), 'epsilon=0.0 must be above 0'),
  )
  def test_refuses_scalings_and_norms(self, make, message):
    with self.assertRaisesRegex(errors.UserError, message):
      make()
