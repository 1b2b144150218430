"""Looks for a mesh and a number of micro-batches that fit a pod."""

from collections.abc import Iterator
import dataclasses
from typing import Any, NamedTuple

import jax

from nested_learning import compilation
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.training import config as config_lib
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import step as step_lib
from nested_learning.training import subjects

_MOST_TRIED = 4  # compilations, of minutes each
_COPIES = 5  # float32 copies of a parameter in a step: Adam has two moments


class _Candidate(NamedTuple):
  config: config_lib.ExperimentConfig
  seconds: float  # that devices spend on sending, about
  kept_bytes: float  # of parameters, optimiser and gradients
  rows: float  # of a micro-batch, per device that works on rows
  model: int


def find(
  config: config_lib.ExperimentConfig,
  pod: compilation.Pod,
  devices: list[Any],
) -> tuple[config_lib.ExperimentConfig, list[dict[str, Any]]]:
  """Compiles for one mesh after the other until one fits, the fastest first.

  After one that does not fit, only those that keep less are tried.

  Args:
    config: The experiment; its mesh and train.accumulate are replaced.
    pod: What the devices are.
    devices: From `compilation.find_devices`.

  Returns:
    The experiment with a mesh that fits, and what was tried.

  Raises:
    errors.UserError: None fits, or none divides the model and the batch.
  """
  table = models.make_model(config.model, config.inner, head=config.head).table
  candidates = sorted(
    _candidates(config, pod, table, len(devices)), key=lambda c: c.seconds
  )
  if not candidates:
    raise errors.UserError(
      f'--topology={pod}: no mesh of {len(devices)} devices divides the '
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
    f'--topology={pod}: nothing fits of {listed}; choose a larger slice, '
    "model.remat='layer' or shorter rows."
  )


def _try(config, devices) -> str | None:
  """What the compiler says of a step that is too large, or None."""
  mesh = sharding.make_mesh(
    config.mesh, num_rows=config.micro_batch_size, devices=devices
  )
  computed = subjects.make_computed(config)
  optimizer = optimizer_lib.make_optimizer(config, computed.model.table)
  _, needed = compilation.compile(
    step_lib.trace_step(
      config,
      computed.model,
      optimizer,
      mesh,
      row=computed.row,
      token_loss=computed.token_loss,
    )
  )
  return needed


def _keeps_less(candidate: _Candidate, failed: _Candidate) -> bool:
  kept = lambda c: (c.kept_bytes, c.rows / c.model)
  return kept(candidate) != kept(failed) and all(
    a <= b for a, b in zip(kept(candidate), kept(failed), strict=True)
  )


def _candidates(config, pod, table, num_devices) -> Iterator[_Candidate]:
  """Meshes that divide model and batch, and that could fit."""
  powers = [2**i for i in range(num_devices.bit_length())]
  for model in powers:
    for fsdp in powers:
      context = config.mesh.context  # what rows need, not what fits
      data, rest = divmod(num_devices, model * fsdp * context)
      mesh = {'data': data, 'fsdp': fsdp, 'context': context, 'model': model}
      if rest or not data or data % pod.num_slices:
        continue
      if not _divides(table, mesh):
        continue
      kept = _COPIES * _kept_bytes(table, mesh)
      if kept > pod.hbm_bytes:
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
          _sending_seconds(changed, pod, table, mesh),
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


def _kept_bytes(table, mesh) -> int:
  """Bytes of the parameters on one device."""
  return sharding.bytes_per_device(
    parameters.abstract(table), _shardings(table, mesh)
  )


def _sending_seconds(config, pod, table, mesh) -> float:
  """What a step spends on collectives, about.

  Parameters are gathered in the forward and in the backward pass and their
  gradients summed, once per micro-batch; along 'data' gradients are summed;
  along 'model' every block sums its outputs and their gradients.
  """
  data, fsdp, context, model = (mesh[axis] for axis in sharding.AXES)
  size = parameters.count(table) / model
  gathered = 3 * 2 * size * (fsdp - 1) / fsdp
  copies = data * context  # of the parameters, whose gradients are summed
  summed = 2 * 4 * size / fsdp * (copies - 1) / copies
  tokens = config.batch_tokens / (data * fsdp * context)
  outputs = config.model.num_layers * (1 + len(config.model.levels))
  exchanged = 3 * 2 * outputs * tokens * config.model.embed_dim * 2
  exchanged *= (model - 1) / model
  accumulate = config.train.accumulate
  chip = pod.chip
  network = summed / chip.network_bandwidth if pod.num_slices > 1 else 0.0
  sent = accumulate * (gathered + summed) + exchanged
  return sent / chip.link_bandwidth + network
