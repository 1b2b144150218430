"""Runs on this machine, a few at a time."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import tqdm

from launch.sweeps import record as record_lib
from nested_learning import files

_POLL = 0.1  # seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL = 100_000  # bytes of a log in which the error is looked for


class Outcome(NamedTuple):
  """How it went.

  Attributes:
    failures: From the name of each run that did not finish to the reason.
    received: The signal that ended it all early, or None.
    num_stopped: Runs that this signal stopped; they saved if they could.
    num_waiting: Runs that had not begun then.
  """

  failures: dict[str, str]
  received: signal.Signals | None
  num_stopped: int
  num_waiting: int


class _Child(NamedTuple):
  run: record_lib.Run
  process: subprocess.Popen
  log_start: int  # where in the log this attempt begins


def run_all(
  runs: Sequence[record_lib.Run],
  make_command: Callable[[record_lib.Run], Sequence[str]],
  *,
  num_jobs: int = 1,
  environment: Mapping[str, str] | None = None,
  fetch: Callable[[record_lib.Run], None] | None = None,
  name: str = 'sweep',
) -> Outcome:
  """Runs what is not finished, each run in a process of its own.

  A run is finished when its summary.json exists. What it prints goes to log.txt
  in its folder; if it fails, the line of its error to error.txt, and the others
  go on. A run that another process is at work on is left to it. SIGTERM, SIGHUP
  and Ctrl-C pass on as SIGTERM, and the runs get all the time that they need to
  save; a second signal kills them.

  Args:
    runs: The runs, in their order.
    make_command: From a run to the command, which resumes what it finds.
    num_jobs: How many at a time.
    environment: Of the commands; None is that of this process.
    fetch: Called after a command that succeeded elsewhere, to bring its
      summary.json into the run's folder.
    name: Of the progress bar.

  Returns:
    The failures, and what a signal left undone.
  """
  waiting = collections.deque(run for run in runs if not run.finished)
  children: list[_Child] = []
  failures: dict[str, str] = {}
  num_stopped, num_told = 0, 0
  with _received() as signals, _bar(runs, name) as bar:

    def fail(run, reason):
      failures[run.name] = reason
      bar.set_description_str(f'{name}, {len(failures)} failed', refresh=False)
      bar.update()

    while children or (waiting and not signals):
      while waiting and len(children) < num_jobs and not signals:
        run = waiting.popleft()
        try:
          child = _start(run, make_command(run), environment)
        except OSError as error:
          fail(run, f'cannot be started: {error}')
          continue
        if child:
          children.append(child)
          bar.set_postfix_str(' '.join(c.run.name for c in children))
        elif run.finished:
          bar.update()  # by somebody else, while it waited here
        else:
          fail(run, 'another process is at work on it')
      if len(signals) > num_told:
        num_told = len(signals)
        for child in children:
          _stop(child, kill=num_told > 1)
      time.sleep(_POLL)
      for child in [c for c in children if c.process.poll() is not None]:
        children.remove(child)
        if fetch and not child.process.returncode:
          fetch(child.run)
        if child.run.finished:
          bar.update()
        elif signals:
          num_stopped += 1
        else:
          fail(child.run, _write_error(child))
  received = signals[0] if signals else None
  return Outcome(failures, received, num_stopped, len(waiting))


def _bar(runs: Sequence[record_lib.Run], name: str) -> tqdm.tqdm:
  return tqdm.tqdm(
    total=len(runs),
    initial=sum(run.finished for run in runs),
    desc=name,
    unit='run',
    mininterval=0.2 if sys.stderr.isatty() else 10,
    dynamic_ncols=True,
  )


def _start(
  run: record_lib.Run,
  command: Sequence[str],
  environment: Mapping[str, str] | None,
) -> _Child | None:
  """Starts a run, unless it is finished or another process has it.

  The process inherits a lock on its folder and keeps it for as long as it
  lives, also when this one dies before it.
  """
  run.folder.mkdir(parents=True, exist_ok=True)
  with (
    open(run.folder / '.lock', 'ab') as lock,
    open(run.folder / record_lib.LOG, 'ab') as log,
  ):
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return None
    if run.finished:
      return None
    (run.folder / record_lib.ERROR).unlink(missing_ok=True)
    log_start = os.fstat(log.fileno()).st_size
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**(environment or os.environ), 'PYTHONUNBUFFERED': '1'},
      start_new_session=True,  # so that Ctrl-C comes from here alone, once
      pass_fds=(lock.fileno(),),
    )
  return _Child(run, process, log_start)


def _stop(child: _Child, *, kill: bool) -> None:
  with contextlib.suppress(ProcessLookupError):
    if kill:
      os.killpg(child.process.pid, signal.SIGKILL)
    else:
      child.process.terminate()


def _write_error(child: _Child) -> str:
  """Writes what ended a run to its error.txt, and returns it."""
  with open(child.run.folder / record_lib.LOG, 'rb') as log:
    end = log.seek(0, os.SEEK_END)
    log.seek(max(child.log_start, end - _TAIL))
    text = log.read().decode('utf-8', errors='replace')
  reason = _reason(text, child.process.returncode)
  files.write_whole(child.run.folder / record_lib.ERROR, f'{reason}\n')
  return reason


def _reason(text: str, code: int) -> str:
  """The line of a log that says why its process ended with this code."""
  number = -code if code < 0 else code - 128
  if number in set(signal.Signals):
    name = signal.Signals(number).name
    note = ', perhaps for want of memory' if name == 'SIGKILL' else ''
    return f'stopped by {name}{note}'
  lines = [line.strip() for line in re.split(r'[\r\n]+', text)]
  lines = [line for line in lines if line]
  # What is printed at exit may follow the error.
  error = re.compile(r'run\.py: |[\w.]*(?:Error|Exception)\b')
  lines = [line for line in lines if error.match(line)] or lines
  last = lines[-1] if lines else 'no output'
  if code == 0:
    return f'ended without {record_lib.SUMMARY}: {last}'
  return last


@contextlib.contextmanager
def _received() -> Iterator[list[Any]]:
  """Collects signals in a list instead of ending the process."""
  received: list[Any] = []
  previous = {
    number: signal.signal(
      number, lambda number, _: received.append(signal.Signals(number))
    )
    for number in _SIGNALS
  }
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
