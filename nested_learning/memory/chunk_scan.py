"""The engine chunk by chunk: equal to the token loop, in matmuls."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import sharding
from nested_learning.memory import chunk_rule
from nested_learning.memory import interface
from nested_learning.memory import local
from nested_learning.memory import networks
from nested_learning.memory import orthogonal
from nested_learning.memory import pieces
from nested_learning.memory import rows
from nested_learning.memory import rule as rules
from nested_learning.memory import tails
from nested_learning.memory import unwritten
from nested_learning.memory import writes

_KEPT_CHUNKS = 512  # up to which the backward pass keeps every chunk's memory


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

  The backward pass keeps the memory at every chunk's start; of very many
  chunks, of about 2 sqrt(n) alone, the groups between them computed again.

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
    start = interface.init_state(
      initial, batch_size, momentum=rule.momentum, window=rule.window
    )
  is_aligned = (state is None or starts_chunk) and mask is None
  chunks, restore = pieces.lay_out(
    rule.chunk_size,
    start.offset,
    inputs,
    is_aligned=is_aligned,
    reset=reset,
    mask=mask,
  )
  chunks = _Chunks(*chunks, _has_border(chunks.reset))
  tail = None
  if rule.window > 1 or rule.step == 'orthogonal':
    chunks, tail = _lay_out_windows(rule, initial, start, chunks, write)
    start = start._replace(tail=None)
  if write and project is None and rule.step == 'gradient':
    keys = _make_keys(rule, chunks.inputs, chunks, initial)
    chunks = chunks._replace(keys=keys)
  # A reference per row: the scan's backward pass then sums over no rows.
  reference = sharding.pin_heads(rows.broadcast(initial, start.memory))
  body = functools.partial(_chunk, network, rule, reference, project, write)
  if chunks.mask is None:
    # Chunks are whole: a memory at their end is the next one's anchor.
    start = start._replace(anchor=None)
  state, result = _scan_written(body, rule, initial, start, chunks)
  if chunks.mask is None:
    state = state._replace(anchor=state.memory)
  if rule.window > 1:
    state = state._replace(tail=tail)
  return jax.tree.map(restore, result), state


class _Chunks(NamedTuple):
  """Tokens laid out in chunks, the leading axis."""

  inputs: Any  # [n, b, h, c, ...]
  reset: jax.Array | None  # bool [n, b, c]
  mask: jax.Array | None  # bool [n, b, c], None when every slot is filled
  has_border: jax.Array | None  # bool [n], whether any row has a reset
  keys: '_ChunkKeys | None' = None  # of a static memory, known beforehand
  window: tails.Window | None = None  # of the tokens, where steps sum errors

  def marks(self) -> tuple[jax.Array | None, jax.Array | None]:
    """Resets, and which tokens write, each [(n,) b, 1, c, 1]."""
    column = lambda x: None if x is None else x[..., None, :, None]
    return column(self.reset), column(self.mask)


class _ChunkKeys(NamedTuple):
  """What of a chunk depends on its feed alone."""

  keys: chunk_rule.Keys
  scores: jax.Array | None  # with rule.read 'token'


def _make_keys(rule, feed, chunk, maps):
  reset, does_write = chunk.marks()
  rates = writes.feed_rates(feed, does_write)
  decays = chunk_rule.make_decays(rates, reset, erase_from=rule.erase_from)
  key = feed.key
  if chunk.window is not None:
    decays = chunk_rule.sum_windows(decays, chunk.window.band)
    key = chunk.window.key
  keys = chunk_rule.make_keys(
    key, rates, decays, erase=writes.erases(rule, 'in', maps)
  )
  scores = None
  if rule.read == 'token' and writes.learns(rule, 'in', maps):
    scores = chunk_rule.make_scores(keys, feed.query)
  return _ChunkKeys(keys, scores)


def _has_border(reset):
  return None if reset is None else jnp.any(reset, axis=(1, 2))


def _chunk(network, rule, initial, project, write, state, chunk):
  """One chunk: the body of the scan; `initial` has a copy per row."""
  anchor = rule.weights(state.memory)
  if chunk.mask is not None:
    anchor = rows.where(state.offset == 0, anchor, state.anchor)
  see = functools.partial(_see, network, rule, anchor, initial, project, chunk)
  feed, read = chunk.inputs, None
  if not write:
    if project is not None or rule.read == 'chunk':
      seen = see()
      feed = feed if project is None else seen.feed
      read = seen.read
    linear, ended = unwritten.solve(
      rule, initial, state, chunk.reset, chunk.has_border
    )
  elif rule.errors == 'propagated':
    feed, read, linear, ended = _solve(see, rule, initial, state, chunk)
  else:
    linear, ended = _solve_local(network, rule, initial, state, chunk)
  if rule.read == 'token':
    read = writes.read_vector(network, linear, feed.query)
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
  return state, writes.result(rule, read, feed)


def _see(network, rule, anchor, initial, project, chunk):
  """The tokens whose errors a chunk has, as its anchor sees them."""
  inputs = chunk.inputs
  if chunk.window is not None:
    inputs = interface.Feed(chunk.window.key, chunk.window.value, None, None)
  seen = writes.evaluate(network, rule, anchor, inputs, project)
  if chunk.reset is None:
    return seen

  # What the other branch would keep for the backward pass it has to fill, too.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def see_again():  # after a border the initial memory is the anchor
    fresh = jnp.cumsum(chunk.reset, axis=1) > 0
    if chunk.window is not None:  # tokens before the chunk are of its anchor
      past = chunk.window.key.shape[2] - fresh.shape[1]
      fresh = jnp.pad(fresh, ((0, 0), (past, 0)))
    initially = writes.evaluate(
      network, rule, rule.weights(initial), inputs, project
    )
    return rows.where_tokens(fresh[:, None, :, None], initially, seen)

  pin = sharding.pin_heads
  return pin(
    jax.lax.cond(chunk.has_border, lambda: pin(see_again()), lambda: pin(seen))
  )


def _solve(see, rule, initial, state, chunk):
  """Feed, anchor's read, what each token's maps give, and maps at the end."""
  seen = see()
  feed = seen.feed if chunk.window is None else chunk.inputs
  reset, does_write = chunk.marks()
  if rule.step == 'orthogonal':
    rates = writes.feed_rates(feed, does_write)
    linear, ended = orthogonal.solve(
      rule, state, initial, seen, rates, chunk.window, reset
    )
    return feed, seen.read, linear, ended
  first = chunk.keys or _make_keys(rule, feed, chunk, initial)
  solved = {}
  for name, weights in state.memory.items():
    carry = rules.Carry(weights, state.trace and state.trace[name])
    if not writes.learns(rule, name, initial):
      solved[name] = carry
      continue
    keys = first.keys
    if chunk.window is None:
      rates = writes.map_rates(rule, name, seen, does_write)
    else:  # decays have who writes
      rates = rules.Rates(chunk.window.weight, feed.retention)
      rates = writes.per_map(rates, name)
    if name != 'in':
      keys = chunk_rule.make_keys(
        seen.inputs[name],
        rates,
        writes.per_map(keys.decays, name),
        erase=writes.erases(rule, name, initial),
      )
    solved[name] = chunk_rule.solve_chunk(
      carry,
      writes.reference(rule, initial[name]),
      initial[name],
      keys,
      seen.deltas[name],
      rates,
      # The anchor is the memory where chunks are whole.
      read=seen.outputs[name] if chunk.mask is None else None,
    )
  linear = _token_linear(solved, first.scores)
  return feed, seen.read, linear, _end(solved)


def _solve_local(network, rule, initial, state, chunk):
  """The last two of `_solve` where every map has errors of its own."""
  _, does_write = chunk.marks()
  solved = local.solve(
    network,
    rule,
    initial,
    state.memory,
    chunk.inputs,
    chunk.keys.keys,
    does_write,
  )
  return _token_linear(solved, chunk.keys.scores), _end(solved)


def _token_linear(solved, scores):
  """What each token's own maps give."""

  def linear(name, q):
    if isinstance(solved[name], rules.Carry):  # nobody writes it
      return networks.apply_map(solved[name].weights, q)
    return chunk_rule.read_chunk(
      solved[name], q, scores if name == 'in' else None
    )

  return linear


