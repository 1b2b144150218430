"""The mesh, and the one map from logical axes to mesh axes."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
from jax import sharding as jsharding

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

  data: int = -1  # data-parallel groups; -1 takes all devices that are left
  model: int = 1  # devices that share one copy of heads, MLPs and vocabulary

  def __post_init__(self):
    if self.model < 1 or (self.data < 1 and self.data != -1):
      raise ValueError(
        f'mesh {self.data=}, {self.model=}: both must be at least 1 '
        '(data may be -1 for all devices that are left).'
      )


def make_mesh(config: MeshConfig = MeshConfig(), *, devices=None):
  """Makes the mesh with axes ('data', 'model'); (1, 1) on one device.

  Args:
    config: Size of each axis.
    devices: The devices to use; all of them by default.

  Returns:
    A `jax.sharding.Mesh`.

  Raises:
    ValueError: The axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  data = config.data
  if data == -1:
    data = max(len(devices) // config.model, 1)
  if data * config.model != len(devices):
    raise ValueError(
      f'a mesh of data={data} x model={config.model} does not use the '
      f'{len(devices)} devices there are; set mesh.data and mesh.model so that '
      'their product is that number.'
    )
  return jax.make_mesh(
    (data, config.model),
    ('data', 'model'),
    devices=devices,
    axis_types=(jsharding.AxisType.Auto,) * 2,
  )


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
