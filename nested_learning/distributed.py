"""Several processes as one run: how they meet, agree, wait and end.

`jax.distributed` finds TPU pods, Slurm, and Open MPI up to 4 by itself. This
module adds Open MPI 5 and environment variables of its own, and what a run
needs when something goes wrong: a process that is lost, fails or hangs ends all
of them within a stated time, with one line that says which and why.

A process that is lost (killed, or its machine is gone) ends the others after
`heartbeat_seconds`. One that fails ends them after at most ten seconds more
(`end`). One that hangs ends itself after `hang_seconds`, with the stacks of
all its threads, and thereby the others.

JAX is imported late: a launcher that starts no process does without it.
"""

from collections.abc import Callable, Mapping
import faulthandler
import hashlib
import importlib.util
import itertools
import os
import re
import sys
import threading
import time
from typing import Any
import zlib

from nested_learning import errors

# The exit code of a failure that is worth another attempt; so are the codes
# from 128 on, which are signals.
EXIT_RETRY = 42

_START_SECONDS = 1800  # a cold pod takes longer than JAX's default of 300
_END_SECONDS = 10  # for the others to fail as well
_ADDRESS = 'JAX_COORDINATOR_ADDRESS'
_COUNT = 'JAX_NUM_PROCESSES'
_INDEX = 'JAX_PROCESS_ID'

_numbers = itertools.count()  # of barriers: no name is used twice
_watchdog: '_Watchdog | None' = None  # of this process, as in faulthandler


