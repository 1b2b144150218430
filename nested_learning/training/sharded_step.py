"""The training step and its state on a mesh, traced without allocating."""

from typing import Any

import jax
from jax import sharding as jsharding
import optax

from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning import subtrees
from nested_learning.training import config as config_lib
from nested_learning.training import pretrained_runs
from nested_learning.training import step as step_lib
from nested_learning.training import trainable
from nested_learning.training import workload as workload_lib

# Fields of `memory.State` that are [b, h, ...].
_PER_HEAD = ('memory', 'anchor', 'trace')


def trace_step(
  config: config_lib.ExperimentConfig,
  spec: workload_lib.StepSpec | workload_lib.Workload,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> Any:
  """Traces the step on a mesh without allocating anything.

  Args:
    config: The experiment.
    spec: Its model, rows and loss.
    optimizer: Its optimiser.
    mesh: The mesh; its devices need not exist.

  Returns:
    A `jax.stages.Traced` of `step(state, batch) -> (state, metrics)`.
  """
  abstract = abstract_state(config, spec.model, optimizer, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  rows = sharding.batch_sharding(mesh)
  step = jax.jit(
    step_lib.make_step(config, spec.model, optimizer, spec.token_loss),
    in_shardings=(shardings, rows),
    out_shardings=(shardings, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  batch = {
    name: jax.ShapeDtypeStruct(
      (config.data.batch_size, *shape), dtype, sharding=rows
    )
    for name, (shape, dtype) in spec.row.items()
  }
  with jax.set_mesh(mesh):
    return step.trace(abstract, batch)


def abstract_state(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
) -> step_lib.TrainState:
  """Returns the training state as shapes, dtypes and shardings.

  Parameters are sharded by their table, and the optimiser's state of a
  parameter like the parameter. The stream is sharded over rows and heads.

  Args:
    config: The experiment.
    model: Its model.
    optimizer: Its optimiser.
    mesh: A mesh, or an abstract one.

  Returns:
    A `TrainState` of `jax.ShapeDtypeStruct`s.

  Raises:
    errors.UserError: The rows of a micro-batch do not divide over the mesh.
  """
  rows = config.data.batch_size // config.train.accumulate
  groups = sharding.num_row_groups(mesh)
  if rows % groups:
    raise errors.UserError(
      f'{rows} rows (data.batch_size={config.data.batch_size} over '
      f'train.accumulate={config.train.accumulate}) are not a multiple of '
      f'the {groups} devices on the mesh axes data and fsdp; change '
      'data.batch_size, train.accumulate, mesh.data or mesh.fsdp.'
    )
  init = step_lib.make_init(config, model, optimizer)
  base = pretrained_runs.abstract_base(config, model.table)
  shapes = jax.eval_shape(init, jax.random.key(0), base)
  is_trained = trainable.make_filter(config, model.table)
  table = trainable.full_table(config, model.table)
  both = sharding.param_shardings(table, mesh)
  param_shardings = subtrees.select(both, is_trained)
  frozen = None
  if shapes.frozen is not None:
    frozen = subtrees.select(both, lambda path: not is_trained(path))
  shardings = step_lib.TrainState(
    params=param_shardings,
    frozen=frozen,
    optimizer=_shard_like_params(
      shapes.optimizer, shapes.params, param_shardings, mesh
    ),
    stream=_shard_rows(model, _abstract(model), mesh, stacked=True)
    if config.carries_state
    else None,
    guard=jax.tree.map(lambda _: sharding.replicated(mesh), shapes.guard),
  )
  return _with_shardings(shapes, shardings)


def abstract_params(
  config: config_lib.ExperimentConfig, model: models.Model, mesh: Any
) -> Any:
  """Returns all parameters of the model as shapes, dtypes and shardings."""
  base = pretrained_runs.abstract_base(config, model.table)
  shapes = _abstract(model)
  if base is not None:
    shapes = subtrees.merge(shapes, base)
  return _with_shardings(shapes, sharding.param_shardings(model.table, mesh))


def abstract_stream(model: models.Model, num_rows: int, mesh: Any) -> Any:
  """Returns the model's state for `num_rows` rows as shapes and shardings."""
  params = _abstract(model)
  shapes = jax.eval_shape(lambda p: model.init_state(p, num_rows), params)
  return _with_shardings(shapes, _shard_rows(model, params, mesh))


def _abstract(model: models.Model) -> Any:
  return parameters.abstract(model.table)


def _with_shardings(shapes, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def _shard_like_params(tree, params, shardings, mesh):
  """Returns shardings of a tree that holds values for the parameters.

  A value in the shape of its parameter is sharded like it. Of others, such as
  the layers of deep momentum, an axis is sharded like the parameter's axis of
  the same size, in their order.
  """
  by_path = {
    path: (param.shape, leaf.spec)
    for (path, param), leaf in zip(
      jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    )
  }

  def leaf(path, x):
    for start in range(len(path)):
      if path[start:] in by_path:
        shape, spec = by_path[path[start:]]
        return jsharding.NamedSharding(mesh, _match(shape, spec, x.shape))
    return sharding.replicated(mesh)

  return jax.tree_util.tree_map_with_path(leaf, tree)


def _match(shape, spec, wanted) -> jsharding.PartitionSpec:
  """Returns the partition of a shape by the axes that it has of another."""
  if shape == wanted:
    return spec
  left = list(zip(shape, spec, strict=True))
  places = []
  for size in wanted:
    at = next((i for i, (other, _) in enumerate(left) if other == size), None)
    places.append(None if at is None else left[at][1])
    left = left if at is None else left[at + 1 :]
  return jsharding.PartitionSpec(*places)


def _shard_rows(model, params, mesh, *, stacked=False):
  """Returns shardings of the model's state over rows and heads.

  The axis of rows is the one that grows with their number. In the state of a
  memory, heads follow it. `stacked` states have one more axis in front.
  """
  one, two = (
    jax.eval_shape(lambda p, size=size: model.init_state(p, size), params)
    for size in (1, 2)
  )

  def leaf(path, a, b):
    differs = [m != n for m, n in zip(a.shape, b.shape, strict=True)]
    rows = differs.index(True)
    spec = [None] * (stacked + rows) + [sharding.ROWS]
    if any(getattr(key, 'name', None) in _PER_HEAD for key in path):
      if a.shape[rows + 1] % mesh.shape['model'] == 0:
        spec.append('model')
    return jsharding.NamedSharding(mesh, jsharding.PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(leaf, one, two)
