"""Causal softmax attention with rotary positions, to all tokens or a window.

Attention to all tokens keeps every key and value of a stream, so that its state
limits the stream's length. With `window`, a query sees the last tokens only and
the state has a constant size; see `nested_learning.layers.sliding_window`.

Biases, norms of queries and keys, the scale and the bound of scores, scaled
rotary positions and sinks are those of pretrained models, see
`nested_learning.pretrained`.

References:
  Behrouz et al., Titans, arXiv:2501.00663, 2024, section 3.3 (persistent
  memory).
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import context_parallel
from nested_learning import errors
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import dot_product
from nested_learning.layers import norm
from nested_learning.layers import ring_attention
from nested_learning.layers import rotary
from nested_learning.layers import sliding_window


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Causal softmax attention."""

  num_heads: int  # query heads
  num_kv_heads: int  # heads of keys and values; divides num_heads
  head_dim: int  # even, for the rotary pairs
  # Longest rotary wavelength / 2 pi, in tokens; None is no rotary positions.
  rope_theta: float | None = 10_000.0
  window: int | None = None  # tokens a query sees, itself included; None is all
  num_persistent: int = 0  # learned keys and values that every query sees
  # First tokens of a document that later queries see from beyond the window.
  num_sinks: int = 0
  rope_scaling: rotary.Scaling | None = None  # of rotary frequencies
  # Projections with a bias: none, those of queries, keys and values, or all.
  bias: Literal['none', 'qkv', 'all'] = 'none'
  # Norm of each query and key before rotation, or None.
  qk_norm: norm.NormConfig | None = None
  score_scale: float | None = None  # of scores; None is 1 / sqrt(head_dim)
  score_cap: float | None = None  # bound of scores; None is no bound

  def __post_init__(self):
    check = functools.partial(errors.check_field, self)
    for name in ('num_heads', 'num_kv_heads', 'head_dim'):
      check(name, getattr(self, name) >= 1, 'at least 1')
    has_pairs = self.rope_theta is None or self.head_dim % 2 == 0
    check('head_dim', has_pairs, 'even for rotary positions')
    check(
      'num_heads',
      self.num_heads % self.num_kv_heads == 0,
      f'a multiple of num_kv_heads={self.num_kv_heads}',
    )
    for name in ('rope_theta', 'score_scale', 'score_cap'):
      value = getattr(self, name)
      fine = value is None or 0 < value < math.inf
      check(name, fine, 'a finite number above 0, or None')
    check(
      'window',
      self.window is None or self.window >= 1,
      'at least 1 token, or None for all tokens',
    )
    for name in ('num_persistent', 'num_sinks'):
      check(name, getattr(self, name) >= 0, 'at least 0')
    fine = self.num_sinks == 0 or self.window is not None
    check('num_sinks', fine, '0 where window=None, which loses no token')
    errors.check_choices(self)

  @property
  def scoring(self) -> dot_product.Scoring:
    """Returns scale and bound of the scores."""
    return dot_product.Scoring(self.score_scale, self.score_cap)

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return self.window is not None

  @property
  def granularity(self) -> int:
    """1: attention has no chunks; see `base.MixerConfig`."""
    return 1

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    if max_length is None and self.window is None:
      raise errors.UserError(
        'max_length=None must be a number of tokens: attention without a '
        'window keeps all of a stream.'
      )
    return _make_attention(self, embed_dim, max_length, dtype)


class AttentionState(NamedTuple):
  """State of attention to all tokens of a stream of at most s tokens.

  Attributes:
    key: [b, s, kv heads, d], rotated.
    value: [b, s, kv heads, d].
    document: int32 [b, s], the document of each token; -1 for empty slots.
    position: int32 [b], tokens read so far.
    current: int32 [b], the document being read.
  """

  key: jax.Array
  value: jax.Array
  document: jax.Array
  position: jax.Array
  current: jax.Array


