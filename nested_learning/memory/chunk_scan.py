"""The engine chunk by chunk: equal to the token loop, in matmuls."""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import sharding
from nested_learning.memory import chunked
from nested_learning.memory import decays as decays_lib
from nested_learning.memory import layout
from nested_learning.memory import networks
from nested_learning.memory import rule as rules
from nested_learning.memory import token_loop
from nested_learning.memory import writes

# Up to this number the backward pass keeps the memory of every chunk.
_KEPT_CHUNKS = 16


def scan_chunks(
  network: networks.Network,
  rule: rules.Rule,
  initial: Any,
  state: rules.State | None,
  inputs: Any,
  *,
  project: rules.Project,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  write: bool = True,
  starts_chunk: bool = False,
) -> tuple[rules.Result, rules.State]:
  """Reads and writes chunk by chunk: equal to `scan_tokens`, in matmuls.

  The backward pass keeps the memory at every chunk's start, or at about
  2 sqrt(n) of them if there are very many, and recomputes the rest.

  Args:
    network: The memory's network.
    rule: How it is written and read.
    initial: Initial memory per map, [h, ..., out, in].
    state: From `init_state` or an earlier call. None is a stream's start, and
      spares the bookkeeping of a call inside a chunk.
    inputs: Inputs of `project`, a pytree of [b, h, t, ...].
    project: Makes the `WriteInputs` of the tokens from the memory itself; None
      where the inputs are the `WriteInputs`.
    reset: bool [b, t], True at a document's first token.
    mask: bool [b, t], False for tokens that are not there.
    write: False reads the memory and leaves it as it is.
    starts_chunk: Whether the state stands between two chunks in every row, and
      the tokens are whole chunks: spares the same bookkeeping.

  Returns:
    The `Result`, and the state after the tokens.
  """
  batch_size, _, num_tokens = jax.tree.leaves(inputs)[0].shape[:3]
  is_aligned = (state is None or starts_chunk) and mask is None
  if state is None:
    state = rules.init_state(rule, initial, batch_size)
  if not num_tokens:  # no chunk to lay out
    return token_loop.scan_tokens(
      network, rule, initial, state, inputs, project=project
    )
  chunks, restore = layout.lay_out(
    rule.chunk_size,
    state.offset,
    inputs,
    is_aligned=is_aligned,
    reset=reset,
    mask=mask,
  )
  extra = state.extra
  if rule.extension is not None:
    known, extra = rule.extension.prepare(
      rule, initial, state, chunks, write=write
    )
    chunks = chunks._replace(known=known)
  elif write and project is None:
    # Keys of a static memory are known: all chunks' systems invert at once.
    known = _make_keys(rule, chunks.inputs, chunks, initial)
    chunks = chunks._replace(known=known)
  # One reference per row: the scan's backward pass then sums over no rows.
  reference = sharding.pin_heads(
    jax.tree.map(
      lambda w, row: jnp.broadcast_to(w, row.shape), initial, state.memory
    )
  )
  body = functools.partial(_chunk, network, rule, reference, project, write)
  state = state._replace(extra=None)
  if chunks.mask is None:
    # Whole chunks: the memory at the end of one is the anchor of the next.
    state = state._replace(anchor=None)
  state, result = _scan_written(body, rule, initial, state, chunks)
  if chunks.mask is None:
    state = state._replace(anchor=state.memory)
  return jax.tree.map(restore, result), state._replace(extra=extra)


def _chunk(network, rule, initial, project, write, state, chunk):
  """The body of the scan: one chunk; `initial` has a copy per row."""
  anchor = rule.weights(state.memory)
  if chunk.mask is not None:
    anchor = layout.where(state.offset == 0, anchor, state.anchor)
  solve = _solve if write else _solve_unwritten
  if write and rule.extension is not None:
    solve = _solve_extended
  token, read, linear, carries = solve(
    network, rule, initial, project, state, anchor, chunk
  )
  if rule.read == 'token':
    read = writes.read_vector(network, linear, token.query)
  state = _end_chunk(rule, initial, state, anchor, carries, chunk, write)
  return state, writes.result(rule, read, token)


