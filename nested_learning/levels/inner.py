"""Config of the levels that learn inside a sequence."""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from nested_learning import errors
from nested_learning import optimizers
from nested_learning.levels import steps

_SGD = optimizers.configs.Sgd()
# Names of the parameters of an MLP that learn.
_NAMES = {
  'output': ('down', 'down_bias'),
  'low_rank': ('gate', 'up', 'down'),
}


@dataclasses.dataclass(frozen=True)
class InnerLevelConfig:
  """How one level of a chain learns inside a sequence."""

  # Tokens of a row between two steps; None for a level that rests. The papers
  # use 512, 2K, 8K and 32K.
  update_every: int | None = None
  learning_rate: float = 1.0
  optimizer: optimizers.OptimizerConfig = _SGD
  # Largest norm of the gradient, with the erasing term of 'dgd'; None is any.
  clip_norm: float | None = 1.0
  # Loss of the level: 'next_token' is the model's; 'in_segment' is the same
  # among the tokens of a segment, and does not lower the probability of all
  # others; 'l2' and 'dot' are local losses of the level's own input and output
  # (`layers.local_losses.LocalLoss`), which need no backward pass.
  objective: Literal['next_token', 'in_segment', 'l2', 'dot'] = 'next_token'

  SHORT: ClassVar = 'update_every'  # as in --set=inner.levels=128,512

  def __post_init__(self):
    errors.check_choices(self)
    check = functools.partial(errors.check_field, self)
    fine = self.update_every is None or self.update_every >= 2
    check('update_every', fine, 'at least 2 tokens, or None')
    fine = 0 <= self.learning_rate < math.inf
    check('learning_rate', fine, 'a finite number from 0 up')
    fine = isinstance(self.optimizer, optimizers.OptimizerConfig)
    check('optimizer', fine, 'a config of nested_learning.optimizers.configs')
    fine = self.clip_norm is None or self.clip_norm > 0
    check('clip_norm', fine, 'above 0, or None')


@dataclasses.dataclass(frozen=True)
class InnerConfig:
  """How the levels of a chain learn inside a sequence.

  Only the chains of the last blocks learn, see `depth`: the gradient of a
  next-token loss costs a backward pass through the blocks that learn.
  `make_inner` makes the config of levels that are alike.

  References:
    Sun et al., arXiv:2512.23675, 2025 (the last quarter of the blocks).
  """

  # One for each level of the chain, fastest first; () turns learning off.
  levels: tuple[InnerLevelConfig, ...] = ()
  depth: float = 0.25  # share of the blocks that learn, the last ones
  # Parameters of a level that learn: all; those of its output alone, whose
  # state is a third as large; or changes of a low rank of its matrices.
  learns: Literal['every_map', 'output', 'low_rank'] = 'every_map'
  rank: int = 8  # of the changes, with learns='low_rank'
  # Reduction of the gradients between two steps; the paper's is 'sum'.
  reduce: Literal['mean', 'sum'] = 'mean'
  # How training differentiates the steps: 'second_order' through them,
  # 'first_order' with the inner gradients as constants.
  gradient: Literal['first_order', 'second_order'] = 'second_order'
  max_drift: float = 1.0  # distance from the start, in norms of the start

  RENAMED: ClassVar = {
    'chunk_sizes': 'levels.0.update_every',
    'update_every': 'levels.0.update_every',
    'learning_rates': 'levels.0.learning_rate',
    'optimizer': 'levels.0.optimizer',
    'clip_norm': 'levels.0.clip_norm',
    'objective': 'levels.0.objective',
  }

  def __new__(cls, *args: Any, **settings: Any) -> 'InnerConfig':
    """Answers old names of fields with the new ones."""
    del args
    for name in settings:
      if name in cls.RENAMED:
        raise errors.UserError(
          f'inner.{name} is now called inner.{cls.RENAMED[name]}; '
          'levels.make_inner makes levels that are alike.'
        )
    return super().__new__(cls)

  def __post_init__(self):
    errors.check_choices(self)
    check = functools.partial(errors.check_field, self)
    fine = isinstance(self.levels, tuple) and all(
      isinstance(level, InnerLevelConfig) for level in self.levels
    )
    check('levels', fine, 'a tuple of InnerLevelConfig, as of make_inner')
    check('depth', 0 < self.depth <= 1, 'above 0, and 1 at most')
    check('max_drift', self.max_drift > 0, 'above 0')
    check('rank', self.rank >= 1, 'at least 1')
    if self.learns == 'low_rank':
      self._check_low_rank()

  def _check_low_rank(self) -> None:
    """Refuses levels that need more of their matrices than a gradient."""
    for i, level in enumerate(self.levels):
      field, value = 'objective', level.objective
      if isinstance(level.optimizer, optimizers.configs.Dgd):
        field, value = 'optimizer', 'dgd'
      elif value not in ('l2', 'dot'):
        continue
      raise errors.UserError(
        f'inner.levels.{i}.{field}={value} needs the inputs of whole matrices, '
        "which inner.learns='low_rank' does not change; choose another of the "
        'two.'
      )

  @property
  def is_on(self) -> bool:
    """Whether any level learns."""
    return any(size is not None for size in self.update_every)

  @property
  def update_every(self) -> tuple[int | None, ...]:
    """Tokens between two steps of each level, fastest first."""
    return tuple(level.update_every for level in self.levels)

  def own_labels(self, labels: Any) -> Any:
    """Returns labels of parameters, 'base' for those of levels that rest."""
    if self.learns == 'every_map':
      return labels
    names = _NAMES[self.learns]
    return jax.tree_util.tree_map_with_path(
      lambda path, label: label if path[-1].key in names else 'base', labels
    )

  def num_blocks(self, of: int) -> int:
    """Returns how many of a model's blocks learn: `depth`, rounded up."""
    return math.ceil(self.depth * of - 1e-9)


