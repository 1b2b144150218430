"""The engine chunk by chunk: equal to the token loop, in matmuls."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import chunk_rule
from nested_learning.memory import interface
from nested_learning.memory import networks
from nested_learning.memory import rows
from nested_learning.memory import rule as rules
from nested_learning.memory import writes

_KEPT_CHUNKS = 32  # up to which the backward pass keeps every chunk's memory


def chunk_scan(
  network: networks.Network,
  rule: interface.Rule,
  initial: Any,
  state: interface.State | None,
  inputs: Any,
  *,
  project: interface.Project,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  write: bool = True,
  starts_chunk: bool = False,
) -> tuple[interface.Result, interface.State]:
  """Reads and writes chunk by chunk: equal to `token_loop`, in matmuls.

  Memory of the backward pass grows with the square root of the number of
  chunks: groups of chunks are recomputed.

  Args:
    network: What the memory is.
    rule: How it is written and read.
    initial: Initial memory per map, [h, ..., out, in].
    state: Where the stream stands. None is a stream's start, and spares the
      bookkeeping of a call in the middle of a chunk.
    inputs: What `project` takes, a pytree of [b, h, t, ...].
    project: Makes the `Feed` of the tokens from the memory itself; None where
      the inputs are the `Feed`.
    reset: bool [b, t], True at a document's first token.
    mask: bool [b, t], False for tokens that are not there.
    write: False reads the memory and leaves it as it is.
    starts_chunk: Whether the state stands between two chunks in every row, and
      the tokens are whole chunks: spares the same bookkeeping.

  Returns:
    The `Result`, and the state after the tokens.
  """
  batch_size = jax.tree.leaves(inputs)[0].shape[0]
  start = state
  if state is None:
    start = interface.init_state(initial, batch_size, momentum=rule.momentum)
  is_aligned = (state is None or starts_chunk) and mask is None
  lay_out = _lay_out_aligned if is_aligned else _lay_out
  chunks, restore = lay_out(
    rule.chunk_size, start.offset, inputs, reset=reset, mask=mask
  )
  if project is None:
    chunks = chunks._replace(
      keys=_make_keys(
        rule,
        chunks.inputs,
        chunks,
        write,
        writes.erases(rule, 'in', initial),
      )
    )
  # A reference per row: the scan's backward pass then sums over no rows.
  reference = rows.broadcast(initial, start.memory)
  body = functools.partial(_chunk, network, rule, reference, project, write)
  if chunks.mask is not None:
    state, result = _scan_groups(body, start, chunks)
  else:  # chunks are whole: a memory at their end is the next one's anchor
    state, result = _scan_groups(body, start._replace(anchor=None), chunks)
    state = state._replace(anchor=state.memory)
  return jax.tree.map(restore, result), state


class _Chunks(NamedTuple):
  """Tokens laid out in chunks, the leading axis."""

  inputs: Any  # [n, b, h, c, ...]
  reset: jax.Array | None  # bool [n, b, c]
  mask: jax.Array | None  # bool [n, b, c], None when every slot is filled
  has_border: jax.Array | None  # bool [n], whether any row has a reset
  keys: '_ChunkKeys | None' = None  # of a static memory, known beforehand

  def marks(self, write: bool) -> tuple[jax.Array | None, jax.Array | None]:
    """Resets, and which tokens write, each [(n,) b, 1, c, 1]."""
    column = lambda x: None if x is None else x[..., None, :, None]
    does_write = None
    if self.mask is not None:
      does_write = self.mask & write
    elif not write:
      size = jax.tree.leaves(self.inputs)[0].shape[-2]
      does_write = jnp.zeros((1, size), bool)
    return column(self.reset), column(does_write)


class _ChunkKeys(NamedTuple):
  """What of a chunk depends on its feed alone."""

  keys: chunk_rule.Keys
  scores: jax.Array | None  # with rule.read 'token'


def _make_keys(rule, feed, chunk, write, erase):
  reset, does_write = chunk.marks(write)
  rates = writes.feed_rates(feed, does_write)
  keys = chunk_rule.make_keys(
    feed.key,
    rates,
    chunk_rule.make_decays(rates, reset, erase_from=rule.erase_from),
    erase=erase,
  )
  scores = None
  if rule.read == 'token':
    scores = chunk_rule.make_scores(keys, feed.query)
  return _ChunkKeys(keys, scores)


def _lay_out_aligned(size, offset, inputs, *, reset, mask):
  """Lays out a stream's start: the last chunk may be partly empty."""
  del mask
  num_tokens = jax.tree.leaves(inputs)[0].shape[2]
  padding = -num_tokens % size
  mask = None
  if padding:
    inputs = jax.tree.map(lambda x: rows.pad_tokens(x, padding, 2), inputs)
    reset = None if reset is None else rows.pad_tokens(reset, padding, 1)
    mask = jnp.arange(num_tokens + padding) < num_tokens
    mask = jnp.broadcast_to(mask, (offset.shape[0], num_tokens + padding))
  chunks = _cut(size, inputs, reset, mask)
  return chunks, lambda x: _join(x)[:, :, :num_tokens]


