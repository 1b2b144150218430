r"""Learning inside the sequence: levels that step on what was just read.

A stream is read in segments of S tokens, S the greatest common divisor of the
levels' clocks, `update_every`. While a segment is read, weights stand still. At
its end every level whose chunk ends there takes one step of its own optimiser,

.. math:: \theta^{(l)} \leftarrow \theta^{(l)}
    + f_l\left(\frac{1}{n} \sum \nabla_{\theta^{(l)}} \ell_t\right)

over the n next-token losses of its chunk. So a token's logits depend on no step
that has used it. Every row of a batch owns the weights of its levels; all other
parameters are shared and stand still. Instead of the loss, a level may have an
objective of its own input and output (`cms.teach`), which needs no backward
pass; all else is the same.

The loss of a token makes all others of the vocabulary less likely, also those
that the stream spoke of long ago and does not speak of now, which is one way in
which levels forget. It may be taken among the tokens of the segment alone
(`in_segment`), which says nothing of the others.

A chunk may end anywhere in a call, and a call anywhere in a segment. The state
therefore has the model's state twice: where the stream is, from which the next
token is read, and where the segment began, with the segment's tokens. At the
segment's end it is read again from there, whole, by one program of one shape,
and what that gives is the gradient and the state that the next segment starts
from. What levels learn is then the same bits however the stream was cut, and
the state has a constant size. Calls of whole segments read each only once.

With rates of zero, logits and states are, bit for bit, those of the model that
is fed the same segments, mapped over rows; read whole, or in a batch, its
matmuls have other shapes and may add in another order.

Two conventions. Each segment is judged by its own S - 1 transitions: what it
predicts of the next one is judged by nobody, since the weights that predicted
it are gone when it is read. And a reset is a new document for the mixers alone:
levels keep what they learned, which is what they are for.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 71-73.
  Sun et al., arXiv:2512.23675, 2025 (one level, trained end to end).
  Zeno et al., arXiv:1803.10123, 2018, and Caccia et al., arXiv:2104.05025, 2021
  (a loss among the classes of a batch, against forgetting).
"""

from collections.abc import Callable, Sequence
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nested_learning import errors
from nested_learning.levels import partition
from nested_learning.levels import steps
from nested_learning.levels import stream

LevelState = stream.LevelState
Reader = stream.Reader
Segment = stream.Segment
State = stream.State