def find_cluster(
  environ: Mapping[str, str],
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> dict[str, Any] | None:
  """Arguments for `jax.distributed.initialize`, or None for one process.

  What is given comes first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
  and JAX_PROCESS_ID (or the JOB_COMPLETION_INDEX of a Kubernetes job), then
  Open MPI, Slurm and TPUs.

  Args:
    environ: The environment.
    coordinator_address: Host and port of process 0.
    num_processes: How many there are.
    process_id: Which one this is.

  Returns:
    The arguments; empty where JAX finds them itself.

  Raises:
    errors.UserError: Some are there and others are missing or wrong.
  """
  address = coordinator_address or environ.get(_ADDRESS)
  count = _integer(num_processes, _COUNT, environ)
  index = _integer(process_id, _INDEX, environ)
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


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int = 60,
  hang_seconds: int = 1800,
) -> None:
  """Joins the other processes of the run, if there are any.

  Call it before anything that uses a device. With one process it does nothing.

  Args:
    coordinator_address: See `find_cluster`; from the environment by default.
    num_processes: See `find_cluster`.
    process_id: See `find_cluster`.
    heartbeat_seconds: A process that is silent for so long is lost, and all
      others end.
    hang_seconds: A process that does not call `progress` for so long dumps the
      stacks of its threads and ends with EXIT_RETRY. Longer than compilation,
      an evaluation and a save take.

  Raises:
    errors.UserError: The cluster is described in part or wrongly, or not all
      processes came.
  """
  cluster = find_cluster(
    os.environ,
    coordinator_address=coordinator_address,
    num_processes=num_processes,
    process_id=process_id,
  )
  if cluster is None:
    return
  import jax

  try:
    jax.distributed.initialize(
      **cluster,
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except (ValueError, RuntimeError) as error:
    if not cluster and 'coordinator_address should be defined' in str(error):
      return  # libtpu and chips, but no pod around them
    raise errors.UserError(
      'The processes of this run did not find each other '
      f'({_first_line(error)}); check {_ADDRESS}, {_COUNT} and {_INDEX}, or '
      'what the cluster says in their place.'
    ) from error
  global _watchdog
  _watchdog = _Watchdog(hang_seconds)


def is_together() -> bool:
  """Returns whether this process has joined others."""
  # Without JAX it has not.
  return 'jax' in sys.modules and _index_and_count()[1] > 0


def is_first() -> bool:
  """Returns whether this is the process that prints and writes reports."""
  return not is_together() or _index_and_count()[0] == 0


def progress() -> None:
  """Says that this process is alive; see `hang_seconds` of `initialize`."""
  if _watchdog is not None:
    _watchdog.rearm()


def barrier(name: str, *, timeout_seconds: float = 600) -> None:
  """Waits until all processes are here.

  Args:
    name: Of the place, for the error.
    timeout_seconds: How long to wait.

  Raises:
    TimeoutError: Not all came in time; it names those that are missing.
  """
  if is_together():
    _wait(f'{name}:{next(_numbers)}', timeout_seconds)


def first_does(name: str, function: Callable[[], str | None]) -> str | None:
  """Calls a function in process 0 alone; all processes wait and learn of it.

  Args:
    name: Of what is done, for the error of a process that waits in vain.
    function: Called without arguments. Returns a string or None.

  Returns:
    What the function returned in process 0, in all of them.

  Raises:
    errors.UserError: The function raised it in process 0; then all raise it.
  """
  if not is_together():
    return function()
  key = f'{name}:{next(_numbers)}'
  if is_first():
    try:
      result = function()
    except errors.UserError as error:
      _client().key_value_set(key, f'error:{error}')
      raise
    _client().key_value_set(key, 'none' if result is None else f'ok:{result}')
    return result
  kind, _, text = _client().blocking_key_value_get(key, 600_000).partition(':')
  if kind == 'error':
    raise errors.UserError(text)
  return None if kind == 'none' else text


def gather(name: str, text: str) -> list[str]:
  """What every process says, in all of them.

  Args:
    name: Of what is asked, for the error of a process that waits in vain.
    text: What this process says.

  Returns:
    The texts, by process.

  Raises:
    TimeoutError: Not all said something in time.
  """
  if not is_together():
    return [text]
  place = f'{name}:{next(_numbers)}'
  index, count = _index_and_count()
  _client().key_value_set(f'{place}/{index}', f'={text}')  # never empty
  barrier(place)
  found = {
    int(key.rsplit('/', 1)[1]): value[1:]
    for key, value in _client().key_value_dir_get(f'{place}/')
  }
  return [found[i] for i in range(count)]


def check_equal(values: Mapping[str, Any]) -> None:
  """Refuses to start with processes that do not fit together.

  Args:
    values: By what they are called; each must be the same in all processes.

  Raises:
    errors.UserError: One differs; all processes raise it.
  """
  if not is_together():
    return
  place, here = f'equal:{next(_numbers)}', _index_and_count()[0]
  for name, value in values.items():
    _client().key_value_set(f'{place}/{name}/{here}', str(value))
  barrier(place)
  for name in values:
    found = {
      int(key.rsplit('/', 1)[1]): value
      for key, value in _client().key_value_dir_get(f'{place}/{name}/')
    }
    for index, value in sorted(found.items()):
      if value != found[0]:
        raise errors.UserError(
          f'process {index} has {name} {value}, and process 0 has {found[0]}; '
          'start all of them alike.'
        )


def check_alike(config: str) -> None:
  """Refuses processes with another config, JAX or number of devices.

  Args:
    config: What the run depends on, as text.

  Raises:
    errors.UserError: Something differs; all processes raise it.
  """
  if is_together():
    import jax

    check_equal(
      {
        'a config with the hash': hashlib.sha256(config.encode()).hexdigest(),
        'JAX': jax.__version__,
        'a number of devices of': jax.local_device_count(),
      }
    )


def end(code: int, message: str | None = None) -> None:
  """Prints an error and ends this process, the others not being forgotten.

  If all processes fail, for instance by the same setting, process 0 alone says
  so, and this returns. If the others still work this does not return: it ends
  the process at once, because the ordinary way out of Python would wait for
  them, and they for it.

  Args:
    code: The exit code.
    message: The line to print.
  """
  message = message and ' '.join(message.split())
  if not is_together():
    if message:
      print(message, file=sys.stderr)
    return
  index, count = _index_and_count()
  prefix = f'process {index} of {count}: '
  if index == 0 and message:
    print(message, file=sys.stderr, flush=True)
    _client().key_value_set('end message', message)
  try:
    _wait('end', _END_SECONDS)  # no number: the processes may have diverged
    together = True
  except TimeoutError:
    together = False
  if index and message:
    if not together or _said_by_first() != message:
      print(prefix + message, file=sys.stderr, flush=True)
  if not together:
    if index == 0:
      print(f'{prefix}ending alone.', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _said_by_first() -> str | None:
  try:
    return _client().key_value_try_get('end message')
  except Exception:  # jaxlib's own type: there is none
    return None


def _wait(place: str, seconds: float) -> None:
  try:
    _client().wait_at_barrier(place, int(seconds * 1000))
  except Exception as error:  # jaxlib's own type, which has no public name
    names = str(error).partition('task names:')[2].partition('RPC')[0]
    missing = ', '.join(re.findall(r'\d+', names)) or 'unknown'
    raise TimeoutError(
      f'not all processes came to {place!r} in {seconds:g} s; missing: '
      f'{missing}.'
    ) from error


class _Watchdog:
  """A thread that ends the process when nobody has called `rearm` for long."""

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._armed = 0.0
    self.rearm()
    threading.Thread(target=self._run, daemon=True).start()

  def rearm(self) -> None:
    now = time.monotonic()
    if now - self._armed > min(1, self._seconds / 10):
      self._armed = now
      # Where a thread holds the interpreter, `_run` cannot; this needs no
      # interpreter, but its exit code is 1.
      faulthandler.dump_traceback_later(self._seconds + 30, exit=True)

  def _run(self) -> None:
    while (left := self._armed + self._seconds - time.monotonic()) > 0:
      time.sleep(left)
    index, count = _index_and_count()
    print(
      f'process {index} of {count}: no progress in {self._seconds:g} s; ending '
      f'with code {EXIT_RETRY}. The stacks:',
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_RETRY)


def _explicit(address, count, index) -> dict[str, Any] | None:
  """The three that describe a cluster, all there and fitting together."""
  missing = [
    name
    for name, value in ((_ADDRESS, address), (_COUNT, count), (_INDEX, index))
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
      f'processes, {count} ({_INDEX}, {_COUNT}).'
    )
  if not re.fullmatch(r'.+:\d+', address):
    raise errors.UserError(
      f'{_ADDRESS}={address!r} must be host:port of process 0.'
    )
  return {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': index,
    'cluster_detection_method': 'deactivate',
  }


def _open_mpi(address, environ) -> dict[str, Any] | None:
  """Open MPI; from version 5 on it no longer says where process 0 is."""
  count = int(environ['OMPI_COMM_WORLD_SIZE'])
  if count == 1:
    return None
  if 'OMPI_MCA_orte_hnp_uri' in environ:
    return {}
  if address is None:
    if environ.get('OMPI_COMM_WORLD_LOCAL_SIZE') != str(count):
      raise errors.UserError(
        f'Open MPI started {count} processes on several machines and does not '
        f'say where process 0 is; set {_ADDRESS}=host:port (mpirun -x).'
      )
    # A port of its own for every run on this machine.
    run = environ.get('PMIX_NAMESPACE', '')
    address = f'localhost:{61440 + zlib.crc32(run.encode()) % 4096}'
  return {
    'coordinator_address': address,
    'num_processes': count,
    'process_id': int(environ['OMPI_COMM_WORLD_RANK']),
    'local_device_ids': [int(environ['OMPI_COMM_WORLD_LOCAL_RANK'])],
  }


def _may_be_tpu(environ) -> bool:
  """Whether JAX should ask for a TPU pod around this machine."""
  hosts = environ.get('TPU_PROCESS_ADDRESSES') or environ.get(
    'TPU_WORKER_HOSTNAMES'
  )
  if hosts is not None:  # Kubernetes says it all
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


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _client() -> Any:
  """The connection to process 0; JAX has no public name for it."""
  from jax._src import distributed

  return distributed.global_state.client


def _index_and_count() -> tuple[int, int]:
  """Which process this is, of how many; (0, 0) if it has not joined any.

  `jax.process_index` would start the devices, which may fail or hang.
  """
  from jax._src import distributed

  state = distributed.global_state
  return state.process_id, state.num_processes if state.client else 0
