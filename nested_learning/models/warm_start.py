"""Adds levels and memories to a trained model without changing its logits."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import parameters
from nested_learning import subtrees
from nested_learning.layers import cms
from nested_learning.layers import memory_beside
from nested_learning.models import model as model_lib
from nested_learning.models import trunk as trunk_lib


def add_level(
  config: trunk_lib.ModelConfig,
  params: Any,
  *,
  name: str,
  train_every: int | None = None,
) -> tuple[trunk_lib.ModelConfig, Any]:
  """Adds a level after the slowest one and starts it warm.

  The new level has the norm, gate and features of the slowest level of its
  layer, and an output of zero, see `complete`. So the logits of the model do
  not change, bit for bit, and the first gradient of the new level is one of
  trained features. Levels with random features tend to stay silent. NL section
  7 names no start; this is one way of stacking.

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
  level = dataclasses.replace(
    config.levels[-1], name=name, train_every=train_every, optimizer=None
  )
  placement = config.placement
  if placement.levels != 'all':
    names = [[x.name for x in block.levels] for block in config.blocks]
    table = tuple((*own, name) for own in names)
    placement = dataclasses.replace(placement, levels=table)
  config = dataclasses.replace(
    config, levels=(*config.levels, level), placement=placement
  )
  params = complete(config, params, jax.random.key(0))
  return config, jax.tree.map(jnp.asarray, params)


def stack_levels(
  config: trunk_lib.ModelConfig,
  params: Any,
  names: Sequence[str],
  *,
  placement: str | tuple[tuple[str, ...], ...] = 'cycle',
  train_every: Sequence[int | None] | None = None,
) -> tuple[trunk_lib.ModelConfig, Any]:
  """Makes levels of the MLPs of a trained model, one of them per layer.

  No weight changes. The levels learn at clocks of their own: `inner` has one
  entry for each of them, with its clock, optimiser and rate inside a sequence,
  and `LevelConfig` those in training. With rates of zero, this is the model
  that it was. NL section 7.3 stacks levels in this way.

  Args:
    config: A model with one MLP per layer.
    params: Its parameters.
    names: Names of the levels, fastest first.
    placement: Layers of each level, see `PlacementConfig.levels`.
    train_every: Tokens between updates of each level in training; None for
      updates at every step.

  Returns:
    Config and parameters of the model with these levels.

  Raises:
    errors.UserError: The model has several levels, or the placement does not
      fit it.
  """
  if len(config.levels) != 1:
    listed = ', '.join(level.name for level in config.levels)
    raise errors.UserError(
      f'the model has levels already ({listed}); stack the levels of one with '
      'one MLP per layer.'
    )
  every = train_every or (None,) * len(names)
  levels = tuple(
    dataclasses.replace(config.levels[0], name=name, train_every=clock)
    for name, clock in zip(names, every, strict=True)
  )
  new = dataclasses.replace(
    config,
    levels=levels,
    placement=dataclasses.replace(config.placement, levels=placement),
  )
  return new, _rearrange(config, new, params)