def _end_chunk(rule, initial, state, anchor, carries, chunk, write):
  """Returns the state after the chunk's last token."""
  memory = {name: carry.weights for name, carry in carries.items()}
  trace = state.trace and {name: carry.trace for name, carry in carries.items()}
  bounded = writes.bound(rule, initial, memory, trace)
  if chunk.mask is None:
    if write:
      memory, trace = bounded
    return rules.State(memory, None, trace, state.offset)
  offset = state.offset + jnp.sum(chunk.mask, axis=1, dtype=jnp.int32)
  ends = offset == rule.chunk_size
  memory, trace = layout.where(ends & write, bounded, (memory, trace))
  if chunk.reset is not None:  # the anchor of the rest of this chunk
    anchor = layout.where(
      jnp.any(chunk.reset, axis=1), rule.weights(initial), anchor
    )
  return rules.State(memory, anchor, trace, jnp.where(ends, 0, offset))


class _Keys(NamedTuple):
  """The part of a chunk that depends on its `WriteInputs` alone."""

  keys: chunked.Keys  # of the map that reads the key
  scores: jax.Array | None  # with rule.read 'token'


def _make_keys(rule, token, chunk, maps):
  reset, does_write = chunk.columns()
  rates = writes.token_rates(token, does_write)
  decays = decays_lib.make_decays(rates, reset, erase_from=rule.erase_from)
  erase = writes.erases(rule, 'in', maps)
  keys = chunked.make_keys(token.key, rates, decays, erase=erase)
  scores = None
  if rule.read == 'token' and writes.learns(rule, 'in', maps):
    scores = chunked.make_scores(keys, token.query)
  return _Keys(keys, scores)


def _evaluate(network, rule, initial, project, anchor, chunk):
  """Evaluates a chunk's tokens with the anchor of their document."""
  fresh = None if chunk.reset is None else jnp.cumsum(chunk.reset, axis=1) > 0
  return writes.evaluate_documents(
    network,
    rule,
    anchor,
    initial,
    chunk.inputs,
    project,
    fresh,
    chunk.has_border,
  )


def _solve(network, rule, initial, project, state, anchor, chunk):
  """Returns tokens, anchor's read, each token's `linear`, maps at the end."""
  errors = _evaluate(network, rule, initial, project, anchor, chunk)
  first = chunk.known or _make_keys(rule, errors.token, chunk, initial)
  _, does_write = chunk.columns()
  solved = {}
  for name, weights in state.memory.items():
    carry = rules.Carry(weights, state.trace and state.trace[name])
    if not writes.learns(rule, name, initial):
      solved[name] = carry
      continue
    keys = first.keys
    rates = writes.map_rates(rule, name, errors, does_write)
    if name != 'in':
      keys = chunked.make_keys(
        errors.inputs[name],
        rates,
        writes.per_map(keys.decays, name),
        erase=writes.erases(rule, name, initial),
      )
    solved[name] = chunked.solve_chunk(
      carry,
      writes.reference(rule, initial[name]),
      initial[name],
      keys,
      errors.deltas[name],
      rates,
      # The anchor is the memory where chunks are whole.
      read=errors.outputs[name] if chunk.mask is None else None,
    )
  linear = chunked.make_linear(solved, first.scores)
  return errors.token, errors.read, linear, chunked.end_chunks(solved)


def _solve_extended(network, rule, initial, project, state, anchor, chunk):
  """Solves a chunk as the rule's extension does."""
  del project  # extensions are defined for static memories
  linear, carries = rule.extension.solve_chunk(
    network, rule, initial, state, anchor, chunk
  )
  return chunk.inputs, None, linear, carries


