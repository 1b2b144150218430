"""Searches for a mesh and a number of micro-batches that fit a topology."""

from collections.abc import Iterator
import dataclasses
from typing import Any, NamedTuple

import jax

from nested_learning import accelerators
from nested_learning import compilation
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.training import config as config_lib
from nested_learning.training import make_workload
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import sharded_step

_MOST_TRIED = 4  # compilations, of minutes each
# Float32 arrays of a parameter's size in a step, beside the optimiser's: the
# parameter, its gradient and the sum of gradients.
_COPIES = 3


class _Candidate(NamedTuple):
  """An experiment with another mesh.

  Attributes:
    config: The experiment.
    seconds: Estimated time that a step spends on sending.
    kept_bytes: Bytes of parameters, optimiser and gradients on one device.
    rows: Rows of a micro-batch per device along the axes of rows.
    model: Size of the mesh along 'model'.
  """

  config: config_lib.ExperimentConfig
  seconds: float
  kept_bytes: float
  rows: float
  model: int


def find(
  config: config_lib.ExperimentConfig,
  topology: accelerators.Topology,
  devices: list[Any],
) -> tuple[config_lib.ExperimentConfig, list[dict[str, Any]]]:
  """Compiles for mesh after mesh, the fastest first, until one fits.

  After one that does not fit, it skips those that need as much memory.

  Args:
    config: The experiment; its mesh and train.accumulate are replaced.
    topology: The accelerators.
    devices: Their devices, from `compilation.find_devices`.

  Returns:
    The experiment with a mesh that fits, and one entry per attempt: 'mesh',
    'accumulate', 'fits', and 'compiler' (its words).

  Raises:
    errors.UserError: None fits, or none divides the model and the batch.
  """
  table = models.make_model(config.model, config.inner, head=config.head).table
  candidates = sorted(
    _candidates(config, topology, table, len(devices)), key=lambda c: c.seconds
  )
  if not candidates:
    raise errors.UserError(
      f'--topology={topology}: no mesh of {len(devices)} devices divides the '
      f'{config.data.batch_size} rows of data.batch_size and the model; change '
      'data.batch_size, or choose another slice.'
    )
  tried, failed = [], None
  for candidate in candidates:
    if len(tried) == _MOST_TRIED:
      break
    if failed and not _keeps_less(candidate, failed):
      continue
    needed = _try(candidate.config, devices)
    tried.append(
      {
        'mesh': dataclasses.asdict(candidate.config.mesh),
        'accumulate': candidate.config.train.accumulate,
        'fits': needed is None,
        'compiler': needed or '',
      }
    )
    if needed is None:
      return candidate.config, tried
    failed = candidate
  listed = '; '.join(
    f'{one["mesh"]}, train.accumulate={one["accumulate"]}' for one in tried
  )
  raise errors.UserError(
    f'--topology={topology}: nothing fits of {listed}; choose a larger slice, '
    "model.remat='layer' or shorter rows."
  )


def _try(config, devices) -> str | None:
  """Compiles a step; returns the compiler's words if it does not fit."""
  mesh = sharding.make_mesh(
    config.mesh, num_rows=config.micro_batch_size, devices=devices
  )
  spec = make_workload.make_step_spec(config)
  optimizer = optimizer_lib.make_optimizer(config, spec.model.table)
  _, needed = compilation.compile(
    sharded_step.trace_step(config, spec, optimizer, mesh)
  )
  return needed


def _keeps_less(candidate: _Candidate, failed: _Candidate) -> bool:
  kept = lambda c: (c.kept_bytes, c.rows / c.model)
  return kept(candidate) != kept(failed) and all(
    a <= b for a, b in zip(kept(candidate), kept(failed), strict=True)
  )


def _candidates(config, topology, table, num_devices) -> Iterator[_Candidate]:
  """Yields meshes that divide model and batch, and that could fit."""
  powers = [2**i for i in range(num_devices.bit_length())]
  copies = _COPIES + _share_of_optimizer(config, table)
  for model in powers:
    for fsdp in powers:
      context = config.mesh.context  # chosen for the length of rows
      data, rest = divmod(num_devices, model * fsdp * context)
      mesh = {'data': data, 'fsdp': fsdp, 'context': context, 'model': model}
      if rest or not data or data % topology.num_slices:
        continue
      if not _divides(table, mesh):
        continue
      kept = copies * _kept_bytes(table, mesh)
      if kept > topology.hbm_bytes:
        continue
      for accumulate in (1, 2, 4, 8, 16):
        if config.data.batch_size % (accumulate * data * fsdp):
          continue
        changed = dataclasses.replace(
          config,
          mesh=sharding.MeshConfig(**mesh),
          train=dataclasses.replace(config.train, accumulate=accumulate),
        )
        yield _Candidate(
          changed,
          _sending_seconds(changed, topology, table, mesh),
          kept,
          changed.micro_batch_size / (data * fsdp),
          model,
        )


def _divides(table, mesh) -> bool:
  try:
    _shardings(table, mesh)
  except errors.UserError:
    return False
  return True


def _shardings(table, mesh):
  sizes = tuple(mesh[axis] for axis in sharding.AXES)
  return sharding.param_shardings(
    table, jax.sharding.AbstractMesh(sizes, sharding.AXES)
  )


def _share_of_optimizer(config, table) -> float:
  """Returns the bytes of the optimiser's state over those of parameters."""
  params = parameters.abstract(table)
  optimizer = optimizer_lib.make_optimizer(config, table)
  num_bytes = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  return num_bytes(jax.eval_shape(optimizer.init, params)) / num_bytes(params)


def _kept_bytes(table, mesh) -> int:
  """Returns the bytes of the parameters on one device."""
  return sharding.bytes_per_device(
    parameters.abstract(table), _shardings(table, mesh)
  )


def _sending_seconds(config, topology, table, mesh) -> float:
  """Estimates the time that a step spends on collectives.

  Along 'fsdp', parameters are gathered in the forward and in the backward pass
  and their gradients summed, once per micro-batch. Along 'data' and 'context',
  gradients are summed. Along 'model', every block sums its outputs and their
  gradients.
  """
  data, fsdp, context, model = (mesh[axis] for axis in sharding.AXES)
  size = parameters.count(table) / model
  # Two bytes per parameter: gathered twice, gradients summed once.
  gathered = 3 * 2 * size * (fsdp - 1) / fsdp
  copies = data * context  # copies of the parameters, each with gradients
  summed = 2 * 4 * size / fsdp * (copies - 1) / copies  # in float32
  tokens = config.batch_tokens / (data * fsdp * context)
  outputs = config.model.num_layers * (1 + len(config.model.levels))
  # Two bytes each, in the forward pass, its recomputation and the backward
  # pass; a sum over a ring sends everything twice.
  exchanged = 3 * 2 * outputs * tokens * config.model.embed_dim * 2
  exchanged *= (model - 1) / model
  accumulate = config.train.accumulate
  chip = topology.generation.chip
  network = summed / chip.network_bandwidth if topology.num_slices > 1 else 0.0
  sent = accumulate * (gathered + summed) + exchanged
  return sent / chip.link_bandwidth + network
