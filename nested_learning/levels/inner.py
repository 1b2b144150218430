"""Config of the levels that learn inside a sequence."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from nested_learning import errors
from nested_learning import optimizers

_OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
  'sgd': optax.sgd,
  'momentum': lambda rate: optax.sgd(rate, momentum=0.9),
  # eps_root: the root has no derivative at a gradient of zero.
  'adam': lambda rate: optax.adam(rate, b1=0.9, b2=0.95, eps_root=1e-20),
  'm3': optimizers.m3,
  'delta_momentum': optimizers.delta_momentum,
  'preconditioned_momentum': optimizers.preconditioned_momentum,
}


@dataclasses.dataclass(frozen=True)
class InnerConfig:
  """How the levels of a chain learn inside a sequence.

  Tuples have one entry per level of the chain, fastest first. Only the chains
  of the last blocks learn, see `depth`: the gradient of a next-token loss costs
  a backward pass through the blocks that learn.

  References:
    Sun et al., arXiv:2512.23675, 2025 (the last quarter of the blocks).
  """

  # Tokens of a row between two steps of a level; None for a level that rests.
  # () turns learning off. The papers use 512, 2K, 8K and 32K.
  update_every: tuple[int | None, ...] = ()
  learning_rates: tuple[float, ...] = (1.0,)  # one per level, or one for all
  optimizer: Literal[
    'sgd',
    'momentum',
    'adam',
    'm3',
    'delta_momentum',
    'preconditioned_momentum',
  ] = 'sgd'
  clip_norm: float | None = 1.0  # largest gradient norm of a level; None is any
  # Loss of a level: 'next_token' is the model's; 'in_segment' is the same among
  # the tokens of a segment, and does not lower the probability of all others;
  # 'l2' and 'dot' are local losses of a level's own input and output
  # (`layers.local_losses.LocalLoss`), which need no backward pass.
  objective: Literal['next_token', 'in_segment', 'l2', 'dot'] = 'next_token'
  depth: float = 0.25  # share of the blocks that learn, the last ones
  # Reduction of the gradients between two steps; the paper's is 'sum'.
  reduce: Literal['mean', 'sum'] = 'mean'
  # How training differentiates the steps: 'second_order' through them,
  # 'first_order' with the inner gradients as constants.
  gradient: Literal['first_order', 'second_order'] = 'second_order'
  max_drift: float = 1.0  # distance from the start, in norms of the start

  RENAMED: ClassVar = {'chunk_sizes': 'update_every'}

  def __post_init__(self):
    errors.check_choices(self)
    check = functools.partial(errors.check_field, self)
    fine = all(size is None or size >= 2 for size in self.update_every)
    check('update_every', fine, 'numbers of at least 2 tokens, or None')
    fine = all(0 <= rate < float('inf') for rate in self.learning_rates)
    check('learning_rates', fine, 'numbers from 0 up')
    if len(self.learning_rates) not in (1, len(self.update_every) or 1):
      raise errors.UserError(
        f'learning_rates={self.learning_rates} must have one number, or one '
        f'for each of update_every={self.update_every}.'
      )
    clip = self.clip_norm
    check('clip_norm', clip is None or clip > 0, 'above 0, or None')
    check('depth', 0 < self.depth <= 1, 'above 0, and 1 at most')
    check('max_drift', self.max_drift > 0, 'above 0')

  @property
  def is_on(self) -> bool:
    """Whether any level learns."""
    return any(size is not None for size in self.update_every)

  def num_blocks(self, of: int) -> int:
    """Returns how many of a model's blocks learn: `depth`, rounded up."""
    return math.ceil(self.depth * of - 1e-9)


def make_levels(
  config: InnerConfig, names: Sequence[str]
) -> list[optimizers.Level]:
  """Makes the levels that learn, with their clocks and optimisers.

  Args:
    config: How levels learn.
    names: Names of the levels of the chain, fastest first.

  Returns:
    One `optimizers.Level` for each level that does not rest.

  Raises:
    errors.UserError: The config is for another number of levels, or lists a
      slower one before a faster one.
  """
  sizes = config.update_every
  if len(sizes) != len(names):
    raise errors.UserError(
      f'inner.update_every={sizes} must have one entry for each of the '
      f'{len(names)} levels of the chain ({", ".join(names)}); None rests.'
    )
  given = [size for size in sizes if size is not None]
  if given != sorted(given):
    raise errors.UserError(
      f'inner.update_every={sizes} has a slower level before a faster one; '
      'levels are listed fastest first, so that sizes rise.'
    )
  rates = config.learning_rates
  rates = rates * len(names) if len(rates) == 1 else rates
  return [
    optimizers.Level(name, size, make_optimizer(config, rate))
    for name, size, rate in zip(names, sizes, rates, strict=True)
    if size is not None
  ]


def make_optimizer(
  config: InnerConfig, learning_rate: float
) -> optax.GradientTransformation:
  """Makes the optimiser of a level with this learning rate."""
  made = _OPTIMIZERS[config.optimizer](learning_rate)
  if config.clip_norm is None:
    return made
  return optax.chain(_clip(config.clip_norm), made)


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
