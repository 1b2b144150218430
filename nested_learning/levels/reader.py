r"""Learning inside a sequence: levels take steps on the tokens that were read.

A stream is read in segments of S tokens, the greatest common divisor of the
levels' clocks. Weights are constant within a segment. At its end, every level
whose clock is due takes one step of its own optimiser on the mean gradient of
the n next-token losses since its last step,

.. math:: \theta^{(l)} \leftarrow \theta^{(l)}
    + f_l\left(\frac{1}{n} \sum \nabla_{\theta^{(l)}} \ell_t\right),

so that no logit depends on a step that has used its token. Every row of a batch
has its own weights of its levels; all other parameters are shared and constant.

A nested chain is read once for each of its levels: member k has the levels
faster than k at their start (`steps`), and level k learns from its losses.
The logits are those of the mixture of the members (`mixture`), which predicts
about as well as the best of them. Any other chain has one member.

Every level has its own optimiser and its own loss. The next-token loss lowers
the probability of every other token of the vocabulary, also of those that the
stream used long ago, and this is one way in which levels forget. With
`in_segment`, the loss only tells a token from the others of its segment. A
local loss of a level's own input and output needs no backward pass
(`layers.local_losses.apply_with_gradients`). The model is read once for each
loss of its logits, and once for all local losses.

Delta Gradient Descent also needs the energy of the inputs of each matrix. The
same backward pass captures it, and it is summed until the level steps, as the
gradients are. Both are divided by n.

Calls may be split anywhere. The state therefore holds the model's state twice:
after the last token, where the next one is read, and before the open segment,
together with its tokens. When the segment is full it is read again whole, by
one program of one shape, which returns the gradients and the state where the
next segment starts. Levels learn the same bits however the stream was split,
and the size of the state is constant. Calls of whole segments read each only
once.

With learning rates of zero, logits and states of a chain with one member equal,
bit for bit, those of the model fed the same segments and mapped over rows.
Other shapes of call may add in another order.

Two conventions. Only the S - 1 transitions within a segment have a loss: the
last token's target is read after the weights have changed. And a reset starts a
new document for the mixers alone; levels keep what they learned.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 71-73.
  Sun et al., arXiv:2512.23675, 2025 (one level, trained end to end).
  Zeno et al., arXiv:1803.10123, 2018, and Caccia et al., arXiv:2104.05025, 2021
  (a loss among the classes of a batch, against forgetting).
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import optimizers
from nested_learning.levels import low_rank
from nested_learning.levels import mixture
from nested_learning.levels import rows
from nested_learning.levels import steps
from nested_learning.levels import trees
from nested_learning.memory import chunk_scan
from nested_learning.memory import layout


class Segment(NamedTuple):
  """The open segment of every row.

  Attributes:
    model: The model's state before its first token, rows first, of each member
      of the chain.
    mixture: `State.mixture` before its first token.
    tokens: int32 [b, s].
    reset: bool [b, s].
    count: int32 [b], tokens read, less than s.
  """

  model: tuple[Any, ...]
  mixture: Any
  tokens: jax.Array
  reset: jax.Array
  count: jax.Array


class State(NamedTuple):
  """State of streams whose levels learn; all leaves begin with the rows [b].

  Attributes:
    model: The model's state after the last token, rows first, of each member of
      the chain.
    mixture: `mixture.Mixture` of a chain with several members; () otherwise.
    segment: The open segment, to learn from when it is full.
    num_segments: int32 [b], full segments so far: the clock of the levels.
    levels: `steps.InnerLevel`s by name.
  """

  model: tuple[Any, ...]
  mixture: Any
  segment: Segment
  num_segments: jax.Array
  levels: Mapping[str, steps.InnerLevel]


class Reader(NamedTuple):
  """A model whose levels learn while it reads, as pure functions.

  Attributes:
    segment_size: Tokens of a segment.
    prepare: `prepare(params)` returns parameters that all functions below take
      as well; passing them spares every call a copy of the blocks.
    init_state: `init_state(params, batch_size) -> State`.
    read: `read(params, state, tokens, *, reset=None, mask=None, write=True)`
      returns logits [b, t, v] and the state, as a model's `forward`. With
      write=False neither memories nor levels change, and no level learns from
      the tokens.
    read_segments: `read_segments(params, state, tokens, *, reset=None)` is
      `read` for full segments from the start of one. It reads each only once.
    read_piece: `read_piece(params, state, tokens, *, reset, mask)` reads tokens
      that end within the open segment, with padding on the right. It keeps them
      for the end of the segment and takes no step.
    losses: `losses(params, state, tokens, targets, token_loss, *, reset=None)`
      returns the losses [b, t] of full segments in place of their logits, which
      the backward pass then does not keep, and the state. Blocks below those
      that learn read all tokens at once, in place of segment by segment.
    restart: `restart(params, state, rows, *, levels=False)` begins new streams
      in some rows [b]. Without `levels`, these stay as they are.
    follow: `follow(state, old, new)` moves the levels of all rows by the
      difference of the model's parameters. So a stream that goes on after an
      optimiser step keeps what its levels learned, and gets what training
      learned. Leaves of the state may have more axes in front.
  """

  segment_size: int
  prepare: Callable[[Any], Any]
  init_state: Callable[[Any, int], State]
  read: Callable[..., tuple[jax.Array, State]]
  read_segments: Callable[..., tuple[jax.Array, State]]
  read_piece: Callable[..., tuple[jax.Array, State]]
  losses: Callable[..., tuple[jax.Array, State]]
  restart: Callable[..., State]
  follow: Callable[[State, Any, Any], State]


def make_reader(spec: rows.ReaderSpec, *, rank: int | None = None) -> Reader:
  """Makes a model's levels learn from the tokens that it reads.

  Args:
    spec: The model and how its levels learn.
    rank: Largest rank of the changes that levels learn, see `low_rank`; None
      for changes of any rank.

  Returns:
    A `Reader`.
  """
  if rank is not None:
    spec = low_rank.learn_changes(spec, rank)

  def prepared(function):
    return lambda params, *args, **kwargs: function(
      spec, spec.prepare(params), *args, **kwargs
    )

  return Reader(
    segment_size=spec.steps.segment_size,
    prepare=spec.prepare,
    init_state=prepared(_init_state),
    read=prepared(_read),
    read_segments=prepared(_read_segments),
    read_piece=prepared(_read_piece),
    losses=prepared(_losses),
    restart=prepared(_restart),
    follow=functools.partial(_follow, spec),
  )


def _init_state(spec, params, batch_size):
  axes = trees.row_axes(spec.init_state, params)
  one = trees.rows_first(axes, spec.init_state(params, batch_size))
  model = (one,) * (len(spec.steps.levels) if spec.steps.nested else 1)
  mixed = _init_mixture(spec, params, model, batch_size)
  shape = batch_size, spec.steps.segment_size
  energies = rows.energy_shapes(spec, params, model, batch_size)
  return State(
    model=model,
    mixture=mixed,
    segment=Segment(
      model,
      mixed,
      tokens=jnp.zeros(shape, jnp.int32),
      reset=jnp.zeros(shape, bool),
      count=jnp.zeros((batch_size,), jnp.int32),
    ),
    num_segments=jnp.zeros((batch_size,), jnp.int32),
    levels=steps.init(spec.steps, params, batch_size, energies),
  )


def _restart(spec, params, state, rows, *, levels=False):
  fresh = _init_state(spec, params, rows.shape[0])
  if levels:
    return trees.where(rows, fresh, state)

  def begin(old):
    new = {'model': fresh.model, 'mixture': fresh.mixture}
    kept = {name: getattr(old, name) for name in new}
    return old._replace(**trees.where(rows, new, kept))

  return begin(state)._replace(segment=begin(state.segment))


def _init_mixture(spec, params, model, batch_size):
  """Returns the mixture of several members at the start of streams."""
  if len(model) == 1:
    return ()

  def read(tokens):
    weights, _ = steps.start(spec.steps, params, batch_size)
    marks = {'reset': None, 'mask': None, 'write': True}
    read = functools.partial(rows.forward, spec, params)
    return read([weights], model[:1], tokens, **marks)[0][0]

  one = jax.eval_shape(read, jax.ShapeDtypeStruct((batch_size, 2), jnp.int32))
  dtype = jnp.promote_types(one.dtype, jnp.float32)
  return mixture.init(batch_size, len(model), one.shape[-1], dtype)


def _mix(mixed, logits, tokens, reset, mask):
  """Returns the logits of a chain, and its mixture after the tokens."""
  if len(logits) == 1:
    return logits[0], mixed
  return mixture.mix(mixed, logits, tokens, reset=reset, mask=mask)


def _follow(spec, state, old, new):
  old, new = spec.prepare(old), spec.prepare(new)

  def follow(name, level):
    own = [
      optimizers.select_level(x, spec.steps.labels, name) for x in (old, new)
    ]
    move = lambda x: jax.tree.map(lambda w, a, b: w + (b - a), x, *own)
    return level._replace(params=move(level.params))

  levels = {name: follow(name, level) for name, level in state.levels.items()}
  return state._replace(levels=levels)


def _read(spec, params, state, tokens, *, reset=None, mask=None, write=True):
  """Reads calls split anywhere, see `Reader.read`."""
  batch_size, num_tokens = tokens.shape
  size = spec.steps.segment_size
  if num_tokens and not num_tokens % size:
    if state is None and mask is None and write:
      return _read_segments(spec, params, state, tokens, reset=reset)
  state = _init_state(spec, params, batch_size) if state is None else state
  if not write or not num_tokens:
    return _read_at_rest(spec, params, state, tokens, reset, mask)
  shape = batch_size, num_tokens
  mask = jnp.ones(shape, bool) if mask is None else mask
  reset = jnp.zeros(shape, bool) if reset is None else reset & mask
  return _read_pieces(spec, params, state, tokens, reset, mask)


def _read_at_rest(spec, params, state, tokens, reset, mask):
  """Reads tokens that neither memories nor levels learn from."""
  logits, after = _forward(spec, params, state, tokens, reset, mask, False)
  # In a row at the start of a segment, the tokens come before the segment.
  at_start = state.segment.count == 0
  before = {key: getattr(state.segment, key) for key in after}
  segment = state.segment._replace(**trees.where(at_start, after, before))
  return logits, state._replace(**after, segment=segment)


def _read_pieces(spec, params, state, tokens, reset, mask):
  """Reads and learns, in pieces that end where each row's segments do."""
  (batch_size, num_tokens), size = tokens.shape, spec.steps.segment_size
  # Gathers put unmasked tokens first; the logits return to their places below.
  order, place = layout.present_first(mask)
  take = lambda x, i: layout.take(x, i, 1)
  tokens, reset = take(tokens.astype(jnp.int32), order), take(reset, order)
  total = jnp.sum(mask, axis=1, dtype=jnp.int32)  # [b]
  width, row = min(size, num_tokens), jnp.arange(batch_size)[:, None]

  def body(carry, _):
    """Reads up to the end of each row's open segment, and learns there."""
    state, done = carry
    count = jnp.minimum(size - state.segment.count, total - done)
    count = jnp.minimum(count, width)
    there = jnp.arange(width) < count[:, None]  # [b, s]
    places = done[:, None] + jnp.arange(width)
    index = jnp.minimum(places, num_tokens - 1)
    logits, state = _read_piece(
      spec,
      params,
      state,
      take(tokens, index),
      reset=take(reset, index) & there,
      mask=there,
    )
    state = _end_segments(spec, params, state)
    places = jnp.where(there, places, num_tokens)  # padding is dropped below
    return (state, done + count), (logits, places)

  # The most pieces of a row: it begins and ends inside segments.
  num_pieces = (num_tokens + 2 * size - 2) // size
  (state, _), (logits, places) = jax.lax.scan(
    body, (state, jnp.zeros_like(total)), None, length=num_pieces
  )
  out = jnp.zeros((batch_size, num_tokens, logits.shape[-1]), logits.dtype)
  out = out.at[row, places].set(logits, mode='drop')
  return layout.take(out, place, 1), state


