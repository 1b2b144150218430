"""Adds a level to a trained model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning.models import trunk as trunk_lib


def add_level(
  config: trunk_lib.ModelConfig,
  params: Any,
  *,
  name: str,
  train_every: int | None = None,
) -> tuple[trunk_lib.ModelConfig, Any]:
  """Adds a level after the slowest one and starts it warm.

  The new level has the norm, gate and features of the slowest level, and an
  output of zero. So the logits of the model do not change, bit for bit, and the
  first gradient of the new level is one of trained features. Levels with random
  features tend to stay silent. NL section 7 names no start; this is one way of
  stacking.

  Args:
    config: The model.
    params: Its parameters.
    name: Name of the new level.
    train_every: Tokens between its updates in training, see `LevelConfig`.

  Returns:
    Config and parameters of the model with the level.

  Raises:
    errors.UserError: The name is taken, or the level is not slower than the
      others.
  """
  slowest = config.levels[-1]
  level = dataclasses.replace(
    slowest, name=name, train_every=train_every, optimizer=None
  )
  config = dataclasses.replace(config, levels=(*config.levels, level))

  def extend(block):
    source = block['levels'][slowest.name]
    silent = (n for n in ('down', 'down_bias') if n in source)
    new = source | {n: jnp.zeros_like(source[n]) for n in silent}
    block = {**block, 'levels': {**block['levels'], name: new}}
    if 'mix' in block:  # [blocks, levels]
      one = jnp.ones_like(block['mix'][:, :1])
      block['mix'] = jnp.concatenate([block['mix'], one], axis=1)
    return block

  blocks = params['blocks']
  if isinstance(config.mixer, tuple):
    blocks = {place: extend(block) for place, block in blocks.items()}
  else:
    blocks = extend(blocks)
  return config, jax.tree.map(jnp.asarray, {**params, 'blocks': blocks})
