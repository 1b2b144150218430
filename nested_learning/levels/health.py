"""Health of levels that learn inside a sequence: norms, drift, dead levels."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning.levels import reader
from nested_learning.levels import steps
from nested_learning.levels import trees

# A step below this share of the weights' norm changes no float32 weight.
_LEAST_RATIO = 1e-7
# Least gradient of a living level, as a share of the largest among the levels.
# A slow level without a warm start fell from 1e-4 to 2e-6 and never learned.
_LEAST_SHARE = 1e-4
_FEWEST_UPDATES = 2  # before a level can be called dead


class Health(NamedTuple):
  """Health of one level, by row [b].

  Attributes:
    num_updates: Steps so far.
    gradient_norm: Norm of the gradient of the last step.
    update_norm: Norm of the last step.
    update_ratio: Norm of the last step over the norm of the weights.
    drift: Distance of the weights from their start over the norm of the start.
    frozen: Whether the level has diverged, and rests since.
    dead: Whether the steps change nothing, or the gradient is negligible beside
      those of other levels. A level at rest, whose rate is 0, is not dead.
  """

  num_updates: jax.Array
  gradient_norm: jax.Array
  update_norm: jax.Array
  update_ratio: jax.Array
  drift: jax.Array
  frozen: jax.Array
  dead: jax.Array


def measure_health(state: reader.State) -> dict[str, Health]:
  """Measures the levels of streams.

  Args:
    state: State of a model whose levels learn.

  Returns:
    Health by level name, fastest first.
  """
  if not state.levels:
    return {}
  gradients = [level.gradient_norm for level in state.levels.values()]
  largest = jnp.max(jnp.stack(gradients), axis=0)  # [b]
  return {
    name: _measure(level, largest) for name, level in state.levels.items()
  }


def _measure(level: steps.InnerLevel, largest: jax.Array) -> Health:
  # The floor keeps the ratio of a level at zero finite.
  ratio = level.update_norm / jnp.maximum(trees.norm(level.params), 1e-12)
  silent = level.gradient_norm <= _LEAST_SHARE * largest
  at_rest = (level.update_norm == 0) & (level.gradient_norm > 0)
  dead = ((ratio < _LEAST_RATIO) | silent) & ~at_rest
  dead &= (level.num_updates >= _FEWEST_UPDATES) & ~level.frozen
  return Health(
    num_updates=level.num_updates,
    gradient_norm=level.gradient_norm,
    update_norm=level.update_norm,
    update_ratio=ratio,
    drift=level.drift,
    frozen=level.frozen,
    dead=dead,
  )


def health_warnings(measured: Mapping[str, Health]) -> list[str]:
  """Describes levels that have diverged or are dead.

  Args:
    measured: Result of `measure_health`.

  Returns:
    One sentence per problem; none if all levels are well.
  """
  sentences = []
  for name, level in measured.items():
    level = jax.tree.map(np.asarray, level)
    rows = f'in {{}} of {level.frozen.size} streams'
    if level.frozen.any():
      sentences.append(
        f'level {name!r} diverged {rows.format(level.frozen.sum())}: its '
        'weights are back at their start and frozen; lower its learning rate.'
      )
    if level.dead.any():
      ratio = level.update_ratio[level.dead].max()
      sentences.append(
        f'level {name!r} is dead {rows.format(level.dead.sum())}: after '
        f'{level.num_updates[level.dead].min()} updates the last one was '
        f'{ratio:.1e} of its weights, from a gradient of norm '
        f'{level.gradient_norm[level.dead].max():.1e}; raise its learning rate '
        'or start it from a faster level.'
      )
  return sentences
