"""A slower level for a model that is trained: begun from what it knows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning.layers import cms
from nested_learning.models import trunk


def add_level(
  config: trunk.ModelConfig,
  params: Any,
  *,
  name: str,
  train_every: int | None = None,
) -> tuple[trunk.ModelConfig, Any]:
  """Adds a level after the slowest one, and starts it warm.

  The new level has the norm, the gate and the features of the slowest level,
  and an output of zero. So the model's logits are what they were, bit for bit,
  and the first gradient that the new level gets is about features that are
  trained already. A level that starts cold, with features drawn at random, was
  seen to stay silent (NL section 7 names no start; push-up stacking is what
  reproductions do instead).

  Args:
    config: The model.
    params: Its parameters, of a checkpoint.
    name: Of the new level.
    train_every: Its tokens between updates in training, see `cms.LevelConfig`.

  Returns:
    The config and the parameters of the model with the level.

  Raises:
    errors.UserError: The name is taken, or the level is not slower than those
      that are there.
  """
  slowest = config.levels[-1]
  if name in ('base', *(level.name for level in config.levels)):
    raise errors.UserError(
      f'a level cannot be named {name!r}: the name is taken; give another.'
    )
  level = cms.LevelConfig(name, slowest.mlp_dim, train_every)
  config = dataclasses.replace(config, levels=(*config.levels, level))

  def extend(block):
    source = block['levels'][slowest.name]
    new = {**source, 'down': jnp.zeros_like(source['down'])}
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