def places(
  state: Any, shape: tuple[int, int], info: base.TokenInfo
) -> jax.Array:
  """Returns the places of tokens in their documents, from 0.

  Args:
    state: Any tree with an `AttentionState`, perhaps of stacked layers; None at
      a stream's start.
    shape: Rows and tokens of the call, b and t.
    info: Facts about the tokens.

  Returns:
    int32 [b, t]; the places of padding are undefined.
  """
  before = jnp.zeros((shape[0], 1), jnp.int32)
  if state is not None:
    is_one = lambda x: isinstance(x, AttentionState)
    found = next(filter(is_one, jax.tree.leaves(state, is_leaf=is_one)))
    document, current = found.document, found.current
    if document.ndim == 3:  # stacked: all layers have read the same tokens
      document, current = document[0], current[0]
    before = jnp.sum(document == current[:, None], axis=1, keepdims=True)
  read = jnp.ones(shape, bool) if info.mask is None else info.mask
  index = jnp.cumsum(read, axis=1, dtype=jnp.int32) - 1
  if info.reset is None:
    return before + index
  began = jnp.where(info.reset & read, index, -before)
  return index - jax.lax.cummax(began, axis=1)


def _make_attention(
  config: AttentionConfig, embed_dim, max_length, dtype
) -> base.Layer:
  c = config
  table = _table(c, embed_dim)
  rotate = functools.partial(
    rotary.rotate, theta=c.rope_theta, scaling=c.rope_scaling
  )

  def init_state(params, batch_size):
    del params
    key_shape = c.num_kv_heads, c.head_dim
    if c.window is not None:
      return sliding_window.init_state(
        c.window, key_shape, batch_size, dtype, num_sinks=c.num_sinks
      )
    return _init_state(max_length, key_shape, batch_size, dtype)

  def apply(params, state, inputs, info):
    query, key, value = (
      _project(c, params, name, inputs, dtype)
      for name in ('query', 'key', 'value')
    )
    persistent = None
    if c.num_persistent:
      learned = params['persistent_memory']
      persistent = learned['key'], learned['value']
    num_parts = context_parallel.num_parts(inputs.shape[1])
    in_parts = num_parts > 1 and state is None
    arguments = {
      'query': query,
      'key': key,
      'value': value,
      'rotate': rotate,
      'scoring': c.scoring,
      'persistent': persistent,
    }
    if c.window is not None:
      attend = functools.partial(
        sliding_window.attend, state, mask=info.mask, num_sinks=c.num_sinks
      )
      # The first tokens of a document may lie on any device.
      if in_parts and info.mask is None and not c.num_sinks:
        attend = ring_attention.attend_window
      outputs, state = attend(window=c.window, reset=info.reset, **arguments)
    else:
      start = init_state(params, inputs.shape[0])
      outputs, state = _attend(
        start if state is None else state,
        info=info,
        is_start=state is None,
        # Devices that share a row take no bounded scores.
        in_parts=in_parts and c.score_cap is None,
        **arguments,
      )
    out = jnp.einsum('bthd,hde->bte', outputs, params['out'].astype(dtype))
    if c.bias == 'all':
      out += params['out_bias'].astype(dtype)
    return out, state

  return base.make_layer(table, init_state, apply)


def _project(config, params, name, inputs, dtype) -> jax.Array:
  """Computes queries, keys or values [b, t, h, d]."""
  out = jnp.einsum('bte,ehd->bthd', inputs, params[name].astype(dtype))
  if config.bias != 'none':
    out += params[f'{name}_bias'].astype(dtype)
  if config.qk_norm is not None and name != 'value':
    out = config.qk_norm.apply(params[f'{name}_norm'], out)
  return out


