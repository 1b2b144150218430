"""Attention against a softmax in NumPy, in one call and from its state."""

import dataclasses
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import parameters
from nested_learning.layers import dot_product
from tests import compiling

_EMBED, _LENGTH = 6, 24
_SIZES = {'embed_dim': _EMBED, 'max_length': _LENGTH, 'dtype': jnp.float32}


def make(num_heads=4, num_kv_heads=2):
  config = layers.AttentionConfig(num_heads, num_kv_heads, head_dim=4)
  return config.make(**_SIZES)


def rotate_by_hand(x, position, theta=10_000.0):
  """Rotates pairs of channels of x [h, d] as complex numbers."""
  half = x.shape[-1] // 2
  turn = np.exp(1j * position * theta ** (-np.arange(half) / half))
  turned = (x[:, :half] + 1j * x[:, half:]) * turn
  return np.concatenate([turned.real, turned.imag], axis=-1)


def attend_by_hand(params, x, reset):
  """Attends within one row of tokens [t, e] without padding."""
  params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  project = lambda name: np.einsum('te,ehd->thd', x, params[name])
  query, key, value = (project(name) for name in ('query', 'key', 'value'))
  query = np.stack([rotate_by_hand(q, t) for t, q in enumerate(query)])
  key = np.stack([rotate_by_hand(k, t) for t, k in enumerate(key)])
  group = query.shape[1] // key.shape[1]
  out = np.zeros_like(query)
  start = 0
  for t in range(len(x)):
    start = t if reset[t] else start
    for head in range(query.shape[1]):
      seen = key[start : t + 1, head // group]
      scores = seen @ query[t, head] / query.shape[-1] ** 0.5
      weights = np.exp(scores - scores.max())
      weights /= weights.sum()
      out[t, head] = weights @ value[start : t + 1, head // group]
  return np.einsum('thd,hde->te', out, params['out'])


class AttentionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(2, 17, _EMBED)).astype(np.float32)
    self.reset = rng.uniform(size=(2, 17)) < 0.15
    self.mask = rng.uniform(size=(2, 17)) < 0.7

  def parts(self, **changes):
    layer = make(**changes)
    params = parameters.init(jax.random.key(0), layer.table)
    return layer, params, compiling.jit(layer.apply)

  @parameterized.parameters((4, 4), (4, 2), (4, 1))
  def test_equals_a_softmax_by_hand(self, num_heads, num_kv_heads):
    _, params, apply = self.parts(
      num_heads=num_heads, num_kv_heads=num_kv_heads
    )
    out, _ = apply(params, None, self.x, layers.TokenInfo(self.reset))
    masked, _ = apply(
      params, None, self.x, layers.TokenInfo(self.reset, self.mask)
    )
    for row in range(2):
      expected = attend_by_hand(params, self.x[row], self.reset[row])
      np.testing.assert_allclose(out[row], expected, atol=1e-5)
      there = self.mask[row]
      expected = attend_by_hand(
        params, self.x[row, there], self.reset[row, there]
      )
      np.testing.assert_allclose(masked[row, there], expected, atol=1e-5)

  @parameterized.product(
    lengths=((5, 12), (16, 1), (1, 1, 15)), marked=(False, True)
  )
  def test_any_split_gives_the_same(self, lengths, marked):
    layer, params, apply = self.parts()
    marks = (self.reset, self.mask) if marked else (None, None)
    whole, last = apply(params, None, self.x, layers.TokenInfo(*marks))
    state, pieces, t = layer.init_state(params, 2), [], 0
    for n in lengths:
      piece = [None if m is None else m[:, t : t + n] for m in marks]
      out, state = apply(
        params, state, self.x[:, t : t + n], layers.TokenInfo(*piece)
      )
      pieces.append(out)
      t += n
    there = self.mask[..., None] if marked else True
    np.testing.assert_allclose(
      np.where(there, np.concatenate(pieces, 1), 0),
      np.where(there, whole, 0),
      atol=1e-5,
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, last
    )

  def test_persistent_tokens_have_no_place(self):
    config = layers.AttentionConfig(4, 2, head_dim=4, num_persistent=3)
    full = config.make(**_SIZES)
    wide = dataclasses.replace(config, window=17).make(**_SIZES)
    params = parameters.init(jax.random.key(0), full.table)
    marks = layers.TokenInfo(self.reset)
    out, _ = compiling.jit(full.apply)(params, None, self.x, marks)
    expected, _ = compiling.jit(wide.apply)(params, None, self.x, marks)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    state = full.init_state(params, 2)
    again, _ = compiling.jit(full.apply)(params, state, self.x, marks)
    np.testing.assert_allclose(again, expected, atol=1e-5)

  @parameterized.product(
    marked=(False, True), carried=(False, True), num_groups=(2, 8)
  )
  def test_blocks_of_queries_give_the_same(self, marked, carried, num_groups):
    config = layers.AttentionConfig(4, 2, head_dim=4, num_persistent=3)
    layer = config.make(**_SIZES)
    params = parameters.init(jax.random.key(0), layer.table)
    marks = layers.TokenInfo(*(self.reset, self.mask) if marked else ())
    there = self.mask[..., None] if marked else True

    def loss(params, x):
      state = None
      if carried:
        _, state = layer.apply(params, None, x[:, :3], layers.TokenInfo())
      out, _ = layer.apply(params, state, x, marks)
      return jnp.sum(jnp.where(there, out, 0) ** 3), jnp.where(there, out, 0)

    value = lambda: jax.value_and_grad(loss, (0, 1), has_aux=True)
    at_once = compiling.jit(value())(params, self.x)
    # 17 queries: four blocks of five, the last one padded, in two groups or
    # each by itself.
    with (
      mock.patch.object(dot_product, '_BLOCK', 5),
      mock.patch.object(dot_product, '_GROUPS', num_groups),
    ):
      in_blocks = compiling.jit(value())(params, self.x)
    chex.assert_trees_all_close(in_blocks, at_once, rtol=1e-4, atol=1e-5)

  def test_padding_leaves_the_state(self):
    layer, params, apply = self.parts()
    _, state = apply(
      params, None, self.x[:, :9], layers.TokenInfo(self.reset[:, :9])
    )
    none = layers.TokenInfo(self.reset, np.zeros((2, 17), bool))
    _, after = apply(params, state, self.x, none)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    del layer

  @parameterized.parameters(
    ({'num_kv_heads': 3}, 'num_heads=4 must be a multiple of num_kv_heads=3'),
    ({'head_dim': 5}, 'head_dim=5 must be even'),
    ({'head_dim': 0}, 'head_dim=0 must be at least 1'),
    ({'head_dim': -2}, 'head_dim=-2 must be at least 1'),
    ({'num_heads': 0}, 'num_heads=0 must be at least 1'),
    ({'num_heads': -4}, 'num_heads=-4 must be at least 1'),
    ({'num_kv_heads': 0}, 'num_kv_heads=0 must be at least 1'),
    ({'rope_theta': 0.0}, 'rope_theta=0.0 must be a finite number above 0'),
    ({'window': 0}, 'window=0 must be at least 1'),
    ({'window': -1}, 'window=-1 must be at least 1'),
    ({'num_persistent': -1}, 'num_persistent=-1 must be at least 0'),
  )
  def test_bad_sizes_name_the_value(self, changes, message):
    sizes = {'num_heads': 4, 'num_kv_heads': 4, 'head_dim': 4} | changes
    with self.assertRaisesRegex(errors.UserError, f'^{message}'):
      layers.AttentionConfig(**sizes)

  def test_attention_to_all_tokens_needs_the_length_of_a_stream(self):
    config = layers.AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
    with self.assertRaisesRegex(errors.UserError, 'max_length=None must be'):
      config.make(embed_dim=_EMBED, dtype=jnp.float32)
