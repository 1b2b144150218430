"""The device mesh, and the map from logical axes to mesh axes.

Rows of a batch are divided over 'data' and 'fsdp' together. Along 'data' every
device has the same parameters. Along 'fsdp' each device keeps a part of every
matrix and of its optimiser state; a layer gathers its matrices where it is
computed (`gather`). Along 'context' each device has a part of a row's tokens,
for rows too long for one device (`context_parallel.py`). 'model' divides the
computation: heads, columns of MLPs, vocabulary. Slices joined by a slow network
differ along 'data' alone, so that only gradients cross it.
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
ROWS = ('data', 'fsdp')  # mesh axes that divide the rows of a batch

# All other logical axes are replicated, or divided along 'fsdp'.
RULES: Mapping[str, str] = {
  'heads': 'model',
  'mlp': 'model',
  'vocab': 'model',
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Number of devices along each mesh axis."""

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
  """Returns the sizes of the axes ('data', 'fsdp', 'context', 'model').

  With mesh.data=-1 the axis 'data' is the largest that divides `num_rows` with
  the same number of devices in every process; remaining devices are idle.

  Args:
    config: Size of each axis.
    num_devices: Devices of all processes together.
    num_processes: Processes, each with the same number of devices.
    num_rows: Rows of a batch computed together; None for any number.

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
  """Returns the largest number of groups that divides the rows; 0 for none."""
  if num_rows is None or num_groups % num_processes:
    return num_groups  # groups span processes, and none may be idle
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
  """Makes the mesh with the axes `AXES`, of size 1 each on one device.

  The devices of a process are neighbours along 'data' and 'fsdp', so that a
  process makes consecutive rows of a batch (`process_slice`). Slices follow one
  another along 'data'.

  Args:
    config: Size of each axis.
    num_rows: Rows of a batch computed together; see `mesh_shape`.
    devices: Devices to use, also those of a topology that is only compiled for;
      `jax.devices()` by default.

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
  """Arranges devices in the mesh so that neighbours are linked directly."""
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
  """Returns the number of parts into which the rows of a batch are divided."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def process_slice(mesh) -> tuple[int, int]:
  """Returns the consecutive slice of a batch's rows that this process makes.

  Args:
    mesh: Mesh of `make_mesh`.

  Returns:
    The index of the slice and the number of slices. Processes that 'model' or
    'context' spans share their rows and have the same index.
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
  """Returns the mesh axis of each axis of a parameter.

  `RULES` come first. Of the remaining axes of a matrix, the longest that
  'fsdp' divides lies along 'fsdp'. Vectors are small and stay replicated.

  Args:
    param: Declaration of the parameter.
    mesh: A mesh, or an abstract one.

  Raises:
    errors.UserError: If a sharded axis is not a multiple of its mesh axis.
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
  """Returns the sharding of each parameter of a table; see `param_spec`.

  Raises:
    errors.UserError: If a sharded axis is not a multiple of its mesh axis.
  """
  return parameters.map_params(
    lambda param: jsharding.NamedSharding(mesh, param_spec(param, mesh)), table
  )


def gather(params: Any, table: parameters.Table) -> Any:
  """Gathers the parameters of a layer along 'fsdp'.

  Their gradients are summed and scattered back to the parts that are kept.

  Args:
    params: Parameters of `table`, under `jax.set_mesh`. Without a mesh, or with
      'fsdp' of size 1, they are returned as they are.
    table: Declarations of the layer, without the axis of layers.

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
  del whole  # the constraint makes the sum a reduce-scatter
  return (jax.lax.with_sharding_constraint(gradient, kept),)


_gather.defvjp(_gather_forward, _gather_backward)


def keep_rows(x: jax.Array) -> jax.Array:
  """Constrains x [b, t, ...] to the sharding of batches.

  Rows are divided over 'data' and 'fsdp', tokens over 'context' if it divides
  them, and other axes are replicated. Without a mesh, or if the rows do not
  divide, x is returned as it is.
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
  """Constrains arrays [b, h, ...] to the sharding of batches and of heads.

  Other axes are left to the compiler, and so is every axis that its mesh axes
  do not divide. Use it for the inputs and outputs of a loop or of the branches
  of a `cond`: without a constraint the compiler may gather them in every
  iteration.

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
  """Returns the sharding of arrays [b, ...]: rows over 'data' and 'fsdp'.

  Token ids are small and replicated along 'context'; activations are divided
  (`keep_rows`).
  """
  return jsharding.NamedSharding(mesh, jsharding.PartitionSpec(ROWS))


def replicated(mesh) -> jsharding.NamedSharding:
  """Returns the sharding of a value that every device holds whole."""
  return jsharding.NamedSharding(mesh, jsharding.PartitionSpec())


def bytes_per_device(shapes: Any, shardings: Any) -> int:
  """Returns the bytes that one device holds of a tree of sharded arrays."""
  sizes = jax.tree.map(
    lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
    shapes,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))