def _end(solved):
  return {
    name: chunk
    if isinstance(chunk, rules.Carry)
    else chunk_rule.end_chunk(chunk)
    for name, chunk in solved.items()
  }


def _lay_out_windows(rule, initial, state, chunks, write):
  """The chunks with the windows of their tokens, and the tail after them."""
  feed, tail = chunks.inputs, state.tail
  tokens = jax.tree.map(
    pieces.join, (feed.key, feed.value, writes.error_weights(rule, feed))
  )
  if tail is None:
    tail = tails.init_tail(initial, tokens[0].shape[0], rule.window)
  in_slots = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
  valid = jnp.ones((*tokens[0].shape[:1], tokens[0].shape[2]), bool)
  if chunks.mask is not None:
    valid = in_slots(chunks.mask)
  window, tail = tails.lay_out(
    tail,
    tails.Tail(*tokens, valid[:, None, :, None]),
    state.offset,
    rule.chunk_size,
    reset=None if chunks.reset is None else in_slots(chunks.reset),
    write=write,
  )
  return chunks._replace(window=window), tail


def _scan_written(body, rule, initial, state, chunks):
  """Scans with the maps that nobody writes outside of what the scan carries.

  The backward pass then keeps no copy of them per chunk.
  """
  is_written = lambda name: writes.learns(rule, name, initial)
  if all(map(is_written, initial)):
    return _scan_groups(body, state, chunks)
  fields = ('memory', 'anchor', 'trace')
  fixed = {field: getattr(state, field) or {} for field in fields}
  fixed = {
    field: {n: x for n, x in maps.items() if not is_written(n)}
    for field, maps in fixed.items()
  }

  def drop(state):
    maps = {field: getattr(state, field) for field in fields}
    return state._replace(
      **{
        field: x and {n: y for n, y in x.items() if is_written(n)}
        for field, x in maps.items()
      }
    )

  def add(state):
    maps = {field: getattr(state, field) for field in fields}
    return state._replace(
      **{
        field: x and {n: (x | fixed[field])[n] for n in initial}
        for field, x in maps.items()
      }
    )

  def body_of_written(state, chunk):
    state, result = body(add(state), chunk)
    return drop(state), result

  state, result = _scan_groups(body_of_written, drop(state), chunks)
  return add(state), result


def _scan_groups(body, state, chunks):
  """Scans with a backward pass that computes every chunk again.

  Of each chunk only the memory at its start is kept: little beside what its
  tokens have in other layers. With more than `_KEPT_CHUNKS` these are kept for
  every sqrt(n)-th chunk, and those of a group computed again first.
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