def _solve_unwritten(network, rule, initial, project, state, anchor, chunk):
  """Reads a chunk whose tokens write nothing: there is no rule to solve."""
  token, read = chunk.inputs, None
  if project is not None or rule.read == 'chunk':
    errors = _evaluate(network, rule, initial, project, anchor, chunk)
    token, read = errors.token, errors.read
  memory, trace = state.memory, state.trace
  weights = rule.weights(memory)
  linear = networks.linear_of(weights)
  if chunk.reset is not None:
    fresh = (jnp.cumsum(chunk.reset, axis=1) > 0)[:, None, :, None]
    first = networks.linear_of(rule.weights(initial))
    before = linear

    def linear(name, x):  # a border empties the memory all the same
      y = before(name, x)
      return jax.lax.cond(
        chunk.has_border,
        lambda: layout.where_tokens(fresh, first(name, x), y),
        lambda: y,
      )

    ended = jnp.any(chunk.reset, axis=1)
    memory = layout.where(ended, initial, memory)
    empty = jax.tree.map(jnp.zeros_like, trace)
    trace = layout.where(ended, empty, trace)
  carries = {n: rules.Carry(w, trace and trace[n]) for n, w in memory.items()}
  return token, read, linear, carries


def _scan_written(body, rule, initial, state, chunks):
  """Scans with the maps that no token writes left out of the carry.

  The backward pass then keeps no copy of them per chunk.
  """
  is_written = {name: writes.learns(rule, name, initial) for name in initial}
  if all(is_written.values()):
    return scan_groups(body, state, chunks, kept=_KEPT_CHUNKS)
  fields = ('memory', 'anchor', 'trace')

  def select(state, written):
    maps = {field: getattr(state, field) for field in fields}
    return state._replace(
      **{
        field: x and {n: w for n, w in x.items() if is_written[n] == written}
        for field, x in maps.items()
      }
    )

  fixed = select(state, False)

  def merge(state):
    maps = {f: (getattr(state, f), getattr(fixed, f) or {}) for f in fields}
    return state._replace(**{f: x and x | y for f, (x, y) in maps.items()})

  def body_of_written(state, chunk):
    state, result = body(merge(state), chunk)
    return select(state, True), result

  state, result = scan_groups(
    body_of_written, select(state, True), chunks, kept=_KEPT_CHUNKS
  )
  return merge(state), result


def scan_groups(
  body: Callable[[Any, Any], tuple[Any, Any]],
  state: Any,
  inputs: Any,
  *,
  kept: int,
) -> tuple[Any, Any]:
  """`jax.lax.scan` with a backward pass that recomputes every step.

  It keeps the state before each of up to `kept` steps. Of more steps, it keeps
  the state before every sqrt(n)-th, and recomputes a group of steps at a time.

  Args:
    body: `body(state, x) -> (state, y)`.
    state: The initial state.
    inputs: Tree of [n, ...], n >= 1.
    kept: Number of steps up to which every state is kept.

  Returns:
    The last state, and the tree of outputs [n, ...].
  """
  num_steps = jax.tree.leaves(inputs)[0].shape[0]
  if num_steps == 1:  # nothing to save by recomputing
    state, outputs = body(state, jax.tree.map(lambda x: x[0], inputs))
    return state, jax.tree.map(lambda x: x[None], outputs)
  # Inside of a scan no common-subexpression elimination can undo the
  # recomputation, so that nothing has to prevent it.
  body = jax.checkpoint(body, prevent_cse=False)
  if num_steps <= kept:
    return jax.lax.scan(body, state, inputs)
  group = math.isqrt(num_steps)
  whole = num_steps - num_steps % group
  scan = jax.checkpoint(
    lambda state, xs: jax.lax.scan(body, state, xs), prevent_cse=False
  )
  split = lambda x: x[:whole].reshape(-1, group, *x.shape[1:])
  state, outputs = jax.lax.scan(scan, state, jax.tree.map(split, inputs))
  outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
  if whole == num_steps:
    return state, outputs
  state, last = scan(state, jax.tree.map(lambda x: x[whole:], inputs))
  join = lambda a, b: jnp.concatenate([a, b])
  return state, jax.tree.map(join, outputs, last)
