"""The mesh, and the one map from logical axes to mesh axes.

Rows of a batch lie over 'data' and 'fsdp' together. Along 'data' every device
has the same parameters; along 'fsdp' each keeps a part of every matrix, and of
what the optimiser knows of it, and a layer's matrices are put together where
the layer is computed (`gather`). Along 'context' each has a part of a row's
tokens, where rows are too long for one (`context_parallel.py`). 'model'
divides the computation itself: heads, columns of MLPs, vocabulary. Slices that
are joined by a slow network differ along 'data' alone, so that only gradients
cross it.
"""

import collections
from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import sharding as jsharding
from jax.experimental import mesh_utils
import numpy as np

from nested_learning import errors
from nested_learning import parameters

AXES = ('data', 'fsdp', 'context', 'model')
ROWS = ('data', 'fsdp')  # what rows of a batch lie over

# Every other logical axis is whole on each device, or lies along 'fsdp'.
RULES: Mapping[str, str] = {
  'heads': 'model',
  'mlp': 'model',
  'vocab': 'model',
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices each mesh axis takes."""

  data: int = -1  # groups of rows; -1 takes as many as rows divide over
  model: int = 1  # devices that share the heads, MLPs and vocabulary of a row
  fsdp: int = 1  # devices that share one copy of parameters and optimiser
  context: int = 1  # devices that share the tokens of a row, in their order

  def __post_init__(self):
    for name in ('fsdp', 'context', 'model'):
      errors.check_field(self, name, getattr(self, name) >= 1, 'at least 1')
    errors.check_field(
      self,
      'data',
      self.data == -1 or self.data >= 1,
      'at least 1, or -1 for all devices that are left',
    )


def mesh_shape(
  config: MeshConfig,
  *,
  num_devices: int,
  num_processes: int = 1,
  num_rows: int | None = None,
) -> tuple[int, int, int, int]:
  """The sizes of the axes ('data', 'fsdp', 'context', 'model').

  With mesh.data=-1 the axis 'data' is the largest that `num_rows` divide over,
  the same number of devices in every process; devices that are left are idle.

  Args:
    config: Size of each axis.
    num_devices: Devices of all processes together.
    num_processes: Processes, each with the same number of devices.
    num_rows: Rows of a batch that are worked on together; None for any number.

  Returns:
    The four sizes.

  Raises:
    errors.UserError: The axes do not fit the devices, or the rows do not divide
      over them.
  """
  fsdp, context, model = config.fsdp, config.context, config.model
  per_group = context * model  # devices that work on the same rows
  if config.data == -1 and num_devices % (fsdp * per_group) == 0:
    groups = _num_groups(
      num_devices // per_group, fsdp, num_processes, num_rows
    )
  else:
    groups = fsdp * config.data
    if config.data == -1:
      groups = fsdp * max(num_devices // (fsdp * per_group), 1)
    if groups * per_group != num_devices:
      of_context = f'context={context} x ' if context > 1 else ''
      raise errors.UserError(
        f'a mesh of data={groups // fsdp} x fsdp={fsdp} x {of_context}model='
        f'{model} does not use the {num_devices} devices there are; set '
        'mesh.data, mesh.fsdp, mesh.context and mesh.model so that their '
        'product is that number.'
      )
  if num_rows is not None and (not groups or num_rows % groups):
    least, what, way_out = (
      (groups, 'devices on the mesh axes data and fsdp', 'change mesh.data')
      if groups
      else (math.lcm(num_processes, fsdp), 'processes', 'use fewer processes')
    )
    raise errors.UserError(
      f'{num_rows} rows (data.batch_size over train.accumulate) are not a '
      f'multiple of the {least} {what}; set data.batch_size to a multiple of '
      f'{least} times train.accumulate, or {way_out}.'
    )
  return groups // fsdp, fsdp, context, model


def _num_groups(
  num_groups: int, fsdp: int, num_processes: int, num_rows: int | None
) -> int:
  """Most groups that rows divide over, as many in each process; 0 for none."""
  if num_rows is None or num_groups % num_processes:
    return num_groups  # a group spans processes, so that none may be idle
  for per_process in range(num_groups // num_processes, 0, -1):
    groups = per_process * num_processes
    if num_rows % groups == 0 and groups % fsdp == 0:
      return groups
  return 0


def make_mesh(
  config: MeshConfig = MeshConfig(),
  *,
  num_rows: int | None = None,
  devices=None,
):
  """Makes the mesh with the axes of `AXES`; all 1 on one device.

  Along 'data' and 'fsdp' the devices of a process lie side by side, so that it
  makes consecutive rows of a batch (`process_slice`), and slices follow one
  another along 'data'.

  Args:
    config: Size of each axis.
    num_rows: Rows of a batch that are worked on together; see `mesh_shape`.
    devices: The devices to use, also of a topology that is not there; all of
      them by default.

  Returns:
    A `jax.sharding.Mesh`.

  Raises:
    errors.UserError: The axes do not fit the devices, or the rows do not divide
      over them.
  """
  devices = jax.devices() if devices is None else devices
  by_process = collections.defaultdict(list)
  for device in devices:
    by_process[device.process_index].append(device)
  shape = mesh_shape(
    config,
    num_devices=len(devices),
    num_processes=len(by_process),
    num_rows=num_rows,
  )
  per_process = math.prod(shape) // len(by_process)
  placed = _place(
    shape, [d for some in by_process.values() for d in some[:per_process]]
  )
  groups = placed.reshape(-1, math.prod(shape[len(ROWS) :]))
  order = sorted(
    range(len(groups)), key=lambda i: [d.process_index for d in groups[i]]
  )
  return jsharding.Mesh(
    groups[order].reshape(shape),
    AXES,
    axis_types=(jsharding.AxisType.Auto,) * len(AXES),
  )


def _place(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
  """Which device is where in the mesh: neighbours in it are neighbours."""
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if shape[0] % slices:
    raise errors.UserError(
      f'mesh.data={shape[0]} does not divide over {slices} slices, which only '
      f'gradients can cross; set mesh.data to a multiple of {slices}.'
    )
  make = functools.partial(
    mesh_utils.create_device_mesh, shape, devices=devices
  )
  if slices > 1:
    within = shape[0] // slices, *shape[1:]
    make = functools.partial(
      mesh_utils.create_hybrid_device_mesh,
      within,
      (slices, *[1] * len(shape[1:])),
      devices=devices,
    )
  try:
    return make()
  except NotImplementedError:  # no whole axes of the torus have this size
    return make(allow_split_physical_axes=True)


def num_row_groups(mesh) -> int:
  """Into how many parts rows of a batch are divided."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def process_slice(mesh) -> tuple[int, int]:
  """Which consecutive slice of the rows of a batch this process makes.

  Args:
    mesh: From `make_mesh`.

  Returns:
    Its index and the number of slices. Processes that share their rows ('model'
    or 'context' spans them) have the same index.
  """
  here = jax.process_index()
  groups = mesh.devices.reshape(num_row_groups(mesh), -1)
  mine = [
    i
    for i, group in enumerate(groups)
    if any(device.process_index == here for device in group)
  ]
  return mine[0] // len(mine), len(groups) // len(mine)


def param_spec(param: parameters.Param, mesh) -> jsharding.PartitionSpec:
  """Which axis of a parameter lies along which axis of a mesh.

  By `RULES`; of what is left, a matrix has its longest axis along 'fsdp', if
  that divides it. Vectors, which are small, are whole on each device.

  Args:
    param: A row of a table.
    mesh: A mesh, or an abstract one.

  Raises:
    errors.UserError: A sharded axis is not a multiple of its mesh axis.
  """
  spec = [RULES.get(axis) for axis in param.axes]
  for size, axis, mesh_axis in zip(param.shape, param.axes, spec, strict=True):
    if mesh_axis and size % mesh.shape[mesh_axis]:
      raise errors.UserError(
        f'axis {axis!r} of size {size} is not a multiple of the mesh axis '
        f'{mesh_axis!r} of size {mesh.shape[mesh_axis]}; choose another '
        f'mesh.{mesh_axis} or size.'
      )
  within = [i for i, axis in enumerate(param.axes) if axis != 'layers']
  fsdp = mesh.shape.get('fsdp', 1)
  if fsdp > 1 and len(within) > 1:
    free = [i for i in within if not spec[i] and param.shape[i] % fsdp == 0]
    if free:
      spec[max(free, key=lambda i: param.shape[i])] = 'fsdp'
  return jsharding.PartitionSpec(*spec)


def param_shardings(table: parameters.Table, mesh) -> Any:
  """The sharding of each parameter of a table, by `param_spec`.

  Raises:
    errors.UserError: A sharded axis is not a multiple of its mesh axis.
  """
  return parameters.map_params(
    lambda param: jsharding.NamedSharding(mesh, param_spec(param, mesh)), table
  )


def gather(params: Any, table: parameters.Table) -> Any:
  """Parameters as a layer computes with them: whole along 'fsdp'.

  Their gradients go back to where the parameters are kept, summed on the way.

  Args:
    params: Parameters of `table`, under `jax.set_mesh`; where no mesh is set,
      or none with an axis 'fsdp', they stay as they are.
    table: What they are; a layer's own, without the axis of layers.

  Returns:
    The same values.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape.get('fsdp', 1) == 1:
    return params

  def leaf(param, x):
    kept = param_spec(param, mesh)
    if 'fsdp' not in kept:
      return x
    return _gather(
      kept,
      jsharding.PartitionSpec(*(a if a != 'fsdp' else None for a in kept)),
      x,
    )

  return jax.tree.map(
    leaf, table, params, is_leaf=lambda x: isinstance(x, parameters.Param)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(kept, whole, x):
  del kept
  return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(kept, whole, x):
  return _gather(kept, whole, x), None


def _gather_backward(kept, whole, _, gradient):
  del whole  # summed where it is kept: a reduce-scatter
  return (jax.lax.with_sharding_constraint(gradient, kept),)


_gather.defvjp(_gather_forward, _gather_backward)


def keep_rows(x: jax.Array) -> jax.Array:
  """Keeps the rows of x [b, t, ...] where batches have them, the rest whole.

  Tokens lie along 'context', if that divides them. Under no mesh, or where the
  rows do not divide over it, x stays as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(ROWS) <= set(mesh.shape):
    return x
  groups, context = num_row_groups(mesh), mesh.shape.get('context', 1)
  if x.shape[0] % groups or groups * context == 1:
    return x
  divides = context > 1 and x.shape[1] % context == 0
  spec = jsharding.PartitionSpec(ROWS, 'context' if divides else None)
  return jax.lax.with_sharding_constraint(x, spec)


def pin_heads(tree: Any) -> Any:
  """Keeps arrays [b, h, ...] where batches have rows and parameters heads.

  What lies along their other axes is left to the compiler, as is everything
  under no mesh, and an axis that its mesh axes do not divide. For what a loop
  or the branches of a `cond` take and give: where nothing says how these lie,
  the compiler may gather them anew every time.

  Args:
    tree: A pytree of arrays.

  Returns:
    The same values.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not {*ROWS, RULES['heads']} <= set(mesh.auto_axes):
    return tree
  rows, heads = num_row_groups(mesh), mesh.shape[RULES['heads']]
  if rows == heads == 1:
    return tree

  def leaf(x):
    spec = [jsharding.PartitionSpec.UNCONSTRAINED] * x.ndim
    if x.shape[0] % rows == 0:
      spec[0] = ROWS
    if x.shape[1] % heads == 0:
      spec[1] = RULES['heads']
    return jax.lax.with_sharding_constraint(x, jsharding.PartitionSpec(*spec))

  return jax.tree.map(leaf, tree)


def batch_sharding(mesh) -> jsharding.NamedSharding:
  """The sharding of arrays [b, ...]: rows over 'data' and 'fsdp'.

  Tokens, which are small, are whole along 'context': what is computed of them
  is not (`keep_rows`).
  """
  return jsharding.NamedSharding(mesh, jsharding.PartitionSpec(ROWS))


def replicated(mesh) -> jsharding.NamedSharding:
  """The sharding of a value that every device holds whole."""
  return jsharding.NamedSharding(mesh, jsharding.PartitionSpec())


def bytes_per_device(shapes: Any, shardings: Any) -> int:
  """Bytes that one device holds of a tree of shapes under given shardings."""
  sizes = jax.tree.map(
    lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
    shapes,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))