def _table(config: AttentionConfig, embed_dim: int) -> parameters.Table:
  heads, kv_heads, dim = (
    config.num_heads,
    config.num_kv_heads,
    config.head_dim,
  )

  def project(num_heads):
    return parameters.Param(
      (embed_dim, num_heads, dim),
      ('embed', 'heads', None),
      parameters.fan_in(embed_dim),
      decay=True,
    )

  table = {
    'query': project(heads),
    'key': project(kv_heads),
    'value': project(kv_heads),
    'out': parameters.Param(
      (heads, dim, embed_dim),
      ('heads', None, 'embed'),
      parameters.fan_in(heads * dim),
      decay=True,
    ),
  }
  if config.bias != 'none':
    for name in ('query', 'key', 'value'):
      param = table[name]
      table[f'{name}_bias'] = _bias(param.shape[1:], param.axes[1:])
  if config.bias == 'all':
    table['out_bias'] = _bias((embed_dim,), ('embed',))
  if config.qk_norm is not None:
    for name in ('query', 'key'):
      table[f'{name}_norm'] = config.qk_norm.param(dim, None)
  if config.num_persistent:
    learned = lambda: parameters.Param(
      (config.num_persistent, kv_heads, dim),
      (None, 'heads', None),
      parameters.normal(1.0),  # the size of a token's projection
      decay=False,
    )
    table['persistent_memory'] = {'key': learned(), 'value': learned()}
  return table


def _bias(shape, axes) -> parameters.Param:
  return parameters.Param(shape, axes, parameters.constant(0.0), decay=False)


def _init_state(max_length, key_shape, batch_size, dtype) -> AttentionState:
  shape = (batch_size, max_length, *key_shape)
  return AttentionState(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    document=jnp.full((batch_size, max_length), -1, jnp.int32),
    position=jnp.zeros((batch_size,), jnp.int32),
    current=jnp.zeros((batch_size,), jnp.int32),
  )


def _attend(
  start: AttentionState,
  query,
  key,
  value,
  *,
  rotate,
  scoring,
  info,
  is_start,
  in_parts,
  persistent,
) -> tuple[jax.Array, AttentionState]:
  """Attends to all earlier tokens of the document; all arrays [b, t, h, d]."""
  (batch_size, num_tokens), max_length = query.shape[:2], start.key.shape[1]
  read = jnp.ones(query.shape[:2], bool) if info.mask is None else info.mask
  count = jnp.cumsum(read, axis=1, dtype=jnp.int32)
  position = start.position[:, None] + count - 1
  document = jnp.broadcast_to(start.current[:, None], position.shape)
  if info.reset is not None:
    document += jnp.cumsum(info.reset & read, axis=1, dtype=jnp.int32)
  unplaced = query
  query, key = rotate(query, position), rotate(key, position)

  rows = jnp.arange(batch_size)[:, None]
  # Padding gets a slot past the end, which mode='drop' ignores.
  slots = jnp.where(read, position, max_length)
  put = lambda into, x: into.at[rows, slots].set(x, mode='drop')
  state = AttentionState(
    key=put(start.key, key),
    value=put(start.value, value),
    document=put(start.document, document),
    position=start.position + count[:, -1],
    current=document[:, -1],
  )
  if persistent is not None:
    learned_key, learned_value = persistent
    persistent = dot_product.Apart(unplaced, learned_key, learned_value)
  if in_parts:
    # This attention scores with 1 / sqrt(d).
    factor = scoring.factor(query.shape[-1]) * query.shape[-1] ** 0.5
    if scoring.scale is not None:
      query = query * factor
      if persistent is not None:
        persistent = persistent._replace(query=unplaced * factor)
    places = ring_attention.Places(position, document, read)
    outputs = ring_attention.attend(
      query, key, value, places, persistent=persistent
    )
    return outputs, state
  if is_start:  # nothing precedes these tokens: their own keys suffice
    place = jnp.broadcast_to(jnp.arange(num_tokens), position.shape)
    key_place, key_document = place, jnp.where(read, document, -1)
  else:
    place, key_place = position, jnp.arange(max_length)[None]
    key, value, key_document = state.key, state.value, state.document

  def sees(places, num_keys):
    """Returns which keys are of the query's document and not after it."""
    place, document = (x[:, :, None] for x in places)
    before = key_place[:, None, :num_keys] <= place
    return before & (key_document[:, None, :num_keys] == document)

  outputs = dot_product.attend_in_blocks(
    query,
    key,
    value,
    (place, document),
    sees,
    is_causal=is_start,
    scoring=scoring,
    persistent=persistent,
  )
  return outputs, state
