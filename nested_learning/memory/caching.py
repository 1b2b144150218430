r"""Memories of a stream's earlier segments, read beside the one that learns.

A stream is cut into segments, counted from its start. The memory at the end of
each is kept, and with M^i those of the last segments of the token's document,
M_t the memory that is written, and q_t its query, token t reads

.. math::
   y_t = \gamma_t M_t(q_t) + \sum_i \gamma_t^i M^i(q_t), \qquad
   \gamma_t = softmax(u_t \cdot m_t, u_t \cdot m^1, u_t \cdot m^2, ...)

where m^i is the mean of segment i's keys, and m_t the mean of those of the
token's own segment up to it. This is Memory Caching's gated residual memory,
whose memory goes on learning after it was kept (their checkpoints).

What it leaves open is settled thus: u and m are of a head, and m is a mean of
keys, not of the layer's inputs; the segment that is being read has the mean of
what was read of it, which no token sees ahead of; a border of documents empties
the cache and starts the mean again, while segments are still counted from the
stream's start. In print the cache grows with the stream. Here it holds the last
`num_segments` segments, which bounds the state: (num_segments + 1) times that
of the memory, whatever the stream's length.

References:
  Behrouz et al., Memory Caching, arXiv:2602.24281, 2026, section 3 (gated
  residual memory).
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import capacity
from nested_learning.memory import interface
from nested_learning.memory import networks
from nested_learning.memory import pieces
from nested_learning.memory import rows
from nested_learning.memory import writes


class Cache(NamedTuple):
  """What is kept of earlier segments; n of them, the oldest first.

  Attributes:
    memory: At each segment's end, per map [b, h, n, ..., out, in].
    mean: Of each segment's keys, [b, h, n, d].
    count: int32 [b], how many of them, the last ones, are of this document.
    total: Sum of the keys of the segment so far, in this document, [b, h, d].
    num_summed: int32 [b], how many keys that is.
    offset: int32 [b], tokens of the segment so far.
  """

  memory: Any
  mean: jax.Array
  count: jax.Array
  total: jax.Array
  num_summed: jax.Array
  offset: jax.Array


def init_cache(initial: Any, batch_size: int, *, num_segments: int) -> Cache:
  """The cache at a stream's start: nothing.

  Args:
    initial: Initial memory per map, [h, ..., out, in].
    batch_size: Rows b.
    num_segments: How many segments it will hold, n.

  Returns:
    A `Cache`.
  """

  def empty(w):
    return jnp.zeros(
      (batch_size, w.shape[0], num_segments, *w.shape[1:]), w.dtype
    )

  heads, _, dim = initial['in'].shape
  zeros = functools.partial(jnp.zeros, dtype=initial['in'].dtype)
  none = jnp.zeros((batch_size,), jnp.int32)
  return Cache(
    memory=jax.tree.map(empty, initial),
    mean=zeros((batch_size, heads, num_segments, dim)),
    count=none,
    total=zeros((batch_size, heads, dim)),
    num_summed=none,
    offset=none,
  )


# Runs the engine: `call(state, feed, reset, mask) -> (Result, State)`. Without
# a mask, the tokens are whole chunks or a single token.
Call = Callable[
  [interface.State, interface.Feed, jax.Array | None, jax.Array | None],
  tuple[interface.Result, interface.State],
]


def scan_segments(
  call: Call,
  network: networks.Network,
  rule: interface.Rule,
  state: interface.State,
  cache: Cache,
  feed: interface.Feed,
  ask: jax.Array,
  *,
  segment_size: int,
  is_start: bool = False,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  write: bool = True,
) -> tuple[jax.Array, interface.State, Cache]:
  """Reads a memory and what is kept of it, and keeps it where a segment ends.

  The backward pass keeps the memory at every segment's end.

  Args:
    call: The engine, see `Call`.
    network: What the memory is.
    rule: How it is written and read.
    state: Of the memory that learns.
    cache: Of its earlier segments, n of them.
    feed: What the tokens write and read with, [b, h, t, ...].
    ask: What they ask segments with, u, [b, h, t, d].
    segment_size: Tokens of a segment, a multiple of the rule's chunks.
    is_start: Whether all rows stand at a stream's start, which spares the
      bookkeeping of a call in the middle of a segment.
    reset: bool [b, t], True at a document's first token.
    mask: bool [b, t], False for tokens that are not there.
    write: False reads, and leaves the memory and the cache as they are.

  Returns:
    The reads [b, h, t, d], and the state and the cache after the tokens.
  """
  slots, restore = _lay_out(
    segment_size, cache.offset, (feed, ask), reset, mask, is_start
  )
  state, (own, ends) = _learn(call, state, slots)
  sums, counts = _sum_keys(slots, cache)
  means = sums / jnp.maximum(counts, 1.0)
  carried = _carried(cache)
  kept = carried
  if write:  # those that this call adds, behind those of earlier ones
    ends = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), ends)
    added = _Kept(ends, means[:, :, :, -1], slots.document[..., -1])
    kept = _Kept(
      *(
        jax.tree.map(
          lambda a, b, axis=axis: jnp.concatenate([a, b], axis), a, b
        )
        for a, b, axis in zip(carried, added, _Kept(2, 2, 1), strict=True)
      )
    )
  read = functools.partial(_read, network, rule)
  reads = _over_segments(read, slots, own, means, carried, kept)
  num_read = jnp.sum(slots.present, axis=(1, 2), dtype=jnp.int32)
  cache = _advance(
    cache,
    slots,
    kept,
    sums,
    counts,
    cache.offset + num_read,
    segment_size,
    carried if own.shape[0] == 1 else None,
  )
  return restore(reads), state, cache


class _Slots(NamedTuple):
  """Tokens laid out in s segments of c slots."""

  feed: interface.Feed  # [s, b, h, c, ...]
  ask: jax.Array  # [s, b, h, c, d]
  reset: jax.Array | None  # bool [s, b, c]
  mask: jax.Array | None  # the same; None when every slot is filled
  present: jax.Array  # bool [b, s, c]
  document: jax.Array  # int [b, s, c], borders since the call's start


class _Kept(NamedTuple):
  """Memories at ends of segments, with the means of the segments' keys."""

  memory: Any  # [b, h, n, ..., out, in]
  mean: jax.Array  # [b, h, n, d]
  document: jax.Array  # int [b, n] as of the slots, -1 where there is none


