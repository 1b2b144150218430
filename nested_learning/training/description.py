"""Describes the sizes of an experiment without allocating anything."""

import math
from typing import Any

import jax
from jax import sharding as jsharding

from nested_learning import markdown
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning import subtrees
from nested_learning.training import config as config_lib
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import sharded_step


def describe(config: config_lib.ExperimentConfig) -> str:
  """Returns parameters, levels and memory per device as Markdown tables.

  All numbers come from shapes, so the model can have any size and the mesh more
  devices than exist.

  Args:
    config: The experiment.

  Returns:
    The text.

  Raises:
    ValueError: A size does not divide over the mesh.
  """
  model = models.make_model(config.model, config.inner, head=config.head)
  optimizer = optimizer_lib.make_optimizer(config, model.table)
  mesh = _mesh(config)
  state = sharded_step.abstract_state(config, model, optimizer, mesh)
  streams = sharded_step.abstract_stream(
    model, config.data.batch_size // config.train.accumulate, mesh
  )
  num_params, frozen = parameters.count(model.table), state.frozen
  sizes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
  memory = [
    ('parameters', _bytes(state.params)),
    *([('frozen parameters', _bytes(frozen))] if frozen else []),
    ('optimiser state', _bytes(state.optimizer)),
    ('gradients', _bytes(state.params)),
    ('state of the streams of a micro-batch', _bytes(streams)),
  ]
  memory.append(('together', sum(size for _, size in memory)))
  return '\n\n'.join(
    [
      f'# {config.name}',
      f'{num_params:,} parameters in {config.model.num_layers} layers; '
      f'{config.batch_tokens:,} tokens per step.',
      markdown.table(('parameters', 'number', 'share'), _groups(model)),
      markdown.table(
        (
          'level',
          'optimiser',
          'tokens per update',
          'steps',
          'parameters',
          'updates',
        ),
        _levels(config, state.params),
      ),
      layout(config, mesh),
      f'Memory per device on the mesh ({sizes}), without activations:',
      markdown.table(
        ('', 'MiB per device'),
        [(name, f'{size / 2**20:,.1f}') for name, size in memory],
      ),
    ]
  )


def layout(config: config_lib.ExperimentConfig, mesh: Any) -> str:
  """Returns the sharding of every parameter as a Markdown table.

  The optimiser's state of a parameter is sharded like the parameter.

  Args:
    config: The experiment.
    mesh: A mesh, or an abstract one.
  """
  rows = []
  for path, param in jax.tree.leaves_with_path(
    models.make_model(config.model, config.inner, head=config.head).table,
    is_leaf=lambda x: isinstance(x, parameters.Param),
  ):
    spec = sharding.param_spec(param, mesh)
    along = [
      f'{axis or i}: {place}'
      for i, (axis, place) in enumerate(zip(param.axes, spec, strict=True))
      if place and mesh.shape[place] > 1
    ]
    shape = jsharding.NamedSharding(mesh, spec).shard_shape(param.shape)
    rows.append(
      (
        parameters.path_name(path),
        'x'.join(map(str, param.shape)),
        ', '.join(along) or 'whole',
        f'{4 * math.prod(shape) / 2**20:,.2f}',
      )
    )
  return markdown.table(
    ('parameter', 'shape', 'lies along', 'MiB per device'), rows
  )


def _mesh(config: config_lib.ExperimentConfig) -> Any:
  """Returns the mesh of a config as an abstract mesh."""
  mesh = config.mesh
  within = mesh.fsdp, mesh.context, mesh.model
  shape = mesh.data, *within
  if mesh.data == -1:
    shape = sharding.mesh_shape(
      mesh,
      num_devices=max(jax.device_count(), math.prod(within)),
      num_rows=config.micro_batch_size,
    )
  return jsharding.AbstractMesh(shape, sharding.AXES)


def _groups(model: models.Model) -> list[tuple[str, ...]]:
  """Returns a row per group of parameters: a part of the mixer, a level."""
  total, sizes = parameters.count(model.table), {}
  depth = 4 if model.config.is_grouped else 3
  for path, x in jax.tree.leaves_with_path(parameters.abstract(model.table)):
    group = '/'.join(parameters.path_name(path).split('/')[:depth])
    sizes[group] = sizes.get(group, 0) + x.size
  return [
    (group, f'{size:,}', f'{size / total:.1%}') for group, size in sizes.items()
  ]


def _levels(
  config: config_lib.ExperimentConfig, params: Any
) -> list[tuple[str, ...]]:
  """Returns a row per clock: its trained parameters and number of updates."""
  sizes: dict[str, int] = {}
  table = models.make_model(config.model, config.inner, head=config.head).table
  labels = models.level_labels(config.model, table)
  labels = dict(
    zip(subtrees.paths(labels), jax.tree.leaves(labels), strict=True)
  )
  leaves = jax.tree.leaves(params)
  for path, param in zip(subtrees.paths(params), leaves, strict=True):
    label = labels.get(path, 'base')  # of low-rank changes
    sizes[label] = sizes.get(label, 0) + param.size
  clocks = {level.name: level.train_every for level in config.model.levels}
  rows = []
  for name in sorted(sizes, key=lambda name: clocks.get(name) or 0):
    train_every = clocks.get(name) or config.batch_tokens
    period = train_every // config.batch_tokens
    rows.append(
      (
        name,
        config.rules[name].NAME,
        f'{train_every:,}',
        f'{period:,}',
        f'{sizes[name]:,}',
        f'{config.train.num_steps // period:,}',
      )
    )
  return rows


def _bytes(tree: Any) -> int:
  """Returns the bytes of a tree of abstract arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
