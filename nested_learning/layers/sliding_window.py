"""Attention of every token to the last `window` tokens, itself included.

The state is a ring buffer of `window` keys and values, so a stream may have any
length. Keys are stored before rotation, and every block of queries counts its
positions from zero: rotary angles stay exact however long the stream is.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.layers import attention_sinks
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
    sinks: Its first tokens, or None if they do not stay.
  """

  key: jax.Array
  value: jax.Array
  document: jax.Array
  slot: jax.Array
  current: jax.Array
  sinks: attention_sinks.SinkState | None = None


def init_state(
  window: int,
  key_shape: tuple[int, int],
  batch_size: int,
  dtype,
  *,
  num_sinks: int = 0,
) -> WindowState:
  """Returns the state at a stream's start, with every slot empty.

  Args:
    window: Tokens that a query sees, w.
    key_shape: Number of key heads and their width.
    batch_size: Rows b.
    dtype: Type of keys and values.
    num_sinks: First tokens of a document that stay.

  Returns:
    A `WindowState`.
  """
  sinks = None
  if num_sinks:
    sinks = attention_sinks.init_state(num_sinks, key_shape, batch_size, dtype)
  return WindowState(
    key=jnp.zeros((batch_size, window, *key_shape), dtype),
    value=jnp.zeros((batch_size, window, *key_shape), dtype),
    document=jnp.full((batch_size, window), -1, jnp.int32),
    slot=jnp.zeros((batch_size,), jnp.int32),
    current=jnp.zeros((batch_size,), jnp.int32),
    sinks=sinks,
  )


def attend(
  state: WindowState | None,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  window: int,
  rotate: Callable[[jax.Array, jax.Array], jax.Array],
  scoring: dot_product.Scoring,
  num_sinks: int = 0,
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
    rotate: `rotate(x, position)` applies rotary positions.
    scoring: Scale and bound of the scores.
    num_sinks: First tokens of a document that every later query sees, see
      `attention_sinks`.
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
    start = init_state(
      window, key.shape[2:], batch_size, key.dtype, num_sinks=num_sinks
    )
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
  sinks, sink_state = None, None
  if num_sinks:
    sinks, sink_state = attention_sinks.find(
      start.sinks, key, value, reset, count, block_size=size
    )
    sinks = sinks._replace(position=_blocks(sinks.position, size))
  look = _make_look(
    spans[0].shape[2], size, window, rotate, scoring, persistent
  )
  out = _attend_blocks(
    look, _blocks(query, size), _blocks(document, size), spans, sinks
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
    sinks=sink_state,
  )


def _make_look(length, size, window, rotate, scoring, persistent):
  """Makes attention of a block of `size` queries to its span of `length`."""
  # The queries are the last tokens of their span of keys.
  position = jnp.arange(length)
  age = position[-size:, None] - position
  in_window = (age >= 0) & (age < window)

  def look(query, document, key, value, key_document, sinks):
    visible = in_window & (document[..., None] == key_document[:, None])
    apart = []
    if persistent is not None:
      apart.append(dot_product.Apart(query, *persistent))
    if sinks is not None:
      first = jnp.arange(sinks.key.shape[1])
      passed = sinks.position[..., None] - first >= window
      apart.append(
        dot_product.Apart(
          rotate(query, jnp.full((size,), window)),
          sinks.key,
          sinks.value,
          passed,
        )
      )
    query = rotate(query, position[-size:])
    key = rotate(key, position)
    return dot_product.attend(
      query, key, value, visible, scoring=scoring, apart=apart
    )

  return look


def _attend_blocks(look, query, document, spans, sinks):
  """Attends from blocks of queries [b, n, c, h, d] to the keys of their spans.

  Scores one block at a time, and scores it again in the backward pass.
  """
  blocks = query, document, *spans, sinks
  if query.shape[1] == 1:
    return look(*jax.tree.map(lambda x: x[:, 0], blocks))[:, None]
  blocks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), blocks)
  scan = jax.checkpoint(lambda block: look(*block))
  return jnp.moveaxis(jax.lax.map(scan, blocks), 0, 1)


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
