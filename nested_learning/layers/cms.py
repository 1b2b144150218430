r"""The Continuum Memory System: a chain of MLPs that learn at different clocks.

Each level is a pre-norm residual SwiGLU MLP, f_1 the fastest (`layers/mlp.py`
has other MLPs of pretrained models). The chain connects them in one of three
ways:

* 'sequential': x <- x + f_l(x) for one level after the other;
* 'independent': every level reads the chain's input, and a learned weighted sum
  of the outputs is added, x + \sum_l w_l f_l(x). The weights start at 1, where
  this is one MLP as wide as all levels together;
* 'nested': sequential, and inside a sequence a level restarts when a slower one
  steps, and they are mixed (`levels.steps`, `levels.mixture`).

A Transformer's MLP is the chain of one level. This file computes the chain;
`nested_learning.optimizers.multi_timescale` updates levels in training, and
`nested_learning.levels` inside a sequence.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 70-74, 97.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import re
from typing import Any, ClassVar, Literal

import jax

from nested_learning import errors
from nested_learning import optimizers
from nested_learning import parameters
from nested_learning.layers import mlp as mlp_lib

# Names are part of the paths of parameters and of the names of metrics.
_NAME = re.compile(r'[A-Za-z][A-Za-z0-9_-]{0,63}')


@dataclasses.dataclass(frozen=True)
class LevelConfig:
  """One level of the chain."""

  name: str  # unique within a model; labels its parameters
  mlp_dim: int  # hidden width of its MLP
  # Tokens between updates in training; None is every step.
  train_every: int | None = None
  # Its optimiser in training; None is that of the trainer.
  optimizer: optimizers.OptimizerConfig | None = None
  mlp: mlp_lib.MlpConfig = mlp_lib.MlpConfig()  # its function

  RENAMED: ClassVar = {'chunk_size': 'train_every'}
  SHORT: ClassVar = 'name'  # as in --set=model.levels=fast,slow

  def __post_init__(self):
    is_plain = isinstance(self.name, str) and _NAME.fullmatch(self.name)
    if not is_plain or self.name == 'base':
      raise errors.UserError(
        f'name={self.name!r} must be a letter followed by at most 63 '
        "letters, digits, '_' or '-', and not 'base', which labels parameters "
        'outside the chain.'
      )
    errors.check_field(self, 'mlp_dim', self.mlp_dim >= 1, 'at least 1')
    fine = self.train_every is None or self.train_every >= 1
    errors.check_field(
      self, 'train_every', fine, 'at least 1 token, or None for every step'
    )
    fine = isinstance(self.optimizer, optimizers.OptimizerConfig | None)
    errors.check_field(
      self, 'optimizer', fine, 'a config of nested_learning.optimizers, or None'
    )

  @property
  def trains_apart(self) -> bool:
    """Whether training gives it a clock or an optimiser of its own."""
    return self.train_every is not None or self.optimizer is not None


@dataclasses.dataclass(frozen=True)
class ChainConfig:
  """How levels are connected; the default is Figure 5 of the paper."""

  # Eqs. 73, 74 and 72.
  connection: Literal['sequential', 'independent', 'nested'] = 'sequential'
  # The level that acts first; 'slowest_first' is eq. 70.
  order: Literal['fastest_first', 'slowest_first'] = 'fastest_first'

  def __post_init__(self):
    errors.check_choices(self)


def check(levels: Sequence[LevelConfig], chain: ChainConfig) -> None:
  """Checks that levels make a chain.

  Args:
    levels: The levels, fastest first.
    chain: How they are connected.

  Raises:
    errors.UserError: Two levels have one name, a slower level is listed before
      a faster one, or a nested chain has a clock that is not a multiple of the
      one before it.
  """
  names = [level.name for level in levels]
  for name in names:
    if names.count(name) > 1:
      raise errors.UserError(
        f'two levels are named {name!r}; give every level a name of its own.'
      )
  for faster, slower in itertools.pairwise(levels):
    every, next_every = faster.train_every, slower.train_every
    if every is None:
      continue
    if next_every is None or next_every < every:
      raise errors.UserError(
        f'level {faster.name!r} (train_every={every}) is listed before '
        f'{slower.name!r} (train_every={next_every}), which is faster; list '
        "levels fastest first (model.chain.order='slowest_first' lets the "
        'slowest act first).'
      )
    if chain.connection == 'nested' and next_every % every:
      below = next_every // every * every
      raise errors.UserError(
        f'level {slower.name!r} has train_every={next_every}, no multiple of '
        f'the {every} of level {faster.name!r} inside it; in a nested chain '
        f'set it to {below} or {below + every}.'
      )


def table(levels: Sequence[LevelConfig], *, embed_dim: int) -> parameters.Table:
  """Returns the parameters of the levels, one entry per level."""
  return {
    level.name: level.mlp.table(embed_dim=embed_dim, mlp_dim=level.mlp_dim)
    for level in levels
  }


def mix_table(
  levels: Sequence[LevelConfig], chain: ChainConfig
) -> parameters.Table:
  """Returns the parameters of the connection: 'mix' [levels] or none."""
  if chain.connection != 'independent':
    return {}
  return {
    'mix': parameters.Param(
      (len(levels),), (None,), parameters.constant(1.0), decay=False
    )
  }


def apply(
  levels: Sequence[LevelConfig],
  params: Any,
  x: jax.Array,
  *,
  chain: ChainConfig = ChainConfig(),
  mix: jax.Array | None = None,
) -> jax.Array:
  """Passes x [b, t, e] through the chain.

  Args:
    levels: The levels, fastest first.
    params: Parameters of `table`.
    x: [b, t, e]; the arithmetic has its dtype.
    chain: How they are connected.
    mix: [levels], parameter of `mix_table` if levels are independent.

  Returns:
    [b, t, e].
  """
  mlp = lambda level, x: level.mlp.apply(params[level.name], x)
  return connect(levels, mlp, x, chain=chain, mix=mix)


def connect(
  levels: Sequence[LevelConfig],
  mlp: Callable[[LevelConfig, jax.Array], jax.Array],
  x: jax.Array,
  *,
  chain: ChainConfig,
  mix: jax.Array | None,
) -> jax.Array:
  """Connects levels into a chain.

  Args:
    levels: The levels, fastest first.
    mlp: `mlp(level, x)` is a level's output [b, t, e].
    x: As for `apply`.
    chain: As for `apply`.
    mix: As for `apply`.

  Returns:
    [b, t, e].
  """
  scope = lambda level: jax.named_scope(f'level_{level.name}')  # in profiles
  if chain.connection == 'independent':
    outputs = [scope(level)(mlp)(level, x) for level in levels]
    weights = mix.astype(x.dtype)
    return x + sum(weights[i] * y for i, y in enumerate(outputs))
  first = 1 if chain.order == 'fastest_first' else -1
  for level in levels[::first]:
    x = x + scope(level)(mlp)(level, x)
  return x