def make_reader(
  forward: Callable[..., tuple[jax.Array, Any]],
  init_state: Callable[[Any, int], Any],
  levels: Sequence[Any],
  labels: Any,
  *,
  reduce: str = 'mean',
  nested: bool = False,
  gradient: str = 'second_order',
  max_drift: float = 1.0,
  in_segment: bool = False,
  teach: Callable[..., tuple[jax.Array, Any, Any]] | None = None,
) -> stream.Reader:
  """Makes a model's levels learn from the tokens that it reads.

  Args:
    forward: The model's, see `models.make_model`.
    init_state: The model's.
    levels: `optimizers.Level`s: which learn, every how many tokens of a row,
      and how, by any optax transformation that needs no extra arguments.
    labels: A tree of level names with the structure of the parameters.
    reduce: 'mean' or 'sum' of a chunk's gradients.
    nested: Whether a level starts anew, weights and optimiser, at every update
      of the next slower one.
    gradient: Of an outer loss: 'second_order' goes through the steps,
      'first_order' takes the inner gradients as constants.
    max_drift: A level that has gone further from its start than this times the
      start's norm has diverged, as has one whose step is not finite.
    in_segment: Whether a token's loss is that of telling it from the others
      that its segment predicts, in place of all others.
    teach: What makes gradients in place of those of the next-token loss:
      `teach(params, state, tokens, counts, *, reset=None)` gives logits, the
      state, and a tree that has, at the paths of the levels' parameters, the
      gradients of what they minimise over the tokens, each counted as often as
      counts [b, t] says.

  Returns:
    A `stream.Reader`.

  Raises:
    errors.UserError: No level, an unknown one, clocks without a common
      divisor of at least 2 tokens, or not multiples in a nested chain.
  """
  levels = sorted(levels, key=lambda level: level.every)
  _check_levels(levels, set(jax.tree.leaves(labels)), nested)
  size = segment_size(levels)
  periods = {level.name: level.every // size for level in levels}

  config = steps.StepConfig(reduce, nested, max_drift)
  init_levels, learn = steps.make_steps(levels, periods, labels, config)

  def init(params, batch_size):
    axes = partition.row_axes(init_state, params)
    model = partition.rows_first(axes, init_state(params, batch_size))
    return stream.State(
      model=model,
      segment=stream.Segment(
        model,
        jnp.zeros((batch_size, size), jnp.int32),
        jnp.zeros((batch_size, size), bool),
        jnp.zeros((batch_size,), jnp.int32),
      ),
      num_segments=jnp.zeros((batch_size,), jnp.int32),
      levels=init_levels(params, batch_size),
    )

  def forward_row(params, axes, weights, model, tokens, reset, mask, write):
    """The model's forward for one row, with its own levels."""
    add_axis = lambda x: None if x is None else x[None]
    logits, model = forward(
      partition.merge(params, labels, weights),
      partition.add_row_axis(axes, model),
      tokens[None],
      reset=add_axis(reset),
      mask=add_axis(mask),
      write=write,
    )
    return logits[0], partition.drop_row_axis(axes, model)

  def forward_rows(params, state, tokens, reset, mask, write):
    axes = partition.row_axes(init_state, params)
    weights = {name: level.params for name, level in state.levels.items()}
    row = lambda *args: forward_row(params, axes, *args, write)
    return jax.vmap(row)(weights, state.model, tokens, reset, mask)

  def judge_row(params, axes, weights, model, tokens, reset):
    """Gradients, logits, the state, and how many predictions were judged."""
    counts = jnp.ones((size - 1,), jnp.float32)
    if reset is not None:  # a document does not predict the next one
      counts = 1 - reset[1:].astype(jnp.float32)

    def loss(weights):
      logits, after = forward_row(
        params, axes, weights, model, tokens, reset, None, True
      )
      predicted = logits[:-1]
      if in_segment:
        predicted = _among(tokens[1:], predicted)
      losses = optax.softmax_cross_entropy_with_integer_labels(
        predicted, tokens[1:]
      )
      return jnp.sum(losses * counts), (logits, after)

    if teach is None:
      gradients, (logits, model) = jax.grad(loss, has_aux=True)(weights)
      return gradients, logits, model, jnp.sum(counts)
    logits, model, found = teach(
      partition.merge(params, labels, weights),
      partition.add_row_axis(axes, model),
      tokens[None],
      jnp.pad(counts, (0, 1))[None],
      reset=None if reset is None else reset[None],
    )
    gradients = {name: partition.pick(found, labels, name) for name in weights}
    model = partition.drop_row_axis(axes, model)
    return gradients, logits[0], model, jnp.sum(counts)

  def learn_rows(params, levels_state, model, tokens, reset):
    """Reads whole segments; what they say of the weights they are read with."""
    axes = partition.row_axes(init_state, params)
    weights = {name: level.params for name, level in levels_state.items()}
    gradients, *rest = jax.vmap(lambda *row: judge_row(params, axes, *row))(
      weights, model, tokens, reset
    )
    if gradient == 'first_order':
      gradients = jax.lax.stop_gradient(gradients)
    return gradients, *rest

  def scan_segments(params, state, tokens, reset, extra, emit):
    """Whole segments from the border of one; `emit` makes the outputs."""
    batch_size, num_tokens = tokens.shape
    if num_tokens % size:
      raise errors.UserError(
        f'{num_tokens} tokens are not whole segments of {size} tokens.'
      )
    everywhere = jnp.ones((batch_size,), bool)

    def body(carry, inputs):
      model, num_segments, states = carry
      tokens, reset, extra = inputs
      gradients, logits, model, num_targets = learn_rows(
        params, states, model, tokens, reset
      )
      num_segments = num_segments + 1
      states = learn(
        params, states, gradients, num_targets, num_segments, everywhere
      )
      return (model, num_segments, states), emit(logits, extra)

    cut = lambda x: jnp.swapaxes(
      x.reshape(batch_size, -1, size, *x.shape[2:]), 0, 1
    )
    carry = state.model, state.num_segments, dict(state.levels)
    carry, outputs = _scan(
      body, carry, jax.tree.map(cut, (tokens, reset, extra))
    )
    model, num_segments, states = carry
    outputs = jnp.swapaxes(outputs, 0, 1)
    outputs = outputs.reshape(batch_size, num_tokens, *outputs.shape[3:])
    segment = state.segment._replace(model=model)
    return outputs, stream.State(model, segment, num_segments, states)

  def read_segments(params, state, tokens, *, reset=None):
    state = init(params, tokens.shape[0]) if state is None else state
    return scan_segments(
      params, state, tokens, reset, None, lambda logits, _: logits
    )

  def losses(params, state, tokens, targets, token_loss, *, reset=None):
    state = init(params, tokens.shape[0]) if state is None else state
    return scan_segments(params, state, tokens, reset, targets, token_loss)

  def end_segments(params, state):
    """Learns in the rows whose segment is whole, and begins the next."""
    whole = state.segment.count == size

    def end(state):
      segment = state.segment
      gradients, _, model, num_targets = learn_rows(
        params, state.levels, segment.model, segment.tokens, segment.reset
      )
      num_segments = state.num_segments + whole
      model = partition.where(whole, model, state.model)
      return stream.State(
        model,
        segment._replace(
          model=partition.where(whole, model, segment.model),
          count=jnp.where(whole, 0, segment.count),
        ),
        num_segments,
        learn(
          params, state.levels, gradients, num_targets, num_segments, whole
        ),
      )

    return jax.lax.cond(jnp.any(whole), end, lambda state: state, state)

  def read_piece(params, state, tokens, *, reset, mask):
    logits, model = forward_rows(params, state, tokens, reset, mask, True)
    segment, rows = state.segment, jnp.arange(tokens.shape[0])[:, None]
    places = segment.count[:, None] + jnp.arange(tokens.shape[1])
    places = jnp.where(mask, places, size)  # the others fall off the end
    put = lambda into, x: into.at[rows, places].set(x, mode='drop')
    segment = segment._replace(
      tokens=put(segment.tokens, tokens),
      reset=put(segment.reset, reset),
      count=segment.count + jnp.sum(mask, axis=1, dtype=jnp.int32),
    )
    return logits, state._replace(model=model, segment=segment)

  def read(params, state, tokens, *, reset=None, mask=None, write=True):
    batch_size, num_tokens = tokens.shape
    if not num_tokens:
      state = init(params, batch_size) if state is None else state
      logits, _ = forward_rows(params, state, tokens, reset, mask, False)
      return logits, state
    if state is None and mask is None and write and not num_tokens % size:
      return read_segments(params, state, tokens, reset=reset)
    state = init(params, batch_size) if state is None else state
    if not write:
      logits, model = forward_rows(params, state, tokens, reset, mask, False)
      border = state.segment.count == 0
      segment = state.segment._replace(
        model=partition.where(border, model, state.segment.model)
      )
      return logits, state._replace(model=model, segment=segment)
    shape = batch_size, num_tokens
    mask = jnp.ones(shape, bool) if mask is None else mask
    reset = jnp.zeros(shape, bool) if reset is None else reset & mask
    # Tokens that are there move to the front, and back at the end.
    front = jnp.argsort(~mask, axis=1, stable=True)
    take = lambda x, i: jnp.take_along_axis(x, i, axis=1)
    tokens, reset = take(tokens.astype(jnp.int32), front), take(reset, front)
    total = jnp.sum(mask, axis=1, dtype=jnp.int32)
    width, rows = min(size, num_tokens), jnp.arange(batch_size)[:, None]

    def body(carry, _):
      state, done = carry
      count = jnp.minimum(size - state.segment.count, total - done)
      count = jnp.minimum(count, width)
      there = jnp.arange(width) < count[:, None]
      places = done[:, None] + jnp.arange(width)
      index = jnp.minimum(places, num_tokens - 1)
      logits, state = read_piece(
        params,
        state,
        take(tokens, index),
        reset=take(reset, index) & there,
        mask=there,
      )
      state = end_segments(params, state)
      places = jnp.where(there, places, num_tokens)
      return (state, done + count), (logits, places)

    num_pieces = (num_tokens + 2 * size - 2) // size
    (state, _), (logits, places) = jax.lax.scan(
      body, (state, jnp.zeros_like(total)), None, length=num_pieces
    )
    out = jnp.zeros((batch_size, num_tokens, logits.shape[-1]), logits.dtype)
    out = out.at[rows, places].set(logits, mode='drop')
    rank = jnp.argsort(front, axis=1)
    return jnp.take_along_axis(out, rank[..., None], axis=1), state

  return stream.Reader(size, init, read, read_segments, read_piece, losses)


def segment_size(levels: Sequence[Any]) -> int:
  """Tokens of a segment: what all clocks are multiples of.

  Args:
    levels: What has a clock `every`, at least one.

  Returns:
    Their greatest common divisor.

  Raises:
    errors.UserError: It is less than 2 tokens.
  """
  sizes = [level.every for level in levels]
  size = math.gcd(*sizes)
  if size < 2:
    raise errors.UserError(
      f'inner.update_every={sizes} has no common divisor of at least 2 tokens, '
      'which a next-token loss needs; make all multiples of one number.'
    )
  return size


def _among(tokens, logits):
  """Logits [t, v] of the tokens [t]; next to minus infinity for all others."""
  is_there = jnp.zeros(logits.shape[-1:], bool).at[tokens].set(True)
  return jnp.where(is_there, logits, jnp.finfo(logits.dtype).min / 2)


def _check_levels(levels, names, nested):
  """Refuses levels that cannot learn together; they are by clock."""
  if not levels:
    raise errors.UserError('no level learns; give at least one.')
  for level in levels:
    if level.name not in names:
      raise errors.UserError(
        f'no level {level.name!r}; there are {", ".join(sorted(names))}.'
      )
  if len({level.name for level in levels}) < len(levels):
    raise errors.UserError('a level is named twice; give each one clock.')
  for faster, slower in itertools.pairwise(levels):
    if nested and slower.every % faster.every:
      raise errors.UserError(
        f'level {slower.name!r} has every={slower.every}, no '
        f'multiple of the {faster.every} of level {faster.name!r} inside '
        'it; a nested chain needs multiples.'
      )


def _scan(body, carry, inputs):
  """`jax.lax.scan` whose backward pass keeps about 2 sqrt(n) carries.

  Groups of sqrt(n) steps are recomputed from their start, and each step in
  them from its own.
  """
  num_steps = jax.tree.leaves(inputs)[0].shape[0]
  size = max(math.isqrt(num_steps), 1)
  whole = num_steps // size * size
  body = jax.checkpoint(body)
  group = jax.checkpoint(lambda carry, xs: jax.lax.scan(body, carry, xs))
  groups = jax.tree.map(
    lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), inputs
  )
  carry, outputs = jax.lax.scan(group, carry, groups)
  outputs = outputs.reshape(whole, *outputs.shape[2:])
  if whole < num_steps:
    rest = jax.tree.map(lambda x: x[whole:], inputs)
    carry, last = jax.lax.scan(body, carry, rest)
    outputs = jnp.concatenate([outputs, last])
  return carry, outputs