def _lay_out(size, offset, tokens, reset, mask, is_start):
  """Lays out a call that starts at any token of a segment."""
  if tokens[1].shape[2] == 1:
    return _slots(pieces.cut(1, tokens, reset, mask)), pieces.join
  laid, restore = pieces.lay_out(
    size,
    offset,
    tokens,
    is_aligned=is_start and mask is None,
    reset=reset,
    mask=mask,
  )
  return _slots(laid), restore


def _slots(laid):
  (feed, ask), reset, mask = laid
  num_segments, batch_size, _, size = ask.shape[:4]
  shape = (batch_size, num_segments, size)
  present, document = jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32)
  if mask is not None:
    present = jnp.moveaxis(mask, 0, 1)
  if reset is not None:
    borders = jnp.moveaxis(reset, 0, 1) & present
    document = jnp.cumsum(borders.reshape(batch_size, -1), axis=1)
    document = document.reshape(shape)
  return _Slots(feed, ask, reset, mask, present, document)


def _learn(call, state, slots):
  """The memory's own reads and its weights at the end of every segment."""

  def body(state, tokens):
    result, state = call(state, *tokens)
    return state, (result.read, state.memory)

  body = jax.checkpoint(body, prevent_cse=False)
  return jax.lax.scan(body, state, (slots.feed, slots.reset, slots.mask))


def _sum_keys(slots, cache):
  """Sums [b, h, s, c, d] of keys up to each token; their number, alike.

  Of the token's segment and document alone.
  """
  keys = jnp.moveaxis(slots.feed.key, 0, 2)
  size = keys.shape[3]
  same = slots.document[..., :, None] == slots.document[..., None, :]
  same &= jnp.tril(jnp.ones((size, size), bool)) & slots.present[..., None, :]
  same = same[:, None].astype(keys.dtype)
  goes_on = (slots.document == 0) & (jnp.arange(keys.shape[2]) == 0)[:, None]
  goes_on = goes_on[:, None, ..., None].astype(keys.dtype)
  per_row = lambda x: x[:, None, None, None, None].astype(keys.dtype)
  counts = jnp.sum(same, axis=-1, keepdims=True)
  return (
    jnp.matmul(same, keys) + goes_on * cache.total[:, :, None, None],
    counts + goes_on * per_row(cache.num_summed),
  )


