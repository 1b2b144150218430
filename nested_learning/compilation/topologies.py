"""Devices of a pod that is not there, for the compiler alone.

TPUs need the package `libtpu`, GPUs a plugin of jaxlib: both compile for
hardware without having it.
"""

from collections.abc import Iterator, Sequence
import contextlib
import importlib
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from nested_learning import errors

# What is needed to compile for a GPU, in the text form of XLA's own message.
_GPUS = {
  'a100': ((8, 0), 108, 164, 2039, 1410, 80, 40),
  'h100': ((9, 0), 132, 227, 3352, 1980, 80, 50),
  'h200': ((9, 0), 132, 227, 4800, 1980, 141, 50),
  'b200': ((10, 0), 148, 227, 7700, 1965, 180, 126),
}
# Real v4 chips are one device, which the compiler does not assume.
_OPTIONS = {'v4': {'chip_config_name': 'megacore'}}


def find_devices(
  name: str, shape: Sequence[int], num_slices: int = 1
) -> list[Any]:
  """The devices of a topology.

  Args:
    name: Generation, for instance 'v5e' or 'h100'.
    shape: Of a slice, in chips; for GPUs nodes x GPUs per node.
    num_slices: Slices joined by a slower network.

  Returns:
    Devices to make a mesh of, and to compile for.

  Raises:
    errors.UserError: The compiler for that hardware is not installed, or does
      not know the topology.
  """
  sizes = 'x'.join(map(str, shape))
  spec = f'{name}:{sizes}' + (f'*{num_slices}' if num_slices > 1 else '')
  with _quiet():
    try:
      if name in _GPUS:
        found = _gpus(name, sizes)
      else:
        found = _tpus(name, sizes, num_slices)
    except errors.UserError:
      raise
    except (
      ImportError,
      RuntimeError,
      ValueError,
      NotImplementedError,
    ) as error:
      raise errors.UserError(
        f'--topology={spec}: the compiler cannot make it '
        f'({str(error).strip().splitlines()[0][:200]}).'
      ) from error
  return list(found.devices)


def _tpus(name, sizes, num_slices):
  if not (
    importlib.util.find_spec('libtpu') or os.environ.get('TPU_LIBRARY_PATH')
  ):
    raise errors.UserError(
      f'--topology={name}:{sizes} is compiled by libtpu, which is not '
      "installed; pip install '.[tpu]', or set TPU_LIBRARY_PATH to a "
      'libtpu.so.'
    )
  # This process reaches no TPU: it must not look for one, and may load the
  # library while another process has it.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  options = dict(_OPTIONS.get(name, {}))
  if num_slices > 1:
    options['num_slices'] = num_slices
  return topologies.get_topology_desc(
    platform='tpu', topology_name=f'{name}:{sizes}', **options
  )


def _gpus(name, sizes):
  plugins = [
    f'jax_plugins.xla_cuda{version}'
    for version in (13, 12)
    if importlib.util.find_spec('jax_plugins')
    and importlib.util.find_spec(f'jax_plugins.xla_cuda{version}')
  ]
  if not plugins:
    version = jax.__version__
    raise errors.UserError(
      f"--topology={name}:{sizes} is compiled by jaxlib's plugin for CUDA, "
      'which is not installed; pip install --no-deps '
      f'jax-cuda13-pjrt=={version} jax-cuda13-plugin=={version}.'
    )
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  importlib.import_module(plugins[0])
  return topologies.get_topology_desc(
    name, 'cuda', topology=f'1x{sizes}', target_config=_target_config(name)
  )


def _target_config(name: str) -> str:
  (major, minor), cores, shared, bandwidth, clock, memory, cache = _GPUS[name]
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_core: {(shared + 1) * 1024}
      threads_per_core_limit: 2048
      core_count: {cores}
      fpus_per_core: 128
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {bandwidth * 10**9}
      l2_cache_size: {cache * 2**20}
      clock_rate_ghz: {clock / 1000}
      device_memory_size: {memory * 10**9}
      shared_memory_per_block_optin: {shared * 1024}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    device_description_str: "NVIDIA {name.upper()}"
  """


def out_of_memory(error: Exception) -> str | None:
  """What the compiler says of a program that is too large, or None."""
  text = ' '.join(str(error).split())
  if not re.search(r'RESOURCE_EXHAUSTED|[Oo]ut of memory', text):
    return None
  found = re.search(r'Used [\d.]+\w* of [\d.]+\w* hbm', text)
  return found[0] if found else text[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences what the library writes past Python about hosts it cannot see."""
  keep = os.dup(2)
  try:
    with open(os.devnull, 'wb') as nowhere:
      os.dup2(nowhere.fileno(), 2)
      yield
  finally:
    os.dup2(keep, 2)
    os.close(keep)