def add_memory(
  config: trunk_lib.ModelConfig,
  params: Any,
  memory: memory_beside.MemoryConfig,
  *,
  layers: Sequence[int] | None = None,
  key: jax.Array | None = None,
) -> tuple[trunk_lib.ModelConfig, Any]:
  """Adds a memory beside the attention of some layers.

  Its output is zero until it is trained, so that the logits do not change; see
  `layers.memory_beside`.

  Args:
    config: A model with attention.
    params: Its parameters.
    memory: The memory, for instance that of a family of the zoo.
    layers: Layers that get one; None is the last third. The gradient of a
      memory passes through all layers above it.
    key: Draws its parameters; None is key 0.

  Returns:
    Config and parameters of the model with memories.

  Raises:
    errors.UserError: A layer does not exist, or has no attention, or the model
      has memories already.
  """
  if config.placement.memory is not None:
    raise errors.UserError(
      f'layers {config.placement.memory_layers} have a memory already; add it '
      'to the model without.'
    )
  if layers is None:
    layers = range(config.num_layers * 2 // 3, config.num_layers)
  new = dataclasses.replace(
    config,
    placement=dataclasses.replace(
      config.placement, memory=memory, memory_layers=tuple(layers)
    ),
  )
  key = jax.random.key(0) if key is None else key
  return new, complete(new, _rearrange(config, new, params), key)


def complete(config: trunk_lib.ModelConfig, params: Any, key: jax.Array) -> Any:
  """Adds the parameters that a model has and pretrained weights lack.

  A level starts with the features of the level before it in its layer, and an
  output of zero: `down` is zero, or the scale of a norm after the level. Such a
  norm would blow up any output that is not exactly zero, and its gradient.
  Everything else is drawn, as at the start of training.

  Args:
    config: The model.
    params: Some of its parameters, with the first level of every layer.
    key: From `jax.random.key`.

  Returns:
    All parameters.

  Raises:
    errors.UserError: A level is not as wide as the level before it.
  """
  params = dict(params)
  blocks = params['blocks']
  if config.is_grouped:
    params['blocks'] = {
      str(i): _add_levels(block, blocks[str(i)])
      for i, block in enumerate(config.blocks)
    }
  else:
    params['blocks'] = _add_levels(config.blocks[0], blocks)
  there = set(subtrees.paths(params))
  missing = subtrees.select(
    model_lib.make_model(config).table,
    lambda path: path not in there,
  )
  return subtrees.merge(params, parameters.init(key, missing))


def _add_levels(config, block):
  """Adds the levels that a block lacks, stacked over layers."""
  found, before = dict(block['levels']), None
  for level in config.levels:
    if level.name not in found:
      if (before.mlp_dim, before.mlp) != (level.mlp_dim, level.mlp):
        raise errors.UserError(
          f'level {level.name!r} starts with the features of {before.name!r}, '
          f'and has mlp_dim={level.mlp_dim} in place of {before.mlp_dim}, or '
          'another mlp; give both the same.'
        )
      found[level.name] = _silence(level, found[before.name])
    before = level
  block = {**block, 'levels': found}
  if 'mix' in block:  # [blocks, levels]
    num_new = len(config.levels) - block['mix'].shape[1]
    ones = jnp.ones_like(block['mix'][:, :1])
    block['mix'] = jnp.concatenate([block['mix'], *[ones] * num_new], axis=1)
  return block


def _silence(level: cms.LevelConfig, params):
  """Returns the parameters of a level with an output of zero."""
  norm = level.mlp.norm
  if norm.place == 'both':
    zero = lambda x: jnp.full_like(x, -norm.offset)
    scale = params['norm_after']
    if norm.kind == 'layer':
      silent = {k: jnp.zeros_like(x) for k, x in scale.items()}
      silent['scale'] = zero(scale['scale'])
    else:
      silent = zero(scale)
    return {**params, 'norm_after': silent}
  names = (name for name in ('down', 'down_bias') if name in params)
  return params | {name: jnp.zeros_like(params[name]) for name in names}


def _rearrange(old: trunk_lib.ModelConfig, new: trunk_lib.ModelConfig, params):
  """Moves parameters of blocks to their places in another pattern."""
  blocks, period = params['blocks'], len(old.blocks)
  layers = []
  for i in range(old.num_layers):
    stack = blocks[str(i % period)] if old.is_grouped else blocks
    block = jax.tree.map(lambda x, i=i: x[i // period], stack)
    before, target = old.blocks[i % period], new.blocks[i % len(new.blocks)]
    if before.mixer != target.mixer:
      block['mixer'] = {'attention': block['mixer']}
    if old.levels != new.levels:
      (level,) = target.levels
      block['levels'] = {level.name: block['levels'][old.levels[0].name]}
    layers.append(block)
  period = len(new.blocks)
  join = lambda parts: jax.tree.map(lambda *x: jnp.stack(x), *parts)
  moved = {str(i): join(layers[i::period]) for i in range(period)}
  return {**params, 'blocks': moved if new.is_grouped else moved['0']}
