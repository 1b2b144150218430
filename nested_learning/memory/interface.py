"""What the engine takes and gives: rules, feeds and states of memories."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import objectives
from nested_learning.memory import tails


@dataclasses.dataclass(frozen=True)
class Rule:
  """How a memory is written and read; functions, not their names."""

  chunk_size: int  # tokens that share one anchor; 1 is the token recurrence
  objective: objectives.Objective = objectives.l2
  # Maps with the delta rule: those that read the 'input', those that make an
  # 'output', 'every_map' or 'none'; the map of a matrix is both.
  erase: str = 'input'
  learns: str = 'every_map'  # maps that are written; or those of an 'output'
  erase_from: str = 'previous'  # weights; or 'retained', after retention
  retain_to: str = 'initial'  # what retention decays towards; or 'zero'
  momentum: bool = False  # whether feeds have a momentum
  read: str = 'token'  # after each token's write; 'chunk', its anchor; 'none'
  target: str = 'own'  # the memory's own output for the value; or 'value'
  normalize_target: Callable[[jax.Array], jax.Array] | None = None
  max_norm: float | None = None  # of a map's departure from its initial weights
  window: int = 1  # tokens whose errors a token's step sums; see `tails.py`
  step: str = 'gradient'  # or 'orthogonal', see `orthogonal.py`
  errors: str = 'propagated'  # or 'local', see `local.py`
  # What is written need not be what is read: Miras' retention map, from the one
  # to the other, taken at chunk starts. None is the identity.
  to_weights: Callable[[Any], Any] | None = None

  def __post_init__(self):
    if self.chunk_size < 1:
      raise ValueError(f'{self.chunk_size=} must be at least 1 token.')
    _one_of('erase', self.erase, ('none', 'input', 'output', 'every_map'))
    _one_of('learns', self.learns, ('every_map', 'output'))
    _one_of('erase_from', self.erase_from, ('previous', 'retained'))
    _one_of('retain_to', self.retain_to, ('zero', 'initial'))
    _one_of('read', self.read, ('token', 'chunk', 'none'))
    _one_of('target', self.target, ('own', 'value'))
    _one_of('step', self.step, ('gradient', 'orthogonal'))
    _one_of('errors', self.errors, ('propagated', 'local'))
    if self.window < 1:
      raise ValueError(f'{self.window=} must be at least 1 token.')
    if self.window > 1:
      self._needs(
        f'window={self.window}', erase='none', learns='every_map', read='token'
      )
    if self.step == 'orthogonal':
      self._needs(
        f'step={self.step!r}',
        erase='none',
        learns='every_map',
        read='token',
        momentum=True,
      )
    if self.errors != 'propagated':
      self._needs(
        f'errors={self.errors!r}',
        erase='every_map',
        learns='every_map',
        erase_from='previous',
        momentum=False,
        read='token',
        target='value',
        window=1,
        step='gradient',
      )
    if self.to_weights and (self.read == 'token' or self.erase != 'none'):
      raise ValueError(
        f'to_weights acts at chunk starts: with {self.read=} and '
        f"{self.erase=} there is no such rule; use 'chunk' and 'none'."
      )

  def _needs(self, what: str, **settings: Any) -> None:
    for name, value in settings.items():
      if getattr(self, name) != value:
        raise ValueError(
          f'{what} is not defined with {name}={getattr(self, name)!r}; '
          f'set it to {value!r}.'
        )

  def weights(self, memory: Any) -> Any:
    """The weights that a memory, as it was written, stands for."""
    return memory if self.to_weights is None else self.to_weights(memory)


class Feed(NamedTuple):
  """What tokens write and read with; the token axis is last but one.

  Attributes:
    key: [b, h, t, d].
    value: [b, h, t, d].
    inner_lr: [b, h, t, 1], >= 0.
    retention: [b, h, t, 1], in [0, 1].
    momentum: [b, h, t, 1] or None.
    query: [b, h, t, d], or None where nothing is read.
    weight: [b, h, t, 1], of the token's error in the trace, with rule.step
      'orthogonal'; else None.
    hidden_lr: [b, h, t, 1], inner_lr of the second map, with rule.errors
      'local'; None for inner_lr.
    extra: Whatever else `project` makes of the tokens, a pytree of
      [b, h, t, ...] that is handed through to the result.
  """

  key: jax.Array
  value: jax.Array
  inner_lr: jax.Array
  retention: jax.Array
  momentum: jax.Array | None = None
  query: jax.Array | None = None
  weight: jax.Array | None = None
  hidden_lr: jax.Array | None = None
  extra: Any = None


class State(NamedTuple):
  """A memory between two calls, one row per sequence.

  Attributes:
    memory: Weights per map, [b, h, ..., out, in].
    anchor: The weights at the start of the current chunk.
    trace: The momentum's buffer per map, or None.
    offset: int32 [b], tokens of the current chunk that were read.
    tail: The last tokens that were written, with rule.window above 1.
  """

  memory: Any
  anchor: Any
  trace: Any
  offset: jax.Array
  tail: tails.Tail | None = None


class Result(NamedTuple):
  """What a call gives per token.

  Attributes:
    read: [b, h, t, d], or None with rule.read 'none'.
    feed: With rule.read 'none', the `Feed` of every token as `project` made it;
      else None.
  """

  read: jax.Array | None
  feed: Feed | None


# Makes the feed of some tokens from the weights of the anchor and the inputs of
# a self-modifying memory; None for a static one, whose inputs are its feed.
Project = Callable[[Any, Any], Feed] | None


def init_state(
  initial: Any, batch_size: int, *, momentum: bool = False, window: int = 1
) -> State:
  """The state at a stream's start: every row holds the initial memory.

  Args:
    initial: Initial memory per map, [h, ..., out, in].
    batch_size: Rows b.
    momentum: Whether the rates have momentum.
    window: Tokens whose errors a token's step sums.

  Returns:
    A `State`.
  """
  memory = jax.tree.map(
    lambda w: jnp.broadcast_to(w, (batch_size, *w.shape)), initial
  )
  trace = jax.tree.map(jnp.zeros_like, memory) if momentum else None
  tail = tails.init_tail(initial, batch_size, window) if window > 1 else None
  offset = jnp.zeros((batch_size,), jnp.int32)
  return State(memory, memory, trace, offset, tail)


def _one_of(name, value, known):
  if value not in known:
    raise ValueError(f'{name}={value!r} must be one of {", ".join(known)}.')
