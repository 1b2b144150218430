"""The memory engine: one recurrence on the weights of a small network.

`token_loop` is the definition, a scan over tokens. `chunk_scan` is what
everybody runs, a scan over chunks of matmuls. They have one signature and one
result.

Time is cut into chunks of `rule.chunk_size` tokens, counted from the stream's
start. What a token writes and the error of that write are computed from the
memory as it stood at the start of the token's chunk (the *anchor*); a document
border ends a chunk early. The state between two calls may lie anywhere inside a
chunk.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 83-90.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import networks
from nested_learning.memory import objectives
from nested_learning.memory import rule as rules


@dataclasses.dataclass(frozen=True)
class Rule:
  """How a memory is written and read; functions, not their names."""

  chunk_size: int  # tokens that share one anchor; 1 is the token recurrence
  objective: objectives.Objective = objectives.l2
  erase: str = (
    'input'  # maps with the delta rule: 'none' | 'input' | 'every_map'
  )
  retain_to: str = 'initial'  # what retention decays towards; or 'zero'
  momentum: bool = False  # whether feeds have a momentum
  read: str = 'token'  # after each token's write; 'chunk', its anchor; 'none'
  target: str = 'own'  # the memory's own output for the value; or 'value'
  normalize_target: Callable[[jax.Array], jax.Array] | None = None
  max_norm: float | None = None  # of a map's departure from its initial weights

  def __post_init__(self):
    if self.chunk_size < 1:
      raise ValueError(f'{self.chunk_size=} must be at least 1 token.')
    _one_of('erase', self.erase, ('none', 'input', 'every_map'))
    _one_of('retain_to', self.retain_to, ('zero', 'initial'))
    _one_of('read', self.read, ('token', 'chunk', 'none'))
    _one_of('target', self.target, ('own', 'value'))


class Feed(NamedTuple):
  """What tokens write and read with; the token axis is last but one.

  Attributes:
    key: [b, h, t, d].
    value: [b, h, t, d].
    inner_lr: [b, h, t, 1], >= 0.
    retention: [b, h, t, 1], in [0, 1].
    momentum: [b, h, t, 1] or None.
    query: [b, h, t, d], or None where nothing is read.
  """

  key: jax.Array
  value: jax.Array
  inner_lr: jax.Array
  retention: jax.Array
  momentum: jax.Array | None = None
  query: jax.Array | None = None


class State(NamedTuple):
  """A memory between two calls, one row per sequence.

  Attributes:
    memory: Weights per map, [b, h, ..., out, in].
    anchor: The weights at the start of the current chunk.
    trace: The momentum's buffer per map, or None.
    offset: int32 [b], tokens of the current chunk that were read.
  """

  memory: Any
  anchor: Any
  trace: Any
  offset: jax.Array


class Result(NamedTuple):
  """What a call gives per token.

  Attributes:
    read: [b, h, t, d], or None with rule.read 'none'.
    feed: The `Feed` of every token, as `project` made it.
    surprise: [b, h, t, 1], Frobenius norm of the inner gradient.
  """

  read: jax.Array | None
  feed: Feed
  surprise: jax.Array


# Makes the feed of some tokens from the anchor and the inputs: for a static
# model the inputs are the feed, for a self-modifying one the anchor makes it.
Project = Callable[[networks.Linear, Any], Feed]


def init_state(
  initial: Any, batch_size: int, *, momentum: bool = False
) -> State:
  """The state at a stream's start: every row holds the initial memory.

  Args:
    initial: Initial memory per map, [h, ..., out, in].
    batch_size: Rows b.
    momentum: Whether the rates have momentum.

  Returns:
    A `State`.
  """
  memory = jax.tree.map(
    lambda w: jnp.broadcast_to(w, (batch_size, *w.shape)), initial
  )
  trace = jax.tree.map(jnp.zeros_like, memory) if momentum else None
  return State(memory, memory, trace, jnp.zeros((batch_size,), jnp.int32))


def token_loop(
  network: networks.Network,
  rule: Rule,
  initial: Any,
  state: State,
  inputs: Any,
  *,
  project: Project,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  write: bool = True,
) -> tuple[Result, State]:
  """Reads and writes token by token: the definition of the engine.

  Args:
    network: What the memory is.
    rule: How it is written and read.
    initial: Initial memory per map, [h, ..., out, in].
    state: Where the stream stands, from `init_state` or an earlier call.
    inputs: What `project` takes, a pytree of [b, h, t, ...].
    project: Makes the `Feed` of the tokens.
    reset: bool [b, t], True at a document's first token.
    mask: bool [b, t], False for tokens that are not there.
    write: False reads the memory and leaves it as it is.

  Returns:
    The `Result`, and the state after the tokens.
  """
  num_tokens = jax.tree.leaves(inputs)[0].shape[2]
  reset, mask = _default_marks(reset, mask, state.offset.shape[0], num_tokens)

  def body(state, token):
    inputs, reset, mask = token
    inputs = jax.tree.map(lambda x: x[:, :, None], inputs)
    fresh = init_state_like(initial, state)._replace(offset=state.offset)
    state = _where(reset & mask, fresh, state)
    starts = state.offset == 0
    anchor = _where(starts, state.memory, state.anchor)
    seen = _evaluate(network, rule, anchor, inputs, project)
    writes = (mask & write)[:, None, None, None]
    carries = {}
    for name, weights in state.memory.items():
      rates = _map_rates(rule, name, seen, writes)
      carries[name] = rules.write_token(
        rules.Carry(weights, state.trace and state.trace[name]),
        _reference(rule, initial[name]),
        seen.inputs[name],
        seen.deltas[name],
        rates,
        erase=_erases(rule, name),
      )
    memory = {name: carry.weights for name, carry in carries.items()}
    trace = state.trace and {n: carry.trace for n, carry in carries.items()}
    read = seen.read
    if rule.read == 'token':
      read = _read(network, networks.linear_of(memory), seen.feed.query)
    offset = state.offset + mask
    ends = offset == rule.chunk_size
    memory = _where(ends, _bound(rule, initial, memory), memory)
    state = State(memory, anchor, trace, jnp.where(ends, 0, offset))
    return state, Result(read, seen.feed, seen.surprise)

  tokens = (
    jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs),
    reset.T,
    mask.T,
  )
  state, result = jax.lax.scan(body, state, tokens)
  result = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), result)
  return result, state


def chunk_scan(
  network: networks.Network,
  rule: Rule,
  initial: Any,
  state: State | None,
  inputs: Any,
  *,
  project: Project,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  write: bool = True,
) -> tuple[Result, State]:
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
    project: Makes the `Feed` of the tokens.
    reset: bool [b, t], True at a document's first token.
    mask: bool [b, t], False for tokens that are not there.
    write: False reads the memory and leaves it as it is.

  Returns:
    The `Result`, and the state after the tokens.
  """
  leaf = jax.tree.leaves(inputs)[0]
  batch_size, num_tokens = leaf.shape[0], leaf.shape[2]
  size = rule.chunk_size
  aligned = state is None and mask is None
  if state is None:
    state = init_state(initial, batch_size, momentum=rule.momentum)
  if aligned:
    num_chunks = -(-num_tokens // size)
    padding = num_chunks * size - num_tokens
    order = None
    if padding:
      inputs = jax.tree.map(lambda x: _pad_tokens(x, padding, 2), inputs)
      reset = None if reset is None else _pad_tokens(reset, padding, 1)
      mask = jnp.arange(num_chunks * size)[None] < num_tokens
      mask = jnp.broadcast_to(mask, (batch_size, num_chunks * size))
  else:
    num_chunks = -(-(num_tokens + size - 1) // size)
    reset, mask = _default_marks(reset, mask, batch_size, num_tokens)
    order, slot, present = _slots(state.offset, mask, num_chunks * size)
    inputs = jax.tree.map(lambda x: _take(x, order, 2), inputs)
    reset = _take(reset & mask, order, 1) & present
    mask = present

  def chunked(x, axis):  # [..., t, ...] -> [n, ..., c, ...]
    shape = (*x.shape[:axis], num_chunks, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  chunks = _Chunks(
    jax.tree.map(lambda x: chunked(x, 2), inputs),
    None if reset is None else chunked(reset, 1),
    None if mask is None else chunked(mask, 1),
    None if reset is None else jnp.any(chunked(reset, 1), axis=(1, 2)),
  )

  body = functools.partial(_chunk, network, rule, initial, project, write)
  if chunks.mask is None:  # chunks are whole: the memory is the next anchor
    state = state._replace(anchor=None)
  state, result = _scan_groups(body, state, chunks, num_chunks)
  if chunks.mask is None:
    state = state._replace(anchor=state.memory)
  flat = lambda x: jnp.moveaxis(x, 0, 2).reshape(
    *x.shape[1:3], num_chunks * size, *x.shape[4:]
  )
  result = jax.tree.map(flat, result)
  if order is not None:
    return jax.tree.map(lambda x: _take(x, slot, 2), result), state
  return jax.tree.map(lambda x: x[:, :, :num_tokens], result), state


def init_state_like(initial: Any, state: State) -> State:
  """The state of a stream's start, with the rows of another state."""
  return init_state(
    initial, state.offset.shape[0], momentum=state.trace is not None
  )


class _Chunks(NamedTuple):
  inputs: Any
  reset: jax.Array | None
  mask: jax.Array | None
  has_border: jax.Array | None


class _Seen(NamedTuple):
  """Tokens as an anchor sees them."""

  feed: Feed
  inputs: dict[str, jax.Array]  # of each map, for the key
  deltas: dict[str, jax.Array]  # error at each map's output
  read: jax.Array | None  # from the anchor, with rule.read 'chunk'
  surprise: jax.Array


def _chunk(network, rule, initial, project, write, state, chunk):
  """One chunk: the body of the scan."""
  anchor = state.memory
  if chunk.mask is not None:
    anchor = _where(state.offset == 0, state.memory, state.anchor)
  seen = _evaluate(network, rule, anchor, chunk.inputs, project)
  reset = writes = None
  if chunk.mask is not None:
    writes = (chunk.mask & write)[:, None, :, None]
  elif not write:
    writes = jnp.zeros((1, 1, rule.chunk_size, 1), bool)
  if chunk.reset is not None:  # after a border the initial memory is the anchor
    reset = chunk.reset[:, None, :, None]
    fresh = jnp.cumsum(reset, axis=2) > 0
    seen = jax.lax.cond(
      chunk.has_border,
      lambda: _where_tokens(
        fresh, _evaluate(network, rule, initial, chunk.inputs, project), seen
      ),
      lambda: seen,
    )
  rates = rules.Rates(
    seen.feed.inner_lr, seen.feed.retention, seen.feed.momentum, writes
  )
  decays = rules.make_decays(rates, reset)
  solved, solved_decays = {}, {}
  for name, weights in state.memory.items():
    decays_here = _per_map(decays, name)
    solved_decays[name] = decays_here
    solved[name] = rules.solve_chunk(
      rules.Carry(weights, state.trace and state.trace[name]),
      _reference(rule, initial[name]),
      initial[name],
      seen.inputs[name],
      seen.deltas[name],
      _map_rates(rule, name, seen, writes),
      decays_here,
      erase=_erases(rule, name),
    )
  read = seen.read
  if rule.read == 'token':
    linear = lambda name, q: rules.read_chunk(
      solved[name], solved_decays[name], q
    )
    read = _read(network, linear, seen.feed.query)
  ended = {n: rules.end_chunk(solved[n], solved_decays[n]) for n in solved}
  memory = {name: carry.weights for name, carry in ended.items()}
  trace = state.trace and {name: carry.trace for name, carry in ended.items()}
  bounded = _bound(rule, initial, memory)
  if chunk.mask is None:
    state = State(bounded, None, trace, state.offset)
  else:
    offset = state.offset + jnp.sum(chunk.mask, axis=1, dtype=jnp.int32)
    ends = offset == rule.chunk_size
    memory = _where(ends, bounded, memory)
    if chunk.reset is not None:  # the anchor of what is left of this chunk
      anchor = _where(
        jnp.any(chunk.reset, axis=1), _rows(initial, anchor), anchor
      )
    state = State(memory, anchor, trace, jnp.where(ends, 0, offset))
  return state, Result(read, seen.feed, seen.surprise)


def _evaluate(network, rule, anchor, inputs, project) -> _Seen:
  """What the tokens write and read, and the errors, seen from the anchor."""
  linear = networks.linear_of(anchor)
  feed = project(linear, inputs)
  target = feed.value[:, :, None], feed.value[:, :, None, :, :0]
  if rule.target == 'own':
    vectors, scalars = network.apply(linear, feed.value)
    if rule.normalize_target is not None:
      vectors = rule.normalize_target(vectors)
    target = vectors, scalars
  target = networks.Outputs(*target)

  def loss(bumps):
    map_inputs = {}

    def bumped(name, x):
      map_inputs[name] = x
      y = linear(name, x)
      return y if bumps is None else y + bumps[name]

    prediction = network.apply(bumped, feed.key)
    total = sum(
      jnp.sum(rule.objective(p, t))
      for p, t in zip(prediction, target, strict=True)
      if p.size
    )
    return total, map_inputs

  _, map_inputs = jax.eval_shape(loss, None)
  bumps = {
    name: jnp.zeros((*x.shape[:-1], anchor[name].shape[-2]), x.dtype)
    for name, x in map_inputs.items()
  }
  deltas, map_inputs = jax.grad(loss, has_aux=True)(bumps)
  read = None
  if rule.read == 'chunk':
    read = _read(network, linear, feed.query)
  return _Seen(feed, map_inputs, deltas, read, _surprise(map_inputs, deltas))


def _surprise(map_inputs, deltas):
  """Frobenius norm over all maps of the gradient delta x^T."""
  square = 0.0
  for name, x in map_inputs.items():
    norms = jnp.sum(jnp.square(x), -1) * jnp.sum(jnp.square(deltas[name]), -1)
    if norms.ndim == 4:  # [b, h, r, t]
      norms = jnp.sum(norms, axis=2)
    square = square + norms
  return jnp.sqrt(square + 1e-12)[..., None]


def _read(network, linear, query):
  """The vector that a one-vector network gives for q."""
  return network.apply(linear, query).vectors[:, :, 0]


def _map_rates(rule, name, seen: _Seen, write) -> rules.Rates:
  """The rates of one map: those of hidden maps are scaled by their inputs."""
  per_map = lambda x: x if x is None else _per_map(x, name)
  rates = rules.Rates(
    per_map(seen.feed.inner_lr),
    per_map(seen.feed.retention),
    per_map(seen.feed.momentum),
    per_map(write),
  )
  if name == 'in' or rule.erase != 'every_map':
    return rates
  # Exact proximal step for inputs of any norm, NL eq. 57.
  square = jnp.sum(jnp.square(seen.inputs[name]), axis=-1, keepdims=True)
  return rates._replace(inner_lr=rates.inner_lr / (1 + rates.inner_lr * square))


def _per_map(tree, name):
  """Adds the role axis that hidden maps have: [b, h, ...] -> [b, h, 1, ...]."""
  if name == 'in':
    return tree
  return jax.tree.map(lambda x: x[:, :, None], tree)


def _erases(rule, name) -> bool:
  return rule.erase == 'every_map' or (rule.erase == 'input' and name == 'in')


def _reference(rule, initial):
  return initial if rule.retain_to == 'initial' else None


def _bound(rule, initial, memory):
  """Scales back what left the initial memory farther than max_norm."""
  if rule.max_norm is None:
    return memory

  def bound(start, weights):
    change = weights - start
    square = jnp.sum(jnp.square(change), axis=(-1, -2), keepdims=True)
    norm = jnp.sqrt(square + 1e-12)
    return start + change * jnp.minimum(1.0, rule.max_norm / norm)

  return jax.tree.map(bound, initial, memory)


def _rows(initial, like):
  return jax.tree.map(
    lambda w, row: jnp.broadcast_to(w, row.shape), initial, like
  )


def _where(condition, yes, no):
  """Selects rows of two pytrees by bool [b]."""

  def leaf(a, b):
    return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

  return jax.tree.map(leaf, yes, no)


def _where_tokens(fresh, yes, no):
  """Selects tokens of two pytrees by bool [b, 1, t, 1]."""

  def leaf(a, b):
    return jnp.where(fresh if b.ndim == 4 else fresh[:, :, None], a, b)

  return jax.tree.map(leaf, yes, no)


def _default_marks(reset, mask, batch_size, num_tokens):
  shape = (batch_size, num_tokens)
  reset = jnp.zeros(shape, bool) if reset is None else reset
  mask = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
  return reset, mask


def _slots(offset, mask, num_slots):
  """Lays the tokens that are there into slots aligned with their chunks.

  Args:
    offset: int [b], slots of the first chunk that earlier calls filled.
    mask: bool [b, t].
    num_slots: Number of slots.

  Returns:
    The token of each slot [b, s], the slot of each token [b, t], and which
    slots hold a token, bool [b, s].
  """
  num_tokens = mask.shape[1]
  rank = jnp.arange(num_slots)[None] - offset[:, None]
  present = (rank >= 0) & (rank < jnp.sum(mask, axis=1)[:, None])
  by_rank = jnp.argsort(~mask, axis=1, stable=True)
  order = jnp.take_along_axis(by_rank, jnp.clip(rank, 0, num_tokens - 1), 1)
  slot = offset[:, None] + jnp.cumsum(mask, axis=1) - 1
  return order, jnp.clip(slot, 0, num_slots - 1), present


def _take(x, index, axis):
  """x[b, ..., index[b, :], ...] along the token axis."""
  shape = [1] * x.ndim
  shape[0], shape[axis] = index.shape
  return jnp.take_along_axis(x, index.reshape(shape), axis)


def _pad_tokens(x, padding, axis):
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, padding)
  return jnp.pad(x, pads)


def _scan_groups(body, state, chunks, num_chunks):
  """Scans chunks in groups of about sqrt(n) that the backward pass recomputes."""
  group = max(1, math.isqrt(num_chunks))
  num_groups = num_chunks // group
  scan = jax.checkpoint(
    lambda state, xs: jax.lax.scan(body, state, xs), prevent_cse=False
  )
  split = lambda x: x[: num_groups * group].reshape(
    num_groups, group, *x.shape[1:]
  )
  state, result = jax.lax.scan(scan, state, jax.tree.map(split, chunks))
  result = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), result)
  if num_groups * group == num_chunks:
    return state, result
  rest = jax.tree.map(lambda x: x[num_groups * group :], chunks)
  state, tail = scan(state, rest)
  join = lambda a, b: jnp.concatenate([a, b])
  return state, jax.tree.map(join, result, tail)


def _one_of(name, value, known):
  if value not in known:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(known)}.')
