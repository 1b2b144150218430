"""The compiled programs of sessions, and how a call is cut into them.

`Snapshot` is everything that a session remembers; `read` and `forget` take one
and return the next. `read_pieces` is `read` in turns, for callers that do other
work between two of them.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning.inference import draw_rows
from nested_learning.inference import generate
from nested_learning.inference import sampling
from nested_learning.levels import trees

_RESTING_SIZE = 256  # tokens of a segment where memories alone learn


class SessionState(NamedTuple):
  """The state of a session; all leaves begin with the rows [b].

  Attributes:
    stream: The model's memories, the levels and their clocks.
    logits: [b, v], of the next token.
  """

  stream: levels.State
  logits: jax.Array


class Snapshot(NamedTuple):
  """Everything that a session remembers.

  Attributes:
    state: The arrays on the devices.
    clock: int64 [b], tokens that were read.
    age: int64 [b], tokens that the mixers hold.
  """

  state: SessionState
  clock: np.ndarray
  age: np.ndarray

  @property
  def clocks(self) -> dict[str, np.ndarray]:
    """The arrays that are not of the state, by name."""
    return {'clock': self.clock, 'age': self.age}

  def take_rows(self, rows: slice) -> 'Snapshot':
    """Returns some of the rows."""
    return jax.tree.map(lambda x: x[rows], self)


class Programs(NamedTuple):
  """Compiled functions that all sessions on one model share.

  Attributes:
    segment_size: Tokens of a segment.
    max_stream: Most tokens that the mixers hold; None for any number.
    prepare: `prepare(params)` gives the parameters that the others take.
    init: `init(params, num_rows) -> SessionState`.
    shapes: The shapes and types of `init`, without any array.
    segment: Reads whole segments from a border and takes the steps of the
      levels: `segment(params, state, tokens, reset) -> (losses, state)`.
    piece: Reads tokens within a segment, without steps:
      `piece(params, state, tokens, reset, mask) -> (losses, state)`.
    end_segments: `end_segments(params, state, rows)` takes the steps at the end
      of a segment that `piece` has read, in some rows [b].
    restart: `restart(params, state, rows)` begins new streams in some rows,
      with the levels as they are.
    make_draw: `make_draw(config)` gives `draw(params, state, key)`, which
      draws tokens after a state, with levels at rest; cached by config.
    draw_token: Draws one token in every row, see `draw_rows.make_draw_token`.
  """

  segment_size: int
  max_stream: int | None
  prepare: Callable[[Any], Any]
  init: Callable[..., SessionState]
  shapes: Callable[..., SessionState]
  segment: Callable[..., Any]
  piece: Callable[..., Any]
  end_segments: Callable[..., SessionState]
  restart: Callable[..., SessionState]
  make_draw: Callable[[sampling.DrawConfig], Callable[..., Any]]
  draw_token: Callable[..., tuple[draw_rows.Drawn, SessionState]]


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
    places: int [n], their places in the call, or in the piece.
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


def begin(programs: Programs, params: Any, num_rows: int) -> Snapshot:
  """Returns the snapshot of a session that has read nothing."""
  zeros = np.zeros(num_rows, np.int64)
  return Snapshot(programs.init(params, num_rows), zeros, zeros)


def read(
  programs: Programs, params: Any, now: Snapshot, inputs: Inputs
) -> tuple[np.ndarray, Snapshot]:
  """Reads tokens and learns from them.

  Args:
    programs: The compiled functions.
    params: Parameters from `programs.prepare`.
    now: The session before.
    inputs: From `check_inputs`.

  Returns:
    The loss of each token in nats, float32 [b, t], NaN where it has none, and
    the session after.
  """
  losses = np.full(inputs.tokens.shape, np.nan, np.float32)
  for done in read_pieces(programs, params, now, inputs):
    losses[done.rows, done.places] = done.losses
    now = done.now
  return losses, now


def read_pieces(
  programs: Programs,
  params: Any,
  now: Snapshot,
  inputs: Inputs,
  *,
  learn: bool = True,
) -> Iterator[PieceRead]:
  """Reads tokens piece by piece; each takes at most a segment of every row.

  Args:
    programs: The compiled functions.
    params: Parameters from `programs.prepare`.
    now: The session before.
    inputs: From `check_inputs`.
    learn: False lets the levels rest. Such a session can be drawn from, and
      must not go on learning: its open segment is not kept.

  Yields:
    The session after each piece.
  """
  for piece in cut(programs, now, inputs, learn=learn):
    done = read_piece(programs, params, now, gather(inputs, piece), learn=learn)
    places = piece.index[done.rows, done.places]
    now = done.now
    yield done._replace(places=places)


def cut(
  programs: Programs, now: Snapshot, inputs: Inputs, *, learn: bool
) -> Iterator[Piece]:
  """Returns the pieces in which `read_pieces` reads a call."""
  size = programs.segment_size
  offset = now.clock % size if learn else np.zeros_like(now.clock)
  return pieces(inputs.mask, offset, size)


def gather(inputs: Inputs, piece: Piece) -> Inputs:
  """Returns the tokens of a piece."""
  take = lambda x: np.take_along_axis(x, piece.index, axis=1)
  reset = take(inputs.reset) & piece.mask
  return Inputs(take(inputs.tokens), reset, piece.mask)


def read_piece(
  programs: Programs,
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
    learn: See `read_pieces`.

  Returns:
    The session after them; places are those in `inputs`.
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


def forget(
  programs: Programs, params: Any, now: Snapshot, num_tokens: int
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


def make_programs(model: models.Model, inner: levels.InnerConfig) -> Programs:
  """Makes the programs of sessions on a model.

  Sessions on equal configs share them, so that loading one compiles nothing.

  Args:
    model: From `models.make_model`.
    inner: How its levels learn.

  Returns:
    The functions; each is compiled once per shape of its arguments.
  """
  return _make_programs(model.config, model.head, inner)


@functools.lru_cache(maxsize=16)
def _make_programs(config, head, inner) -> Programs:
  learner = models.make_model(config, inner, head=head)
  if learner.reader is None:
    size = min(_RESTING_SIZE, config.max_length)
    learner = models.read_by_segments(learner, size)
  reader = learner.reader

  def init(params, num_rows):
    return SessionState(
      reader.init_state(params, num_rows),
      jnp.zeros((num_rows, config.vocab_size), jnp.float32),
    )

  def shapes(params, num_rows):
    return jax.eval_shape(lambda params: init(params, num_rows), params)

  def token_losses(state, logits, tokens):
    """Loss [b, t] of each token under the logits before it."""
    before = jnp.concatenate([state.logits[:, None], logits[:, :-1]], axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(before, tokens)

  @jax.jit
  def segment(params, state, tokens, reset):
    logits, stream = reader.read_segments(
      params, state.stream, tokens, reset=reset
    )
    losses = token_losses(state, logits, tokens)
    return losses, SessionState(stream, logits[:, -1])

  @jax.jit
  def piece(params, state, tokens, reset, mask):
    logits, stream = reader.read_piece(
      params, state.stream, tokens, reset=reset, mask=mask
    )
    count = jnp.sum(mask, axis=1)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(logits, last, axis=1)[:, 0]  # [b, v]
    losses = token_losses(state, logits, tokens)
    return losses, SessionState(
      stream, trees.where(count > 0, last, state.logits)
    )

  where = jax.jit(trees.where)

  def end_segments(params, state, rows):
    # Read again whole by the program of whole segments, so that levels learn
    # the same bits however the segment was cut.
    segment_state = state.stream.segment
    stream = state.stream._replace(
      model=segment_state.model,
      mixture=segment_state.mixture,
      segment=segment_state._replace(count=jnp.zeros_like(segment_state.count)),
    )
    _, learned = segment(
      params,
      state._replace(stream=stream),
      segment_state.tokens,
      segment_state.reset,
    )
    return where(rows, learned, state)

  @jax.jit
  def restart(params, state, rows):
    return state._replace(stream=reader.restart(params, state.stream, rows))

  @functools.cache
  def make_draw(settings):
    draw = sampling.make_draw(learner, settings)

    def draw_rows(params, state, key):
      keys = sampling.row_keys(key, jnp.arange(len(state.logits)))
      return draw(params, state.logits, state.stream, keys)[0]

    return jax.jit(draw_rows)

  return Programs(
    reader.segment_size,
    models.max_stream_length(config),
    jax.jit(reader.prepare),
    jax.jit(init, static_argnums=1),
    shapes,
    segment,
    piece,
    end_segments,
    restart,
    make_draw,
    draw_rows.make_draw_token(learner),
  )


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
