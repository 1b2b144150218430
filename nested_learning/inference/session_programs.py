"""How a session reads: by compiled programs, into which a call is cut.

`Snapshot` is everything that a session remembers; `read` and `forget` take one
and return the next. `read_rows` reads piece by piece, for callers that do other
work between two of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning.inference import generate
from nested_learning.inference import session_compiled


class Snapshot(NamedTuple):
  """Everything that a session remembers.

  Attributes:
    state: The arrays on the devices.
    clock: int64 [b], tokens that were read.
    age: int64 [b], tokens that the mixers hold.
  """

  state: session_compiled.SessionState
  clock: np.ndarray
  age: np.ndarray

  @property
  def clocks(self) -> dict[str, np.ndarray]:
    """The arrays that are not of the state, by name."""
    return {'clock': self.clock, 'age': self.age}

  def take_rows(self, rows: slice) -> 'Snapshot':
    """Returns some of the rows."""
    return jax.tree.map(lambda x: x[rows], self)


class Inputs(NamedTuple):
  """Tokens of a call, all [b, t].

  Attributes:
    tokens: int32.
    reset: bool, True at a document's first token.
    mask: bool, False for padding.
  """

  tokens: np.ndarray
  reset: np.ndarray
  mask: np.ndarray


class Piece(NamedTuple):
  """Tokens that are read together, all [b, n].

  Attributes:
    index: int, their places in the call.
    mask: bool, False for padding.
  """

  index: np.ndarray
  mask: np.ndarray


class PieceRead(NamedTuple):
  """A session after one more piece.

  Attributes:
    now: The session.
    rows: int [n], rows of the tokens that have a loss.
    places: int [n], their places in the piece, or in the call.
    losses: float32 [n], in nats.
  """

  now: Snapshot
  rows: np.ndarray
  places: np.ndarray
  losses: np.ndarray


def check_inputs(
  tokens: Any, reset: Any, mask: Any, *, num_rows: int, vocab_size: int
) -> Inputs:
  """Checks everything that a session is fed before any of it is read.

  Args:
    tokens: int [b, t], or [t] for one row.
    reset: bool like tokens, or None.
    mask: bool like tokens, or None.
    num_rows: Rows of the session, b.
    vocab_size: Tokens of the model.

  Returns:
    The arrays.

  Raises:
    errors.UserError: If there are no tokens, one is out of range, or the shapes
      do not fit.
  """
  add_row = lambda x: x[None] if np.ndim(x) == 1 else x
  tokens = add_row(_array('tokens', tokens))
  if tokens.ndim != 2 or len(tokens) != num_rows:
    raise errors.UserError(
      f'tokens have shape {tokens.shape}; this session has {num_rows} rows, '
      'and takes tokens [rows, tokens].'
    )

  def flags(name, x, default):
    if x is None:
      return np.full(tokens.shape, default)
    x = add_row(_array(name, x).astype(bool))
    try:
      return np.broadcast_to(x, tokens.shape)
    except ValueError as error:
      raise errors.UserError(
        f'{name} has shape {x.shape}, and the tokens have {tokens.shape}; give '
        'one value per token.'
      ) from error

  reset, mask = flags('reset', reset, False), flags('mask', mask, True)
  if not mask.any():
    raise errors.UserError('there is nothing to read; give some tokens.')
  generate.check_tokens(tokens, vocab_size, mask)
  return Inputs(tokens.astype(np.int32), reset, mask)


def pieces(mask: np.ndarray, offset: np.ndarray, size: int) -> Iterator[Piece]:
  """Cuts a call at the borders of each row's segments.

  Args:
    mask: bool [b, t], False for padding.
    offset: int [b], tokens of the current segment that each row has read.
    size: Tokens of a segment.

  Yields:
    The pieces in turn; each row has some tokens of one segment, or none.
  """
  places = [np.nonzero(row)[0] for row in mask]
  done, offset = np.zeros(len(mask), int), np.array(offset)
  total = np.array([len(row) for row in places])
  while (done < total).any():
    count = np.minimum(size - offset, total - done)
    width = size
    while width // 2 >= count.max():  # few shapes, so few compilations
      width //= 2
    index = np.zeros((len(mask), width), int)
    for row, (begin, number) in enumerate(zip(done, count, strict=True)):
      index[row, :number] = places[row][begin : begin + number]
    yield Piece(index, np.arange(width) < count[:, None])
    done, offset = done + count, (offset + count) % size


def begin(
  programs: session_compiled.Programs, params: Any, num_rows: int
) -> Snapshot:
  """Returns the snapshot of a session that has read nothing."""
  zeros = np.zeros(num_rows, np.int64)
  return Snapshot(programs.init(params, num_rows), zeros, zeros)


def join_rows(snapshots: Sequence[Snapshot]) -> Snapshot:
  """Returns one snapshot with the rows of several."""
  if len(snapshots) == 1:
    return snapshots[0]
  states, clocks, ages = zip(*snapshots, strict=True)
  return Snapshot(
    _concatenate(states), np.concatenate(clocks), np.concatenate(ages)
  )


@jax.jit
def _concatenate(states):
  return jax.tree.map(lambda *x: jnp.concatenate(x), *states)


def read(
  programs: session_compiled.Programs,
  params: Any,
  now: Snapshot,
  inputs: Inputs,
  *,
  learn: bool = True,
) -> tuple[np.ndarray, Snapshot]:
  """Reads tokens and learns from them.

  Args:
    programs: The compiled functions.
    params: Parameters from `programs.prepare`.
    now: The session before.
    inputs: From `check_inputs`.
    learn: False lets the levels rest. Such a session can be drawn from, and
      must not go on learning: its open segment is not kept.

  Returns:
    The loss of each token in nats, float32 [b, t], NaN where it has none, and
    the session after.
  """
  losses = np.full(inputs.tokens.shape, np.nan, np.float32)
  for piece in cut(programs, now, inputs, learn=learn):
    done = read_piece(programs, params, now, gather(inputs, piece), learn=learn)
    losses[done.rows, piece.index[done.rows, done.places]] = done.losses
    now = done.now
  return losses, now


def cut(
  programs: session_compiled.Programs,
  now: Snapshot,
  inputs: Inputs,
  *,
  learn: bool,
) -> Iterator[Piece]:
  """Returns the pieces in which `read` reads a call."""
  size = programs.segment_size
  offset = now.clock % size if learn else np.zeros_like(now.clock)
  return pieces(inputs.mask, offset, size)


def gather(inputs: Inputs, piece: Piece) -> Inputs:
  """Returns the tokens of a piece."""
  take = lambda x: np.take_along_axis(x, piece.index, axis=1)
  reset = take(inputs.reset) & piece.mask
  return Inputs(take(inputs.tokens), reset, piece.mask)


def read_piece(
  programs: session_compiled.Programs,
  params: Any,
  now: Snapshot,
  inputs: Inputs,
  *,
  learn: bool = True,
) -> PieceRead:
  """Reads tokens that end within the open segment of every row.

  Args:
    programs: The compiled functions.
    params: Parameters from `programs.prepare`.
    now: The session before.
    inputs: The tokens, with padding on the right alone.
    learn: See `read`.

  Returns:
    The session after them.
  """
  size, (tokens, reset, mask) = programs.segment_size, inputs
  state, clock, age = _make_room(programs, params, now) if learn else now
  has_loss = mask & ~reset
  has_loss[:, 0] &= clock > 0
  count = mask.sum(axis=1)
  if learn and (count == size).all():  # and so from one border to the next
    found, state = programs.segment(params, state, tokens, reset)
  else:
    found, state = programs.piece(params, state, tokens, reset, mask)
    ended = ((clock + count) % size == 0) & (count > 0)
    if learn and ended.any():
      state = programs.end_segments(params, state, ended)
  now = Snapshot(state, clock + count, age + count)
  rows, places = np.nonzero(has_loss)
  return PieceRead(now, rows, places, np.asarray(found)[rows, places])


def read_prompt(
  programs: session_compiled.Programs,
  params: Any,
  now: Snapshot,
  inputs: Inputs | None,
  num_tokens: int,
  *,
  forgets: bool,
) -> Snapshot:
  """Reads a prompt, after which tokens are drawn.

  Args:
    programs: The compiled functions.
    params: Parameters from `programs.prepare`.
    now: The session before.
    inputs: The prompt, from `check_inputs`; None for none.
    num_tokens: Tokens that will be drawn.
    forgets: Whether new streams begin where prompt and text have no room.

  Returns:
    The session after the prompt.

  Raises:
    errors.UserError: If nothing was read yet, or the text has no room.
  """
  if forgets:
    length = 0 if inputs is None else inputs.tokens.shape[1]
    now = forget(programs, params, now, length + num_tokens)
  if inputs is not None:
    _, now = read(programs, params, now, inputs)
  if not now.clock.all():
    raise errors.UserError(
      'nothing was read yet that could be continued; give a prompt.'
    )
  limit, age = programs.max_stream, int(now.age.max())
  if limit is not None and age + num_tokens > limit:
    raise errors.UserError(
      f'{num_tokens} tokens after the {age} that attention holds are more '
      f'than model.max_length={limit}; ask for fewer.'
    )
  return now


def forget(
  programs: session_compiled.Programs,
  params: Any,
  now: Snapshot,
  num_tokens: int,
) -> Snapshot:
  """Begins new streams where the mixers have no room for `num_tokens` more.

  Levels keep what they learned; the open segment is dropped.
  """
  limit = programs.max_stream
  if limit is None or now.age.max() + num_tokens <= limit:
    return now
  everywhere = np.ones(len(now.clock), bool)
  state = programs.restart(params, now.state, everywhere)
  segment = state.stream.segment
  segment = segment._replace(count=jnp.zeros_like(segment.count))
  state = state._replace(stream=state.stream._replace(segment=segment))
  # Rounds up to a border; a clock that has begun must not return to zero.
  size = programs.segment_size
  clock = now.clock // size * size + size * (now.clock > 0)
  return Snapshot(state, clock, np.zeros_like(now.age))


def count_steps(before: Snapshot, after: Snapshot) -> dict[str, int]:
  """Returns how many steps each level took; of the first row."""
  old, new = before.state.stream.levels, after.state.stream.levels
  count = lambda level: int(level.num_updates[0])
  return {name: count(level) - count(old[name]) for name, level in new.items()}


def make_programs(
  model: models.Model, inner: levels.InnerConfig
) -> session_compiled.Programs:
  """Makes the programs of sessions on a model.

  Sessions on equal configs share them, so that loading one compiles nothing.

  Args:
    model: From `models.make_model`.
    inner: How its levels learn.

  Returns:
    The functions; each is compiled once per shape of its arguments.

  Raises:
    errors.UserError: If neither levels nor memories learn, the levels do not
      fit the model, or its state does not hold a segment.
  """
  config, clocks = model.config, f'update_every={inner.update_every}'
  attends = lambda mixer: isinstance(mixer, layers.AttentionConfig)
  if not inner.is_on and all(map(attends, config.pattern)):
    raise errors.UserError(
      f'inner.levels, with {clocks}, lets no level learn, the model has no '
      'memories, and a session is there to learn; leave out inner for the '
      'default.'
    )
  programs = session_compiled.make(config, model.head, inner)
  if programs.segment_size > config.max_length:
    raise errors.UserError(
      f'a segment of {programs.segment_size} tokens (inner.levels with '
      f'{clocks}) is longer than model.max_length={config.max_length}; lower '
      'the one or raise the other.'
    )
  return programs


def _make_room(programs, params, now: Snapshot) -> Snapshot:
  """Begins new streams in rows at a border whose next segment will not fit."""
  if programs.max_stream is None:
    return now
  size = programs.segment_size
  full = (now.clock % size == 0) & (now.age + size > programs.max_stream)
  if not full.any():
    return now
  state = programs.restart(params, now.state, full)
  return Snapshot(state, now.clock, np.where(full, 0, now.age))


def _array(name, x):
  try:
    return np.asarray(x)
  except ValueError as error:
    raise errors.UserError(
      f'{name} are rows of different lengths; pad them, and mask the padding.'
    ) from error