def _read_piece(spec, params, state, tokens, *, reset, mask):
  """Reads tokens within the open segment, see `Reader.read_piece`."""
  logits, after = _forward(spec, params, state, tokens, reset, mask, True)
  segment, row = state.segment, jnp.arange(tokens.shape[0])[:, None]
  places = segment.count[:, None] + jnp.arange(tokens.shape[1])
  # Padding gets a place beyond the buffer, where it is dropped.
  places = jnp.where(mask, places, spec.steps.segment_size)
  put = lambda into, x: into.at[row, places].set(x, mode='drop')
  segment = segment._replace(
    tokens=put(segment.tokens, tokens),
    reset=put(segment.reset, reset),
    count=segment.count + jnp.sum(mask, axis=1, dtype=jnp.int32),
  )
  return logits, state._replace(**after, segment=segment)


def _forward(spec, params, state, tokens, reset, mask, write):
  """Returns logits, and the fields of the state that change with them."""
  members = steps.members(spec.steps, params, state.levels)
  marks = {'reset': reset, 'mask': mask, 'write': write}
  logits, model = rows.forward(
    spec, params, members, state.model, tokens, **marks
  )
  logits, mixed = _mix(state.mixture, logits, tokens, reset, mask)
  return logits, {'model': model, 'mixture': mixed}


