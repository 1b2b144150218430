"""What a session computes: programs that all sessions on a model share."""

from collections.abc import Callable, Iterator
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import levels
from nested_learning import models
from nested_learning.inference import generate as generate_lib
from nested_learning.levels import partition
from nested_learning.levels import stream as stream_lib


class SessionState(NamedTuple):
  """What a session remembers; all leaves begin with the rows [b].

  Attributes:
    stream: The model's memories, the levels and their clocks.
    logits: [b, v], of the next token.
  """

  stream: stream_lib.State
  logits: jax.Array


class Programs(NamedTuple):
  """What all sessions on one model share: compiled functions.

  Attributes:
    segment_size: Tokens of a segment.
    prepare: `prepare(params)` gives what the others take, or take as well.
    init: `init(params, num_rows) -> SessionState`.
    segment: A whole segment from its start, with its steps.
    piece: Tokens within a segment, without.
    where: `where(rows, new, old)` takes whole rows of states.
    restart: Begins new streams in some rows, with the levels as they are.
    make_write: `make_write(draw)` gives `write(params, state, key)`, which
      draws tokens after a state, with levels at rest; one for each draw.
  """

  segment_size: int
  prepare: Callable[[Any], Any]
  init: Callable[..., SessionState]
  segment: Callable[..., Any]
  piece: Callable[..., Any]
  where: Callable[..., SessionState]
  restart: Callable[..., SessionState]
  make_write: Callable[[generate_lib.DrawConfig], Callable[..., Any]]


class Piece(NamedTuple):
  """Tokens that are read together: places [b, n] in the call, and which are."""

  index: np.ndarray
  there: np.ndarray


def pieces(mask, offset, size) -> Iterator[Piece]:
  """Cuts a call at the borders of each row's segments.

  Args:
    mask: bool [b, t], which tokens are there.
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


def make_programs(model: models.Model, inner: levels.InnerConfig) -> Programs:
  """Makes the programs of sessions on a model.

  Args:
    model: From `models.make_model`.
    inner: How its levels learn.

  Returns:
    The functions; each is compiled once per shape of what it is given.
  """
  reader = models.make_reader(model, inner)
  vocab_size = model.config.vocab_size

  def init(params, num_rows):
    return SessionState(
      reader.init_state(params, num_rows),
      jnp.zeros((num_rows, vocab_size), jnp.float32),
    )

  def judge(state, logits, tokens):
    before = jnp.concatenate([state.logits[:, None], logits[:, :-1]], axis=1)
    return optax.softmax_cross_entropy_with_integer_labels(before, tokens)

  @jax.jit
  def segment(params, state, tokens, reset):
    logits, stream = reader.read_segments(
      params, state.stream, tokens, reset=reset
    )
    losses = judge(state, logits, tokens)
    return losses, SessionState(stream, logits[:, -1])

  @jax.jit
  def piece(params, state, tokens, reset, mask):
    logits, stream = reader.read_piece(
      params, state.stream, tokens, reset=reset, mask=mask
    )
    count = jnp.sum(mask, axis=1)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(logits, last, axis=1)[:, 0]
    losses = judge(state, logits, tokens)
    return losses, SessionState(
      stream, partition.where(count > 0, last, state.logits)
    )

  @jax.jit
  def restart(params, state, rows):
    axes = partition.row_axes(model.init_state, params)
    fresh = partition.rows_first(axes, model.init_state(params, rows.shape[0]))
    begin = lambda old: partition.where(rows, fresh, old)
    stream = state.stream
    stream = stream._replace(
      model=begin(stream.model),
      segment=stream.segment._replace(model=begin(stream.segment.model)),
    )
    return state._replace(stream=stream)

  def continue_row(params, stream, tokens, *, mask):
    # The buffer of the segment is not looked at again.
    reset = jnp.zeros(tokens.shape, bool)
    return reader.read_piece(params, stream, tokens, reset=reset, mask=mask)

  @functools.cache
  def make_write(draw):
    write = generate_lib.make_draw(continue_row, draw)
    return jax.jit(
      lambda params, state, key: write(params, state.logits, state.stream, key)
    )

  return Programs(
    reader.segment_size,
    jax.jit(reader.prepare),
    jax.jit(init, static_argnums=1),
    segment,
    piece,
    jax.jit(partition.where),
    restart,
    make_write,
  )
