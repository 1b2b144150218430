"""The mesh, and the one map from logical axes to mesh axes."""

import collections
from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
from jax import sharding as jsharding

from nested_learning import errors
from nested_learning import parameters

# Batch rows over 'data'; heads, MLP columns and vocabulary over 'model'.
# Every other logical axis is replicated.
RULES: Mapping[str, str] = {
  'heads': 'model',
  'mlp': 'model',
  'vocab': 'model',
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many devices each mesh axis takes."""

  data: int = -1  # data-parallel groups; -1 takes as many as rows divide over
  model: int = 1  # devices that share one copy of heads, MLPs and vocabulary

  def __post_init__(self):
    if self.model < 1 or (self.data < 1 and self.data != -1):
      raise ValueError(
        f'mesh {self.data=}, {self.model=}: both must be at least 1 '
        '(data may be -1 for all devices that are left).'
      )


def mesh_shape(
  config: MeshConfig,
  *,
  num_devices: int,
  num_processes: int = 1,
  num_rows: int | None = None,
) -> tuple[int, int]:
  """The sizes of the axes ('data', 'model') on so many devices.

  With mesh.data=-1 the axis 'data' is the largest that `num_rows` divide over,
  the same number of devices in every process; devices that are left are idle.

  Args:
    config: Size of each axis.
    num_devices: Devices of all processes together.
    num_processes: Processes, each with the same number of devices.
    num_rows: Rows of a batch that are worked on together; None for any number.

  Returns:
    The two sizes.

  Raises:
    errors.UserError: The axes do not fit the devices, or the rows do not divide
      over them.
  """
  model = config.model
  if config.data != -1 or num_devices % model:
    data = max(num_devices // model, 1) if config.data == -1 else config.data
    if data * model != num_devices:
      raise errors.UserError(
        f'a mesh of data={data} x model={model} does not use the {num_devices} '
        'devices there are; set mesh.data and mesh.model so that their product '
        'is that number.'
      )
  else:
    data = _num_groups(num_devices // model, num_processes, num_rows)
  if num_rows is not None and (not data or num_rows % data):
    least, what, way_out = (
      (data, 'devices on the mesh axis data', 'change mesh.data')
      if data
      else (num_processes, 'processes', 'use fewer processes')
    )
    raise errors.UserError(
      f'{num_rows} rows (data.batch_size over train.accumulate) are not a '
      f'multiple of the {least} {what}; set data.batch_size to a multiple of '
      f'{least} times train.accumulate, or {way_out}.'
    )
  return data, model


def _num_groups(
  num_groups: int, num_processes: int, num_rows: int | None
) -> int:
  """Most groups that rows divide over, as many in each process; 0 for none."""
  if num_rows is None or num_groups % num_processes:
    return num_groups  # a group spans processes, so that none may be idle
  for per_process in range(num_groups // num_processes, 0, -1):
    if num_rows % (per_process * num_processes) == 0:
      return per_process * num_processes
  return 0


def make_mesh(
  config: MeshConfig = MeshConfig(),
  *,
  num_rows: int | None = None,
  devices=None,
):
  """Makes the mesh with axes ('data', 'model'); (1, 1) on one device.

  Along 'data' the devices of a process lie side by side, so that it makes
  consecutive rows of a batch (`process_slice`).

  Args:
    config: Size of each axis.
    num_rows: Rows of a batch that are worked on together; see `mesh_shape`.
    devices: The devices to use; all of them by default.

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
  axis_types = (jsharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh(
    shape,
    ('data', 'model'),
    devices=[d for some in by_process.values() for d in some[:per_process]],
    axis_types=axis_types,
  )
  order = sorted(
    range(shape[0]), key=lambda i: [d.process_index for d in mesh.devices[i]]
  )
  return jsharding.Mesh(
    mesh.devices[order], mesh.axis_names, axis_types=axis_types
  )


def process_slice(mesh) -> tuple[int, int]:
  """Which consecutive slice of the rows of a batch this process makes.

  Args:
    mesh: From `make_mesh`.

  Returns:
    Its index and the number of slices. Processes that share their rows (the
    axis 'model' spans them) have the same index.
  """
  here = jax.process_index()
  mine = [
    i
    for i, group in enumerate(mesh.devices)
    if any(device.process_index == here for device in group)
  ]
  return mine[0] // len(mine), mesh.shape['data'] // len(mine)


def param_shardings(table: parameters.Table, mesh) -> Any:
  """The sharding of each parameter of a table, by `RULES`.

  Raises:
    ValueError: A sharded axis is not a multiple of its mesh axis.
  """

  def leaf(param: parameters.Param):
    spec = [RULES.get(axis) for axis in param.axes]
    for size, axis, mesh_axis in zip(
      param.shape, param.axes, spec, strict=True
    ):
      if mesh_axis and size % mesh.shape[mesh_axis]:
        raise ValueError(
          f'axis {axis!r} of size {size} is not a multiple of the mesh axis '
          f'{mesh_axis!r} of size {mesh.shape[mesh_axis]}; choose another '
          f'mesh.{mesh_axis} or size.'
        )
    return jsharding.NamedSharding(mesh, jsharding.PartitionSpec(*spec))

  return parameters.map_params(leaf, table)


def batch_sharding(mesh) -> jsharding.NamedSharding:
  """The sharding of arrays with a leading batch axis: rows over 'data'."""
  return jsharding.NamedSharding(mesh, jsharding.PartitionSpec('data'))


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
