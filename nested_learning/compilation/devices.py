"""Compiles for accelerators that this machine does not have.

TPUs need the package `libtpu`, GPUs a plugin of jaxlib.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import importlib
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from nested_learning import accelerators
from nested_learning import errors

# Real v4 chips are one device, which the compiler does not assume.
_OPTIONS = {'v4': {'chip_config_name': 'megacore'}}


def find_devices(topology: accelerators.Topology) -> list[Any]:
  """Returns the devices of a topology, for the compiler alone.

  Args:
    topology: The slice or slices.

  Returns:
    Devices to make a mesh of, and to compile for.

  Raises:
    errors.UserError: The compiler for that hardware is not installed, or does
      not know the topology.
  """
  with _silence_stderr():
    try:
      if topology.generation.kind == 'gpu':
        found = _gpus(topology)
      else:
        found = _tpus(topology)
    except errors.UserError:
      raise
    except (
      ImportError,
      RuntimeError,
      ValueError,
      NotImplementedError,
    ) as error:
      raise errors.UserError(
        f'--topology={topology}: the compiler cannot make it '
        f'({str(error).strip().splitlines()[0][:200]}).'
      ) from error
  return list(found.devices)


def compile(traced: Any) -> tuple[Any, str | None]:
  """Compiles a program for the devices of its shardings.

  Args:
    traced: From `jax.jit(...).trace(...)`.

  Returns:
    The executable and None; or, if it needs too much memory, None and the
    compiler's words.
  """
  try:
    return traced.lower().compile(), None
  except jax.errors.JaxRuntimeError as error:
    needed = _needed_memory(error)
    if needed is None:
      raise
    return None, needed


def _tpus(topology):
  if not accelerators.has_libtpu():
    raise errors.UserError(
      f'--topology={topology} is compiled by libtpu, which is not '
      "installed; pip install '.[tpu]', or set TPU_LIBRARY_PATH to a "
      'libtpu.so.'
    )
  # This process uses no TPU: do not look for one, and load the library even if
  # another process holds it.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  options = dict(_OPTIONS.get(topology.generation.name, {}))
  if topology.num_slices > 1:
    options['num_slices'] = topology.num_slices
  one_slice = str(dataclasses.replace(topology, num_slices=1))
  return topologies.get_topology_desc(
    platform='tpu', topology_name=one_slice, **options
  )


def _gpus(topology):
  plugins = accelerators.cuda_plugins()
  if not plugins:
    version = jax.__version__
    raise errors.UserError(
      f"--topology={topology} is compiled by jaxlib's plugin for CUDA, "
      'which is not installed; pip install --no-deps '
      f'jax-cuda13-pjrt=={version} jax-cuda13-plugin=={version}.'
    )
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  importlib.import_module(plugins[0])
  sizes = 'x'.join(map(str, topology.shape))
  return topologies.get_topology_desc(
    topology.generation.name,
    'cuda',
    topology=f'1x{sizes}',
    target_config=_target_config(topology.generation),
  )


def _target_config(generation: accelerators.Generation) -> str:
  """Returns what XLA must know of a GPU, in the text form of its message."""
  chip, target = generation.chip, generation.target
  major, minor = target.capability
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_core: {(target.shared_kib + 1) * 1024}
      threads_per_core_limit: 2048
      core_count: {target.num_cores}
      fpus_per_core: 128
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.hbm_bandwidth)}
      l2_cache_size: {target.cache_mib * 2**20}
      clock_rate_ghz: {target.clock_mhz / 1000}
      device_memory_size: {int(chip.hbm_bytes)}
      shared_memory_per_block_optin: {target.shared_kib * 1024}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    device_description_str: "NVIDIA {generation.name.upper()}"
  """


def _needed_memory(error: Exception) -> str | None:
  """Returns the compiler's words on a program that is too large, or None."""
  text = ' '.join(str(error).split())
  if not re.search(r'RESOURCE_EXHAUSTED|[Oo]ut of memory', text):
    return None
  found = re.search(r'Used [\d.]+\w* of [\d.]+\w* hbm', text)
  return found[0] if found else text[:200]


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
  """Discards messages of the library about hosts that do not exist."""
  # It writes to the file descriptor, not to `sys.stderr`.
  keep = os.dup(2)
  try:
    with open(os.devnull, 'wb') as nowhere:
      os.dup2(nowhere.fileno(), 2)
      yield
  finally:
    os.dup2(keep, 2)
    os.close(keep)
