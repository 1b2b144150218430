"""Causal softmax attention with rotary positions, to all tokens or a window.

Attention to all tokens keeps every key and value of a stream, so that its state
limits the stream's length. With `window`, a query sees the last tokens only and
the state has a constant size; see `nested_learning.layers.sliding_window`.

References:
  Behrouz et al., Titans, arXiv:2501.00663, 2024, section 3.3 (persistent
  memory).
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import context_parallel
from nested_learning import errors
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import dot_product
from nested_learning.layers import ring_attention
from nested_learning.layers import sliding_window


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Causal softmax attention."""

  num_heads: int  # query heads
  num_kv_heads: int  # heads of keys and values; divides num_heads
  head_dim: int  # even, for the rotary pairs
  rope_theta: float = 10_000.0  # longest rotary wavelength / 2 pi, in tokens
  window: int | None = None  # tokens a query sees, itself included; None is all
  num_persistent: int = 0  # learned keys and values that every query sees

  def __post_init__(self):
    check = functools.partial(errors.check_field, self)
    for name in ('num_heads', 'num_kv_heads', 'head_dim'):
      check(name, getattr(self, name) >= 1, 'at least 1')
    check('head_dim', self.head_dim % 2 == 0, 'even for rotary positions')
    check(
      'num_heads',
      self.num_heads % self.num_kv_heads == 0,
      f'a multiple of num_kv_heads={self.num_kv_heads}',
    )
    check(
      'rope_theta', 0 < self.rope_theta < math.inf, 'a finite number above 0'
    )
    check(
      'window',
      self.window is None or self.window >= 1,
      'at least 1 token, or None for all tokens',
    )
    check('num_persistent', self.num_persistent >= 0, 'at least 0')

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


def _make_attention(
  config: AttentionConfig, embed_dim, max_length, dtype
) -> base.Layer:
  c = config
  table = _table(c, embed_dim)

  def init_state(params, batch_size):
    del params
    key_shape = c.num_kv_heads, c.head_dim
    if c.window is not None:
      return sliding_window.init_state(c.window, key_shape, batch_size, dtype)
    return _init_state(max_length, key_shape, batch_size, dtype)

  def apply(params, state, inputs, info):
    project = lambda w: jnp.einsum('bte,ehd->bthd', inputs, w.astype(dtype))
    query, key, value = (project(params[n]) for n in ('query', 'key', 'value'))
    persistent = None
    if c.num_persistent:
      learned = params['persistent_memory']
      persistent = learned['key'], learned['value']
    num_parts = context_parallel.num_parts(inputs.shape[1])
    in_parts = num_parts > 1 and state is None
    if c.window is not None:
      attend = functools.partial(sliding_window.attend, state, mask=info.mask)
      if in_parts and info.mask is None:
        attend = ring_attention.attend_window
      outputs, state = attend(
        query=query,
        key=key,
        value=value,
        window=c.window,
        theta=c.rope_theta,
        reset=info.reset,
        persistent=persistent,
      )
    else:
      start = init_state(params, inputs.shape[0])
      outputs, state = _attend(
        start if state is None else state,
        query,
        key,
        value,
        theta=c.rope_theta,
        info=info,
        is_start=state is None,
        in_parts=in_parts,
        persistent=persistent,
      )
    out = jnp.einsum('bthd,hde->bte', outputs, params['out'].astype(dtype))
    return out, state

  return base.make_layer(table, init_state, apply)


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
  if config.num_persistent:
    learned = lambda: parameters.Param(
      (config.num_persistent, kv_heads, dim),
      (None, 'heads', None),
      parameters.normal(1.0),  # the size of a token's projection
      decay=False,
    )
    table['persistent_memory'] = {'key': learned(), 'value': learned()}
  return table


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
  theta,
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
  query = dot_product.rotate(query, position, theta)
  key = dot_product.rotate(key, position, theta)

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
    persistent = dot_product.Persistent(unplaced, learned_key, learned_value)
  if in_parts:
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
    persistent=persistent,
  )
  return outputs, state