def _end_segments(spec, params, state):
  """Learns in rows whose segment is full, and opens their next one."""
  full = state.segment.count == spec.steps.segment_size

  def end(state):
    segment = state.segment
    sums, logits, model, num_targets = rows.sums(
      spec,
      params,
      steps.members(spec.steps, params, state.levels),
      segment.model,
      segment.tokens,
      segment.reset,
    )
    num_segments = state.num_segments + full
    _, mixed = _mix(
      segment.mixture, logits, segment.tokens, segment.reset, None
    )
    model = trees.where(full, model, state.model)
    mixed = trees.where(full, mixed, state.mixture)
    return State(
      model,
      mixed,
      segment._replace(
        model=trees.where(full, model, segment.model),
        mixture=trees.where(full, mixed, segment.mixture),
        count=jnp.where(full, 0, segment.count),
      ),
      num_segments,
      steps.learn(
        spec.steps,
        params,
        state.levels,
        sums,
        num_targets,
        num_segments,
        full,
      ),
    )

  # Most pieces of token-by-token reading end inside a segment.
  return jax.lax.cond(jnp.any(full), end, lambda state: state, state)


def _read_segments(spec, params, state, tokens, *, reset=None):
  emit = lambda logits, _: logits
  return _scan_segments(spec, params, state, tokens, reset, None, emit)