def _carried(cache):
  num_segments = cache.mean.shape[2]
  exists = jnp.arange(num_segments) >= num_segments - cache.count[:, None]
  return _Kept(cache.memory, cache.mean, jnp.where(exists, 0, -1))


def _over_segments(read, slots, own, means, carried, kept):
  """Reads of all segments [s, b, h, c, d], each of the n that end before it."""
  num_segments, num_kept = own.shape[0], carried.mean.shape[2]
  is_fixed = num_segments == 1 or kept is carried

  def segment(tokens):
    index, own, query, active, ask, mean, document = tokens
    before = carried
    if not is_fixed:
      cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(
        x, index, num_kept, axis
      )
      before = _Kept(
        jax.tree.map(lambda x: cut(x, 2), kept.memory),
        cut(kept.mean, 2),
        cut(kept.document, 1),
      )
    return read(before, own, query, active, ask, mean, document)

  return jax.lax.map(
    jax.checkpoint(segment, prevent_cse=False),
    (
      jnp.arange(num_segments),
      own,
      slots.feed.query,
      slots.feed.active,
      slots.ask,
      jnp.moveaxis(means, 2, 0),
      jnp.moveaxis(slots.document, 1, 0),
    ),
  )


def _read(network, rule, kept, own, query, active, ask, mean, document):
  """The gated reads [b, h, c, d] of the tokens of one segment."""

  def read_one(memory):
    linear = networks.linear_of(rule.weights(memory))
    linear = capacity.gate(network, linear, active)
    return writes.read_vector(network, linear, query)

  reads = jax.vmap(read_one, in_axes=2)(kept.memory)
  scores = jnp.einsum('bhtd,bhnd->bhtn', ask, kept.mean)
  is_ours = kept.document[:, None, None] == document[:, None, :, None]
  scores = jnp.where(is_ours, scores, -jnp.inf)
  own_score = jnp.sum(ask * mean, axis=-1, keepdims=True)
  gates = jax.nn.softmax(jnp.concatenate([scores, own_score], -1), axis=-1)
  others = jnp.einsum('bhtn,nbhtd->bhtd', gates[..., :-1], reads)
  return gates[..., -1:] * own + others


def _advance(cache, slots, kept, sums, counts, num_read, size, carried):
  """The cache after the tokens; `num_read` [b] with those of earlier calls."""
  num_kept, num_slots = cache.mean.shape[2], slots.present.shape[1]
  ended = num_read // size
  added = ended * (kept.mean.shape[2] > num_kept)  # none with writes off
  index = added[:, None] + jnp.arange(num_kept)

  def shift():
    take = lambda x: rows.take(x, index, 2)
    return jax.tree.map(take, kept.memory), take(kept.mean)

  if carried is None:
    memory, mean = shift()
  else:  # a short call rarely ends a segment
    memory, mean = jax.lax.cond(
      jnp.any(added > 0), shift, lambda: (carried.memory, carried.mean)
    )
  last = slots.document[:, -1, -1]
  is_ours = rows.take(kept.document, index, 1) == last[:, None]
  # Of the segment that goes on; of none where the last slot was a segment's.
  goes_on = ended < num_slots
  at = jnp.minimum(ended, num_slots - 1)[:, None]
  total = rows.take(sums[:, :, :, -1], at, 2)[:, :, 0]
  num_summed = rows.take(counts[:, 0, :, -1, 0], at, 1)[:, 0]
  return Cache(
    memory=memory,
    mean=mean,
    count=jnp.sum(is_ours, axis=1, dtype=jnp.int32),
    total=jnp.where(goes_on[:, None, None], total, 0.0),
    num_summed=jnp.where(goes_on, num_summed, 0.0).astype(jnp.int32),
    offset=num_read % size,
  )
