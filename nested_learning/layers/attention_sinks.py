"""Attention sinks: the first tokens of a document, seen from beyond a window.

Pretrained transformers give much of their attention to the first tokens, and
read badly once a window has passed them. So the keys and values of the first n
tokens of a document stay. A query sees those of them that its window has
passed, each at the distance of the window's length.

References:
  Xiao et al., Efficient Streaming Language Models with Attention Sinks,
    arXiv:2309.17453, 2023, section 3.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import layout

_LONGEST = 2**30  # counts of tokens stop here, below the largest int32


class SinkState(NamedTuple):
  """First tokens of the document that is being read.

  Attributes:
    key: [b, n, kv heads, d], not rotated.
    value: [b, n, kv heads, d].
    position: int32 [b], tokens of the document so far; those above n are not
      held.
  """

  key: jax.Array
  value: jax.Array
  position: jax.Array


class Sinks(NamedTuple):
  """Sinks of a call, for each block of its queries.

  Attributes:
    key: [b, blocks, n, kv heads, d], not rotated.
    value: [b, blocks, n, kv heads, d].
    position: int32 [b, t], place of each token in its document, from 0.
  """

  key: jax.Array
  value: jax.Array
  position: jax.Array


def init_state(
  num_sinks: int, key_shape: tuple[int, int], batch_size: int, dtype
) -> SinkState:
  """Returns the state at a stream's start.

  Args:
    num_sinks: Tokens that stay, n.
    key_shape: Number of key heads and their width.
    batch_size: Rows b.
    dtype: Type of keys and values.

  Returns:
    A `SinkState`.
  """
  shape = batch_size, num_sinks, *key_shape
  return SinkState(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    position=jnp.zeros((batch_size,), jnp.int32),
  )


def find(
  state: SinkState,
  key: jax.Array,
  value: jax.Array,
  reset: jax.Array | None,
  count: jax.Array,
  *,
  block_size: int,
) -> tuple[Sinks, SinkState]:
  """Finds the sinks of every block of queries, and those after the call.

  A window that is at least as long as a block passes the first tokens of one
  document in it alone: that of the token before the block.

  Args:
    state: Sinks at the start of the call.
    key: [b, t, kv heads, d], not rotated.
    value: [b, t, kv heads, d].
    reset: bool [b, t], True at a document's first token, or None.
    count: int32 [b], tokens of each row; those after them are padding.
    block_size: Queries of a block, at most the window.

  Returns:
    The sinks of the blocks, and the state after the tokens.
  """
  batch_size, num_tokens = key.shape[:2]
  num_sinks = state.key.shape[1]
  place = jnp.arange(num_tokens)
  started = jnp.full((batch_size, num_tokens), -1, jnp.int32)
  if reset is not None:
    started = jax.lax.cummax(jnp.where(reset, place, -1), axis=1)
  # Where the document of each token began in this call; -1 for before it. One
  # more column stands for the token before the call.
  started = jnp.pad(started, ((0, 0), (1, 0)), constant_values=-1)

  def position_at(started, place):
    before = state.position[:, None] + place
    return jnp.minimum(
      jnp.where(started < 0, before, place - started), _LONGEST
    )

  together = tuple(
    jnp.concatenate(pair, axis=1)
    for pair in ((state.key, key), (state.value, value))
  )
  index = jnp.arange(num_sinks)
  held = jnp.minimum(state.position, num_sinks)[:, None, None]

  def take(started):
    """Takes the first n tokens of documents; started [b, blocks]."""
    started = started[..., None]
    in_call = num_sinks + jnp.where(started < 0, index - held, started + index)
    kept = (started < 0) & (index < held)
    where = jnp.where(kept, index, in_call)
    # Tokens that are not there yet are hidden by their position.
    where = jnp.minimum(where, together[0].shape[1] - 1)
    flat = where.reshape(batch_size, -1)
    return (
      layout.take(x, flat, 1).reshape(*where.shape, *x.shape[2:])
      for x in together
    )

  block_key, block_value = take(started[:, :num_tokens:block_size])
  sinks = Sinks(
    block_key, block_value, position_at(started[:, 1:], place).astype(jnp.int32)
  )
  last = layout.take(started, count[:, None], 1)
  new_key, new_value = (x[:, 0] for x in take(last))
  position = position_at(last, count[:, None])[:, 0].astype(jnp.int32)
  return sinks, SinkState(new_key, new_value, position)