def _losses(spec, params, state, tokens, targets, token_loss, *, reset=None):
  read = tokens, reset, targets, token_loss
  split, (batch_size, num_tokens) = spec.split, tokens.shape
  if split is None or num_tokens > split.max_length:
    return _scan_segments(spec, params, state, *read)
  # No level changes the blocks below: they read all tokens at once, and once
  # for all members of a chain.
  axes, below = trees.row_axes(spec.init_state, params), None
  cut = lambda model, part: jax.tree.map(lambda x: x[:, part], model)
  if state is None:
    state = _init_state(spec, params, batch_size)
  else:
    below = cut(state.model[0], slice(split.num_below))
    below = trees.rows_back(axes, below)
  x, below = split.below(params, below, tokens, reset=reset)
  above = cut(state.model, slice(split.num_below, None))
  losses, state = _scan_segments(
    spec, params, state._replace(model=above), *read, x=x
  )
  join = functools.partial(
    jax.tree.map,
    lambda *x: jnp.concatenate(x, axis=1),
    trees.rows_first(axes, below),
  )
  model = tuple(map(join, state.model))
  segment = state.segment._replace(model=model)
  return losses, state._replace(model=model, segment=segment)


def _scan_segments(spec, params, state, tokens, reset, extra, emit, x=None):
  """Reads full segments from the start of one.

  Args:
    spec: The model and how its levels learn.
    params: Prepared parameters.
    state: A `State`, or None at a stream's start.
    tokens: int [b, t].
    reset: bool [b, t] or None.
    extra: Tree of [b, t, ...] that is cut like the tokens, or None.
    emit: `emit(logits, extra)` makes the output [b, s, ...] of a segment.
    x: As for `rows.sums`, of all tokens.

  Returns:
    Outputs [b, t, ...] and the state.
  """
  (batch_size, num_tokens), size = tokens.shape, spec.steps.segment_size
  if num_tokens % size or not num_tokens:
    raise errors.UserError(
      f'{num_tokens} tokens are not full segments of {size} tokens.'
    )
  if state is None:
    state = _init_state(spec, params, batch_size)
  everywhere = jnp.ones((batch_size,), bool)

  def body(carry, inputs):
    model, mixed, num_segments, states = carry
    tokens, reset, extra, x = inputs
    sums, logits, model, num_targets = rows.sums(
      spec,
      params,
      steps.members(spec.steps, params, states),
      model,
      tokens,
      reset,
      x,
    )
    logits, mixed = _mix(mixed, logits, tokens, reset, None)
    num_segments = num_segments + 1
    states = steps.learn(
      spec.steps,
      params,
      states,
      sums,
      num_targets,
      num_segments,
      everywhere,
    )
    return (model, mixed, num_segments, states), emit(logits, extra)

  cut = (
    lambda x: jnp.swapaxes(  # [n, b, s, ...]
      x.reshape(batch_size, -1, size, *x.shape[2:]), 0, 1
    )
  )
  carry = state.model, state.mixture, state.num_segments, dict(state.levels)
  carry, outputs = chunk_scan.scan_groups(
    body, carry, jax.tree.map(cut, (tokens, reset, extra, x)), kept=1
  )
  model, mixed, num_segments, states = carry
  outputs = jnp.swapaxes(outputs, 0, 1)  # [b, n, s, ...]
  outputs = outputs.reshape(batch_size, num_tokens, *outputs.shape[3:])
  segment = state.segment._replace(model=model, mixture=mixed)
  return outputs, State(model, mixed, segment, num_segments, states)
