"""Runs several processes as one: they join, agree, wait and end together.

`cluster.py` finds them. If a process is lost, fails or hangs, all of them end
within a stated time, with one line that names the process and the reason.

A process that is lost (killed, or its machine is gone) ends the others after
`heartbeat_seconds`. One that fails ends them after at most ten seconds more
(`end`). One that hangs ends itself after `hang_seconds`, with the stacks of
all its threads, and thereby the others.

JAX is imported late, because a launcher that starts no process needs none.
"""

from collections.abc import Callable, Mapping
import faulthandler
import hashlib
import itertools
import os
import re
import sys
import threading
import time
from typing import Any

from nested_learning import cluster
from nested_learning import errors

# The exit code of a failure that is worth a retry; so are the codes from 128
# on, which are signals.
EXIT_RETRY = 42

_START_SECONDS = 1800  # a cold pod takes longer than JAX's default of 300
_END_SECONDS = 10  # for the others to fail as well

_numbers = itertools.count()  # numbers barriers: no name is used twice
_watchdog: '_Watchdog | None' = None  # one per process, as in faulthandler


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int = 60,
  hang_seconds: int = 1800,
) -> None:
  """Joins the other processes of the run, if there are any.

  Call it before any use of a device. With one process it does nothing.

  Args:
    coordinator_address: See `cluster.find`; from the environment by default.
    num_processes: See `cluster.find`.
    process_id: See `cluster.find`.
    heartbeat_seconds: A process that is silent for this long is lost, and all
      others end.
    hang_seconds: A process that does not call `progress` for this long dumps
      the stacks of its threads and ends with EXIT_RETRY. Must be longer than
      compilation, an evaluation and a save.

  Raises:
    errors.UserError: The cluster is described in part or wrongly, or not all
      processes came.
  """
  found = cluster.find(
    os.environ,
    coordinator_address=coordinator_address,
    num_processes=num_processes,
    process_id=process_id,
  )
  if found is None:
    return
  import jax

  try:
    jax.distributed.initialize(
      **found,
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except (ValueError, RuntimeError) as error:
    if not found and 'coordinator_address should be defined' in str(error):
      return  # libtpu and chips, but no pod around them
    raise errors.UserError(
      'The processes of this run did not find each other '
      f'({_first_line(error)}); check {cluster.ADDRESS}, {cluster.COUNT} and '
      f'{cluster.INDEX}, or what the cluster says in their place.'
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
  """Reports that this process is alive; see `hang_seconds` of `initialize`."""
  if _watchdog is not None:
    _watchdog.rearm()


def barrier(name: str, *, timeout_seconds: float = 600) -> None:
  """Waits until all processes are here.

  Args:
    name: Name of the barrier, for the error.
    timeout_seconds: Longest time to wait.

  Raises:
    TimeoutError: Not all came in time; it names those that are missing.
  """
  if is_together():
    _wait(f'{name}:{next(_numbers)}', timeout_seconds)


def first_does(name: str, function: Callable[[], str | None]) -> str | None:
  """Calls a function in process 0 and returns its result in all processes.

  Args:
    name: Name of the call, for the error of a process that waits in vain.
    function: Called without arguments. Returns a string or None.

  Returns:
    The result of process 0.

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
      kind = 'retry' if isinstance(error, errors.Retryable) else 'error'
      _client().key_value_set(key, f'{kind}:{error}')
      raise
    _client().key_value_set(key, 'none' if result is None else f'ok:{result}')
    return result
  kind, _, text = _client().blocking_key_value_get(key, 600_000).partition(':')
  if kind == 'error':
    raise errors.UserError(text)
  if kind == 'retry':
    raise errors.Retryable(text)
  return None if kind == 'none' else text


def gather(name: str, text: str) -> list[str]:
  """Exchanges a text between all processes.

  Args:
    name: Name of the exchange, for the error of a process that waits in vain.
    text: The text of this process.

  Returns:
    The texts, by process.

  Raises:
    TimeoutError: Not all processes called it in time.
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
  """Checks that values are the same in all processes.

  Args:
    values: Values by name.

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
  """Checks that all processes have the same config, JAX and devices.

  Args:
    config: The config as text.

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
  """Prints an error and ends this process so that the others end as well.

  If all processes fail, for instance because of a setting, process 0 prints the
  error and this returns. If others still work, this does not return: it ends
  the process at once, because the ordinary exit of Python would wait for them,
  and they for it.

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


def leave() -> None:
  """Leaves the other processes, as the ordinary exit of Python does.

  For a process that ends by `os._exit`, which would look lost to the others.
  """
  if is_together():
    import jax

    jax.distributed.shutdown()


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
  """A thread that ends the process if `rearm` is not called in time."""

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._armed = 0.0
    self.rearm()
    threading.Thread(target=self._run, daemon=True).start()

  def rearm(self) -> None:
    now = time.monotonic()
    if now - self._armed > min(1, self._seconds / 10):
      self._armed = now
      # If a thread holds the interpreter, `_run` cannot run. This needs no
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


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _client() -> Any:
  """Returns the connection to process 0; JAX has no public name for it."""
  from jax._src import distributed

  return distributed.global_state.client


def _index_and_count() -> tuple[int, int]:
  """Returns index and number of processes; (0, 0) before `initialize`.

  `jax.process_index` would start the devices, which may fail or hang.
  """
  from jax._src import distributed

  state = distributed.global_state
  return state.process_id, state.num_processes if state.client else 0
