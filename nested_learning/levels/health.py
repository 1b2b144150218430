"""How the levels of a stream are doing, and which of them are dead."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning.levels import reader
from nested_learning.levels import steps
from nested_learning.levels import trees

# A step of less than this of the weights' norm moves no float32 weight.
_LEAST_RATIO = 1e-7
# Of the largest gradient among the levels. A slow level that started cold was
# seen to fall from 1e-4 to 2e-6 in absolute numbers, and never learned.
_LEAST_SHARE = 1e-4
_FEWEST_UPDATES = 2  # before anything is said


class Health(NamedTuple):
  """One level, by row [b].

  Attributes:
    num_updates: Steps so far.
    gradient_norm: Of the last step.
    update_norm: Of the last step.
    update_ratio: Of the last step, over the norm of the weights.
    drift: Distance of the weights from their start, over the start's norm.
    frozen: Whether the level diverged and rests since.
    dead: Whether the level takes steps that change nothing, or gets next to
      no gradient beside the other levels.
  """

  num_updates: jax.Array
  gradient_norm: jax.Array
  update_norm: jax.Array
  update_ratio: jax.Array
  drift: jax.Array
  frozen: jax.Array
  dead: jax.Array


def measure_health(state: reader.State) -> dict[str, Health]:
  """Measures the levels of a stream.

  Args:
    state: Of a model whose levels learn.

  Returns:
    By name of level, fastest first.
  """
  gradients = [level.gradient_norm for level in state.levels.values()]
  largest = jnp.max(jnp.stack(gradients), axis=0)
  return {
    name: _measure(level, largest) for name, level in state.levels.items()
  }


def _measure(level: steps.InnerLevel, largest: jax.Array) -> Health:
  ratio = level.update_norm / jnp.maximum(trees.norm(level.params), 1e-12)
  silent = level.gradient_norm <= _LEAST_SHARE * largest
  dead = (ratio < _LEAST_RATIO) | silent
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
  """What is wrong with levels, one sentence for each that something is.

  Args:
    measured: From `measure_health`.

  Returns:
    Sentences; none where all is well.
  """
  sentences = []
  for name, level in measured.items():
    level = jax.tree.map(np.asarray, level)
    rows = f'in {{}} of {level.frozen.size} streams'
    if level.frozen.any():
      sentences.append(
        f'level {name!r} diverged {rows.format(level.frozen.sum())}: it is '
        'back at its start and frozen; lower its learning rate.'
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
