"""Attention of every token to the last `window` tokens, itself included.

The state is a ring buffer of `window` keys and values, so a stream may have any
length. Keys are stored before rotation, and every block of queries counts its
positions from zero: rotary angles stay exact however long the stream is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.layers import dot_product
from nested_learning.memory import layout


class WindowState(NamedTuple):
  """Ring buffer of the last w tokens.

  Attributes:
    key: [b, w, kv heads, d], not rotated.
    value: [b, w, kv heads, d].
    document: int32 [b, w], the document of each slot; -1 for empty slots.
    slot: int32 [b], the slot of the next token, which holds the oldest one.
    current: int32 [b], the document being read.
  """

  key: jax.Array
  value: jax.Array
  document: jax.Array
  slot: jax.Array
  current: jax.Array


def init_state(
  window: int, key_shape: tuple[int, int], batch_size: int, dtype
) -> WindowState:
  """Returns the state at a stream's start, with every slot empty.

  Args:
    window: Tokens that a query sees, w.
    key_shape: Number of key heads and their width.
    batch_size: Rows b.
    dtype: Type of keys and values.

  Returns:
    A `WindowState`.
  """
  return WindowState(
    key=jnp.zeros((batch_size, window, *key_shape), dtype),
    value=jnp.zeros((batch_size, window, *key_shape), dtype),
    document=jnp.full((batch_size, window), -1, jnp.int32),
    slot=jnp.zeros((batch_size,), jnp.int32),
    current=jnp.zeros((batch_size,), jnp.int32),
  )


def attend(
  state: WindowState | None,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  window: int,
  theta: float,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  persistent: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, WindowState]:
  """Attends within the window, block by block, in O(t w) operations.

  A block of w queries is scored against its own keys and the w keys before.

  Args:
    state: From `init_state` or an earlier call; None for a stream's start.
    query: [b, t, h, d].
    key: [b, t, kv heads, d].
    value: [b, t, kv heads, d].
    window: Tokens that a query sees, itself included, w.
    theta: Base of the rotary wavelengths.
    reset: bool [b, t], True at a document's first token, or None.
    mask: bool [b, t], False for padding, or None. The outputs at padding are
      undefined.
    persistent: Keys and values [n, kv heads, d] visible to every query, or
      None.

  Returns:
    [b, t, h, d], and the state after the tokens.
  """
  batch_size, num_tokens = query.shape[:2]
  start = state
  if state is None:
    start = init_state(window, key.shape[2:], batch_size, key.dtype)
  place = None
  count = jnp.full((batch_size,), num_tokens, jnp.int32)
  if mask is not None:
    order, place = layout.present_first(mask)
    query, key, value = (layout.take(x, order, 1) for x in (query, key, value))
    reset = None if reset is None else layout.take(reset & mask, order, 1)
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
  document = jnp.broadcast_to(start.current[:, None], (batch_size, num_tokens))
  if reset is not None:
    document = document + jnp.cumsum(reset, axis=1, dtype=jnp.int32)
  new = key, value, document

  size = min(window, num_tokens)  # of a block
  before = start.key, start.value, start.document
  if state is None and size == num_tokens:  # one block, and nothing before it
    spans = jax.tree.map(lambda x: x[:, None], new)
  else:
    oldest_first = (start.slot[:, None] + jnp.arange(window)) % window
    before = jax.tree.map(lambda x: layout.take(x, oldest_first, 1), before)
    spans = jax.tree.map(lambda a, b: _spans(a, b, size), before, new)
  out = _attend_blocks(
    _blocks(query, size),
    _blocks(document, size),
    spans,
    window,
    theta,
    persistent,
  )
  out = out.reshape(batch_size, -1, *out.shape[3:])[:, :num_tokens]
  if place is not None:
    out = layout.take(out, place, 1)

  index = jnp.arange(num_tokens)
  kept = (index < count[:, None]) & (index >= count[:, None] - window)
  slots = (start.slot[:, None] + index) % window
  # Other tokens get a slot past the end, which mode='drop' ignores.
  slots = jnp.where(kept, slots, window)
  rows = jnp.arange(batch_size)[:, None]
  put = lambda into, x: into.at[rows, slots].set(x, mode='drop')
  return out, WindowState(
    key=put(start.key, key),
    value=put(start.value, value),
    document=put(start.document, document),
    slot=(start.slot + count) % window,
    current=document[:, -1],
  )


def _attend_blocks(query, document, spans, window, theta, persistent):
  """Attends from blocks of queries [b, n, c, h, d] to the keys of their spans.

  Scores one block at a time, and scores it again in the backward pass.
  """
  key, value, key_document = spans
  num_blocks, size, length = *query.shape[1:3], key.shape[2]
  # The queries are the last tokens of their span of keys.
  position = jnp.arange(length)
  age = position[-size:, None] - position
  visible = (age >= 0) & (age < window)
  visible &= document[..., None] == key_document[:, :, None]

  def look(block):
    query, key, value, visible = block
    learned = persistent and dot_product.Persistent(query, *persistent)
    query = dot_product.rotate(query, position[-size:], theta)
    key = dot_product.rotate(key, position, theta)
    return dot_product.attend(query, key, value, visible, persistent=learned)

  blocks = query, key, value, visible
  if num_blocks == 1:
    return look(jax.tree.map(lambda x: x[:, 0], blocks))[:, None]
  blocks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), blocks)
  return jnp.moveaxis(jax.lax.map(jax.checkpoint(look), blocks), 0, 1)


def _blocks(x, size):
  """Cuts tokens [b, t, ...] into blocks [b, n, size, ...], zeros at the end."""
  pads = [(0, 0)] * x.ndim
  pads[1] = (0, -x.shape[1] % size)
  x = jnp.pad(x, pads)
  return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _spans(before, new, size):
  """Returns each block's keys with the w before it, [b, n, w + size, ...]."""
  window = before.shape[1]
  if new.shape[1] == size:
    return jnp.concatenate([before, new], axis=1)[:, None]
  blocks = _blocks(jnp.concatenate([before, new], axis=1), window)
  return jnp.concatenate([blocks[:, :-1], blocks[:, 1:]], axis=2)