def _lay_out(size, offset, inputs, *, reset, mask):
  """Lays out a call that starts at any token of a chunk, one row at a time."""
  num_tokens = jax.tree.leaves(inputs)[0].shape[2]
  num_slots = -(-(num_tokens + size - 1) // size) * size
  reset, mask = rows.default_marks(reset, mask, offset.shape[0], num_tokens)
  order, slot, present = rows.to_slots(offset, mask, num_slots)
  inputs = jax.tree.map(lambda x: rows.take(x, order, 2), inputs)
  reset = rows.take(reset & mask, order, 1) & present
  chunks = _cut(size, inputs, reset, present)
  return chunks, lambda x: rows.take(_join(x), slot, 2)


def _cut(size, inputs, reset, mask):

  def cut(x, axis):  # [..., t, ...] -> [n, ..., c, ...]
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  inputs = jax.tree.map(lambda x: cut(x, 2), inputs)
  mask = None if mask is None else cut(mask, 1)
  if reset is None:
    return _Chunks(inputs, None, mask, None)
  reset = cut(reset, 1)
  return _Chunks(inputs, reset, mask, jnp.any(reset, axis=(1, 2)))


def _join(x):  # [n, b, h, c, ...] -> [b, h, n c, ...]
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _chunk(network, rule, initial, project, write, state, chunk):
  """One chunk: the body of the scan; `initial` has a copy per row."""
  anchor = rule.weights(state.memory)
  if chunk.mask is not None:
    anchor = rows.where(state.offset == 0, anchor, state.anchor)
  seen = writes.evaluate(network, rule, anchor, chunk.inputs, project)
  reset, does_write = chunk.marks(write)
  if reset is not None:  # after a border the initial memory is the anchor
    seen = jax.lax.cond(
      chunk.has_border,
      lambda: rows.where_tokens(
        jnp.cumsum(reset, axis=2) > 0,
        writes.evaluate(
          network, rule, rule.weights(initial), chunk.inputs, project
        ),
        seen,
      ),
      lambda: seen,
    )
  first = chunk.keys or _make_keys(
    rule, seen.feed, chunk, write, writes.erases(rule, 'in', initial)
  )
  solved = {}
  for name, weights in state.memory.items():
    rates = writes.map_rates(rule, name, seen, does_write)
    keys = first.keys
    if name != 'in':
      keys = chunk_rule.make_keys(
        seen.inputs[name],
        rates,
        writes.per_map(keys.decays, name),
        erase=writes.erases(rule, name, initial),
      )
    solved[name] = chunk_rule.solve_chunk(
      rules.Carry(weights, state.trace and state.trace[name]),
      writes.reference(rule, initial[name]),
      initial[name],
      keys,
      seen.deltas[name],
      rates,
      # The anchor is the memory where chunks are whole.
      read=seen.outputs[name] if chunk.mask is None else None,
    )
  read = seen.read
  if rule.read == 'token':

    def linear(name, q):
      scores = first.scores if name == 'in' else None
      return chunk_rule.read_chunk(solved[name], q, scores)

    read = writes.read_vector(network, linear, seen.feed.query)
  ended = {name: chunk_rule.end_chunk(chunk) for name, chunk in solved.items()}
  memory = {name: carry.weights for name, carry in ended.items()}
  trace = state.trace and {name: carry.trace for name, carry in ended.items()}
  bounded = writes.bound(rule, initial, memory, trace)
  if chunk.mask is None:
    if write:
      memory, trace = bounded
    state = interface.State(memory, None, trace, state.offset)
  else:
    offset = state.offset + jnp.sum(chunk.mask, axis=1, dtype=jnp.int32)
    ends = offset == rule.chunk_size
    memory, trace = rows.where(ends & write, bounded, (memory, trace))
    if chunk.reset is not None:  # the anchor of what is left of this chunk
      anchor = rows.where(
        jnp.any(chunk.reset, axis=1),
        rule.weights(initial),
        anchor,
      )
    state = interface.State(memory, anchor, trace, jnp.where(ends, 0, offset))
  return state, writes.result(rule, read, seen)


def _scan_groups(body, state, chunks):
  """Scans with a backward pass that keeps memories of about 2 sqrt(n) chunks.

  Of each chunk only the memory at its start is kept, and the rest computed
  again; with more than `_KEPT_CHUNKS`, first those of a group of chunks.
  """
  body = jax.checkpoint(body, prevent_cse=False)
  num_chunks = jax.tree.leaves(chunks)[0].shape[0]
  if num_chunks <= _KEPT_CHUNKS:
    return jax.lax.scan(body, state, chunks)
  group = math.isqrt(num_chunks)
  whole = num_chunks - num_chunks % group
  scan = jax.checkpoint(
    lambda state, xs: jax.lax.scan(body, state, xs), prevent_cse=False
  )
  split = lambda x: x[:whole].reshape(-1, group, *x.shape[1:])
  state, result = jax.lax.scan(scan, state, jax.tree.map(split, chunks))
  result = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result)
  if whole == num_chunks:
    return state, result
  state, last = scan(state, jax.tree.map(lambda x: x[whole:], chunks))
  join = lambda a, b: jnp.concatenate([a, b])
  return state, jax.tree.map(join, result, last)
