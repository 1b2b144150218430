"""The training state, where its parts lie on a mesh, and one step of it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import sharding as jsharding
import jax.numpy as jnp
import optax

from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from nested_learning import optimizers
from nested_learning import sharding
from nested_learning.training import config as config_lib
from nested_learning.training import guard as guard_lib

# Of `memory.State`, [b, h, ...].
_PER_HEAD = ('memory', 'anchor', 'trace')


class TrainState(NamedTuple):
  """What a step takes and gives.

  Attributes:
    params: The model's parameters.
    optimizer: State of the optimiser.
    stream: The model's state between steps, one per micro-batch along a leading
      axis; None where every batch starts streams of its own.
    guard: What is known of the steps that were taken and left out.
  """

  params: Any
  optimizer: Any
  stream: Any
  guard: guard_lib.Guard


def make_init(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  optimizer: optax.GradientTransformation,
) -> Callable[[jax.Array], TrainState]:
  """Makes `init(key) -> TrainState`."""

  def init(key):
    params = model.init_params(key)
    stream = None
    if config.carries_state:
      num_micro = config.train.accumulate
      start = model.init_state(params, config.data.batch_size // num_micro)
      stream = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_micro, *x.shape)), start
      )
    return TrainState(
      params, optimizer.init(params), stream, guard_lib.init_guard()
    )

  return init


def make_step(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  optimizer: optax.GradientTransformation,
  token_loss: Callable[..., jax.Array] = evaluation.cross_entropy,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """Makes `step(state, batch) -> (state, metrics)`.

  The loss is the mean over the targets of the whole batch, however many
  micro-batches it is cut into. A stream that goes on from step to step carries
  no gradient across: what came before a step is a constant.

  A step whose loss or gradient is not finite, or whose gradient is a spike
  (`train.spike_factor`), leaves the state as it was and counts itself.

  Args:
    config: The experiment.
    model: Its model.
    optimizer: Its optimiser.
    token_loss: From the model's outputs and the targets to the loss [b, t].

  Returns:
    A function to be jitted. Batches hold tokens and targets int [b, t], mask
    and reset bool [b, t]; metrics are float32 scalars.
  """
  num_micro = config.train.accumulate

  def split(x):
    # Row i goes to micro-batch i mod num_micro, so no row changes device.
    return jnp.swapaxes(x.reshape(-1, num_micro, *x.shape[1:]), 0, 1)

  def step(state, batch):
    num_targets = jnp.maximum(jnp.sum(batch['mask']), 1)

    def mean_loss(params, stream, micro):
      tokens, targets, reset = (
        micro[name] for name in ('tokens', 'targets', 'reset')
      )
      if model.losses is None:
        outputs, stream = model.forward(params, stream, tokens, reset=reset)
        loss = token_loss(outputs, targets)
      else:
        loss, stream = model.losses(
          params, stream, tokens, targets, token_loss, reset=reset
        )
      loss = jnp.sum(loss * micro['mask']) / num_targets
      return loss, stream if config.carries_state else None

    def add_micro(total, stream_and_micro):
      (loss, stream), gradients = jax.value_and_grad(mean_loss, has_aux=True)(
        state.params, *stream_and_micro
      )
      return jax.tree.map(jnp.add, total, (loss, gradients)), stream

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
    (loss, gradients), stream = jax.lax.scan(
      add_micro, zero, (state.stream, jax.tree.map(split, batch))
    )

    def take():
      updates, opt_state = optimizer.update(
        gradients, state.optimizer, state.params
      )
      return optax.apply_updates(state.params, updates), opt_state, stream

    def leave_out():
      return state.params, state.optimizer, state.stream

    norm = optax.tree.norm(gradients)
    sound, guard = guard_lib.judge(
      state.guard,
      loss=loss,
      gradient_norm=norm,
      spike_factor=config.train.spike_factor,
    )
    params, opt_state, stream = jax.lax.cond(sound, take, leave_out)
    metrics = {
      'loss': loss,
      'gradient_norm': norm,
      'skipped': guard.num_skipped.astype(jnp.float32),
      'skipped_in_a_row': guard.num_in_a_row.astype(jnp.float32),
    }
    for name, value in optimizers.telemetry(opt_state).items():
      metrics[f'levels/{name}'] = value.astype(jnp.float32)
    return TrainState(params, opt_state, stream, guard), metrics

  return step


def trace_step(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  optimizer: optax.GradientTransformation,
  mesh: Any,
  *,
  row: Mapping[str, tuple[tuple[int, ...], Any]],
  token_loss: Callable[..., jax.Array] = evaluation.cross_entropy,
) -> Any:
  """Traces the step on a mesh, for the compiler; nothing is allocated.

  Args:
    config: The experiment.
    model: Its model.
    optimizer: Its optimiser.
    mesh: The mesh, also of devices that are not there.
    row: From each array of a batch to the shape of a row and its type.
    token_loss: From the model's outputs and the targets to the loss [b, t].

  Returns:
    A `jax.stages.Traced`, of `step(state, batch) -> (state, metrics)`.
  """
  abstract = abstract_state(config, model, optimizer, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  rows = sharding.batch_sharding(mesh)
  step = jax.jit(
    make_step(config, model, optimizer, token_loss),
    in_shardings=(shardings, rows),
    out_shardings=(shardings, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  batch = {
    name: jax.ShapeDtypeStruct(
      (config.data.batch_size, *shape), dtype, sharding=rows
    )
    for name, (shape, dtype) in row.items()
  }
  with jax.set_mesh(mesh):
    return step.trace(abstract, batch)


def abstract_state(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  optimizer: optax.GradientTransformation,
  mesh: Any,
) -> TrainState:
  """The training state as shapes, types and shardings; nothing is allocated.

  Parameters are sharded by their table, and whatever the optimiser keeps of a
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
  init = make_init(config, model, optimizer)
  shapes = jax.eval_shape(init, jax.random.key(0))
  param_shardings = sharding.param_shardings(model.table, mesh)
  shardings = TrainState(
    params=param_shardings,
    optimizer=_shard_like_params(
      shapes.optimizer, shapes.params, param_shardings, mesh
    ),
    stream=_shard_rows(model, shapes.params, mesh, stacked=True)
    if config.carries_state
    else None,
    guard=jax.tree.map(lambda _: sharding.replicated(mesh), shapes.guard),
  )
  return _with_shardings(shapes, shardings)


def abstract_stream(
  model: models.Model, params: Any, num_rows: int, mesh: Any
) -> Any:
  """The model's state for `num_rows` rows, as shapes and shardings."""
  shapes = jax.eval_shape(lambda p: model.init_state(p, num_rows), params)
  return _with_shardings(shapes, _shard_rows(model, params, mesh))


def _with_shardings(shapes, shardings):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def _shard_like_params(tree, params, shardings, mesh):
  """Shardings of a tree that holds copies of the parameters' own tree."""
  by_path = {
    path: (param.shape, leaf)
    for (path, param), leaf in zip(
      jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    )
  }

  def leaf(path, x):
    for start in range(len(path)):
      shape, found = by_path.get(path[start:], (None, None))
      if shape == x.shape:
        return found
    return sharding.replicated(mesh)

  return jax.tree_util.tree_map_with_path(leaf, tree)


def _shard_rows(model, params, mesh, *, stacked=False):
  """Shardings of the model's state over rows, wherever they are counted.

  The axis that counts rows is the one that grows with their number, and heads
  follow it in what a memory carries; `stacked` states have one more in front.
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
