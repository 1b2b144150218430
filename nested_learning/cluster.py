"""Finds the processes of a run from the environment of its launcher.

`jax.distributed` finds TPU pods, Slurm, and Open MPI up to 4 by itself. This
module adds Open MPI 5 and three environment variables.
"""

from collections.abc import Mapping
import importlib.util
import re
from typing import Any
import zlib

from nested_learning import errors

ADDRESS = 'JAX_COORDINATOR_ADDRESS'
COUNT = 'JAX_NUM_PROCESSES'
INDEX = 'JAX_PROCESS_ID'


def find(
  environ: Mapping[str, str],
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> dict[str, Any] | None:
  """Returns the arguments of `jax.distributed.initialize`.

  Arguments take precedence over JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID (or the JOB_COMPLETION_INDEX of a Kubernetes job), and these
  over Open MPI, Slurm and TPUs.

  Args:
    environ: The environment.
    coordinator_address: Host and port of process 0.
    num_processes: Number of processes.
    process_id: Index of this process.

  Returns:
    The arguments; empty if JAX finds them itself, None for one process.

  Raises:
    errors.UserError: Some are missing or wrong.
  """
  address = coordinator_address or environ.get(ADDRESS)
  count = _integer(num_processes, COUNT, environ)
  index = _integer(process_id, INDEX, environ)
  if count is not None or index is not None:
    if index is None:
      index = _integer(None, 'JOB_COMPLETION_INDEX', environ)
    return _explicit(address, count, index)
  if 'OMPI_COMM_WORLD_SIZE' in environ:
    return _open_mpi(address, environ)
  slurm = ('SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID')
  if all(name in environ for name in slurm):
    return None if environ['SLURM_NTASKS'] == '1' else {}
  if _may_be_tpu(environ):
    return {}
  if address is not None:
    return _explicit(address, count, index)
  return None


def _explicit(address, count, index) -> dict[str, Any] | None:
  """Checks the three values that describe a cluster and returns them."""
  missing = [
    name
    for name, value in ((ADDRESS, address), (COUNT, count), (INDEX, index))
    if value is None
  ]
  if missing and (count != 1 or index):
    raise errors.UserError(
      f'{" and ".join(missing)} must be set too, for processes to find each '
      'other: host:port of process 0, how many there are, and which this is.'
    )
  if count == 1:
    return None
  if not 0 <= index < count:
    raise errors.UserError(
      f'process id {index} must be at least 0 and below the number of '
      f'processes, {count} ({INDEX}, {COUNT}).'
    )
  if not re.fullmatch(r'.+:\d+', address):
    raise errors.UserError(
      f'{ADDRESS}={address!r} must be host:port of process 0.'
    )
  return {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': index,
    'cluster_detection_method': 'deactivate',
  }


def _open_mpi(address, environ) -> dict[str, Any] | None:
  """Finds Open MPI, which from version 5 on does not say where process 0 is."""
  count = int(environ['OMPI_COMM_WORLD_SIZE'])
  if count == 1:
    return None
  if 'OMPI_MCA_orte_hnp_uri' in environ:
    return {}
  if address is None:
    if environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') != str(count):
      raise errors.UserError(
        f'Open MPI started {count} processes on several machines and does not '
        f'say where process 0 is; set {ADDRESS}=host:port (mpirun -x).'
      )
    # Each run on this machine gets a port of its own.
    run = environ.get('PMIX_NAMESPACE', '')
    address = f'localhost:{61440 + zlib.crc32(run.encode()) % 4096}'
  return {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': int(environ['OMPI_COMM_WORLD_RANK']),
    'local_device_ids': [int(environ['OMPI_COMM_WORLD_LOCAL_RANK'])],
  }


def _may_be_tpu(environ) -> bool:
  """Returns whether JAX should ask for a TPU pod around this machine."""
  hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get(
    'TPU_WORKER_HOSTNAMES'
  )
  if hosts is not None:  # set by Kubernetes
    num_slices = int(environ.get('MEGASCALE_NUM_SLICES') or 1)
    return ',' in hosts or num_slices > 1
  if importlib.util.find_spec('libtpu') is None:
    return False
  import jax  # noqa: F401  (It sets the variable when it finds no chip.)

  return 'TPU_SKIP_MDS_QUERY' not in environ


def _integer(value: int | None, name: str, environ) -> int | None:
  if value is not None or name not in environ:
    return value
  try:
    return int(environ[name])
  except ValueError as error:
    raise errors.UserError(
      f'{name}={environ[name]!r} must be a whole number.'
    ) from error