def make_inner(
  update_every: Sequence[int | None],
  *,
  learning_rate: float | tuple[float, ...] = 1.0,
  optimizer: optimizers.OptimizerConfig | tuple[Any, ...] = _SGD,
  clip_norm: float | None | tuple[float | None, ...] = 1.0,
  objective: str | tuple[str, ...] = 'next_token',
  **settings: Any,
) -> InnerConfig:
  """Makes the config of levels that are alike but for their clocks.

  Args:
    update_every: Tokens between two steps of each level, fastest first.
    learning_rate: See `InnerLevelConfig`; a tuple has one for each level, also
      below.
    optimizer: See `InnerLevelConfig`.
    clip_norm: See `InnerLevelConfig`.
    objective: See `InnerLevelConfig`.
    **settings: Other fields of `InnerConfig`.

  Returns:
    The config.

  Raises:
    errors.UserError: A tuple has another length, or a setting is out of range.
  """
  fields = {
    'learning_rate': learning_rate,
    'optimizer': optimizer,
    'clip_norm': clip_norm,
    'objective': objective,
  }
  size = len(update_every)
  for name, value in fields.items():
    fields[name] = value if isinstance(value, tuple) else (value,) * size
    if len(fields[name]) != size:
      raise errors.UserError(
        f'{name}={value} must be one value, or one for each of '
        f'update_every={tuple(update_every)}.'
      )
  entries = zip(update_every, *fields.values(), strict=True)
  return InnerConfig(tuple(InnerLevelConfig(*x) for x in entries), **settings)


def make_levels(
  config: InnerConfig, names: Sequence[str]
) -> list[steps.LearningLevel]:
  """Makes the levels that learn, with their clocks and optimisers.

  Args:
    config: How levels learn.
    names: Names of the levels of the chain, fastest first.

  Returns:
    One `LearningLevel` for each level that does not rest.

  Raises:
    errors.UserError: The config is for another number of levels, lists a slower
      one before a faster one, or has a setting without effect.
  """
  sizes = config.update_every
  if not names:
    raise errors.UserError(
      f'inner.levels, with update_every={sizes}, is for a model without a '
      'chain of levels; name some in model.levels, or set inner.levels=().'
    )
  if len(sizes) != len(names):
    raise errors.UserError(
      f'inner.levels, with update_every={sizes}, must have one entry for each '
      f'of the {len(names)} levels of the chain ({", ".join(names)}); one with '
      'update_every=None rests.'
    )
  given = [size for size in sizes if size is not None]
  if given != sorted(given):
    raise errors.UserError(
      f'inner.levels, with update_every={sizes}, has a slower level before a '
      'faster one; levels are listed fastest first, so that sizes rise.'
    )
  return [
    _make_level(i, name, level)
    for i, (name, level) in enumerate(zip(names, config.levels, strict=True))
    if level.update_every is not None
  ]


def clock_warnings(
  config: InnerConfig, num_tokens: int, *, field: str = 'inner'
) -> list[str]:
  """Describes levels that never step, because streams are too short.

  Args:
    config: How levels learn.
    num_tokens: Tokens of a stream.
    field: Name of the config, for the sentences.

  Returns:
    One sentence per level; none if all levels step.
  """
  return [
    f'{field}.levels.{i}.update_every={every} is longer than a stream of '
    f'{num_tokens} tokens: this level never steps; lower it, or read longer '
    'streams.'
    for i, every in enumerate(config.update_every)
    if every is not None and every > num_tokens
  ]


def make_optimizer(config: InnerLevelConfig) -> optax.GradientTransformation:
  """Makes the optimiser of a level, for stacks of the blocks' matrices."""
  made = optimizers.configs.make(
    config.optimizer,
    config.learning_rate,
    dimension_numbers=_dimension_numbers,
    # The energy of parameters that are no maps is 0, and so they take gradient
    # steps: a fallback with the rate of the maps would be of another size.
    maps=lambda params: jax.tree.map(lambda _: True, params),
  )
  if config.clip_norm is None:
    return made
  return optax.chain(_clip(config.clip_norm), made)


def _make_level(index, name, config: InnerLevelConfig) -> steps.LearningLevel:
  dgd = config.optimizer
  if not isinstance(dgd, optimizers.configs.Dgd):
    dgd = None
  else:
    for field in ('fallback', 'fallback_scale'):
      value = getattr(dgd, field)
      if value != getattr(type(dgd)(), field):
        raise errors.UserError(
          f'inner.levels.{index}.optimizer.{field}={value} has no effect '
          'inside a sequence, where norms take gradient steps; leave it out.'
        )
  return steps.LearningLevel(
    name, config.update_every, make_optimizer(config), config.objective, dgd
  )


def _dimension_numbers(params: Any) -> Any:
  """Returns the axes of stacked matrices [block, in, out]; None for norms."""

  def axes(x):
    if x.ndim < 3:
      return None
    return optax.contrib.MuonDimensionNumbers((x.ndim - 2,), (x.ndim - 1,))

  return jax.tree.map(axes, params)


def _clip(max_norm: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, differentiable at a gradient of zero.

  A segment without targets has a gradient of zero, and an outer gradient goes
  through its norm.
  """
  limit = max_norm**2

  def clip(updates, params=None):
    del params
    square = optax.tree.norm(updates, squared=True)
    scale = max_norm * jax.lax.rsqrt(jnp.maximum(square, limit))
    return jax.tree.map(
      lambda u: jnp.where(square > limit, scale * u, u).astype(u.dtype), updates
    )

  return optax.stateless(clip)
