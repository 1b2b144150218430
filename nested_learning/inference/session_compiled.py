"""The compiled programs of sessions."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning import levels
from nested_learning import models
from nested_learning.inference import draw_rows
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


@functools.lru_cache(maxsize=16)
def make(
  config: models.ModelConfig, head: models.Head, inner: levels.InnerConfig
) -> Programs:
  """Makes the programs of a model; see `session_programs.make_programs`."""
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
