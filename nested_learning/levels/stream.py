"""A stream of a model whose levels learn: what it carries, and who reads it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class LevelState(NamedTuple):
  """One level in every row; all leaves begin with the rows [b].

  Attributes:
    params: The level's weights.
    optimizer: State of its optimiser.
    accumulated: Sum of gradients since the last step; () where a chunk is one
      segment.
    num_targets: float32, predictions in that sum.
    num_updates: int32, steps so far.
    gradient_norm: Norm of the gradient of the last step.
    update_norm: Norm of the last step.
    drift: Distance of the weights from their start, over the start's norm.
    frozen: Whether a step diverged: the weights are those of the start again,
      and stay so.
  """

  params: Any
  optimizer: Any
  accumulated: Any
  num_targets: jax.Array
  num_updates: jax.Array
  gradient_norm: jax.Array
  update_norm: jax.Array
  drift: jax.Array
  frozen: jax.Array


class Segment(NamedTuple):
  """The segment that is being read.

  Attributes:
    model: The model's state before its first token, rows first.
    tokens: int32 [b, s].
    reset: bool [b, s].
    count: int32 [b], tokens that were read, less than s.
  """

  model: Any
  tokens: jax.Array
  reset: jax.Array
  count: jax.Array


class State(NamedTuple):
  """A stream of a model whose levels learn; all leaves begin with [b].

  Attributes:
    model: The model's state after the last token, rows first.
    segment: What is needed to learn from the segment when it is whole.
    num_segments: int32 [b], whole segments so far: the clock of the levels.
    levels: From name to `LevelState`.
  """

  model: Any
  segment: Segment
  num_segments: jax.Array
  levels: Mapping[str, LevelState]


class Reader(NamedTuple):
  """A model whose levels learn while they read.

  Attributes:
    segment_size: Tokens of a segment.
    init_state: `init_state(params, batch_size) -> State`.
    read: `read(params, state, tokens, *, reset=None, mask=None, write=True)`
      gives logits [b, t, v] and the state after the tokens; the same contract
      as a model's `forward`. With write=False neither memories nor levels
      change, and the tokens are forgotten at the segment's end.
    read_segments: `read_segments(params, state, tokens, *, reset=None)` is the
      same for whole segments from the border of one, each read only once.
    read_piece: `read_piece(params, state, tokens, *, reset, mask)` reads tokens
      that are in front of their rows and end within the segment, and keeps them
      for its end, but takes no step.
    losses: `losses(params, state, tokens, targets, token_loss, *, reset=None)`
      gives the losses [b, t] of whole segments instead of their logits, which
      the backward pass then need not keep.
    prepare: `prepare(params)` gives parameters that all of these take as well,
      and that spare every call a copy of the blocks.
  """

  segment_size: int
  init_state: Callable[[Any, int], State]
  read: Callable[..., tuple[jax.Array, State]]
  read_segments: Callable[..., tuple[jax.Array, State]]
  read_piece: Callable[..., tuple[jax.Array, State]]
  losses: Callable[..., tuple[jax.Array, State]]
  prepare: Callable[[Any], Any] = lambda params: params
