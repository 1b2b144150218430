"""Starts the runs of a sweep: on this machine, or as an array of Slurm."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import fcntl
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import tqdm

from launch import provenance
from launch import scripts
from launch.sweeps import record as record_lib
from nested_learning import errors
from nested_learning import files

_POLL = 0.1  # seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL = 100_000  # bytes of a log in which the error is looked for
_GRACE = 300  # seconds before Slurm's time limit, for a run to save


class Outcome(NamedTuple):
  """The outcome of `run_all`.

  Attributes:
    failures: From the name of each run that did not finish to the reason.
    received: The signal that ended the sweep early, or None.
    num_stopped: Runs that this signal stopped; they had time to save.
    num_waiting: Runs that had not begun when it came.
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
  """Runs everything that is not finished, each run in its own process.

  A run is finished when its summary.json exists. Its output goes to log.txt in
  its folder, and the code, machine and date of each start to started.jsonl. If
  it fails, the line of the error goes to error.txt and the other runs go on. A
  run that another process is working on is skipped. SIGTERM, SIGHUP and Ctrl-C
  reach the runs as SIGTERM, and they get all the time that they need to save; a
  second signal kills them.

  Args:
    runs: The runs, in the order in which they start.
    make_command: Returns the command of a run, which resumes a workdir.
    num_jobs: Number of runs at a time.
    environment: Environment of the commands; None is that of this process.
    fetch: Called after a command that succeeded on another machine, to bring
      its summary.json into the run's folder.
    name: Name of the progress bar.

  Returns:
    The failures, and how many runs a signal left undone.
  """
  waiting = collections.deque(run for run in runs if not run.finished)
  children: list[_Child] = []
  failures: dict[str, str] = {}
  num_stopped, num_told = 0, 0
  note = functools.partial(
    provenance.note_start, num_jobs=num_jobs, is_here=fetch is None
  )
  with _received() as signals, _bar(runs, name) as bar:

    def fail(run, reason):
      failures[run.name] = reason
      bar.set_description_str(f'{name}, {len(failures)} failed', refresh=False)
      bar.update()

    while children or (waiting and not signals):
      while waiting and len(children) < num_jobs and not signals:
        run = waiting.popleft()
        try:
          child = _start(run, make_command(run), environment, note)
        except OSError as error:
          fail(run, f'cannot be started: {error}')
          continue
        if child:
          children.append(child)
          bar.set_postfix_str(' '.join(c.run.name for c in children))
        elif run.finished:
          bar.update()  # another process finished it meanwhile
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


def make_array_script(
  names: Sequence[str],
  command: Sequence[str],
  *,
  folder: str,
  logs: str,
  options: Sequence[str] = (),
  num_jobs: int | None = None,
) -> str:
  """Returns the script of a Slurm array with a task for each run.

  Each task runs `command --only=NAME` and gets SIGTERM five minutes before its
  time limit. Submitted again, finished runs end at once and others resume.

  Args:
    names: Names of the runs.
    command: Command that runs one of them.
    folder: Working folder of the command.
    logs: Folder of Slurm's own logs, relative to `folder`.
    options: Options of sbatch, as in `--time=4:00:00`. They come before the
      script's own options and cannot change these.
    num_jobs: Maximum number of tasks at a time; None leaves it to Slurm.

  Returns:
    A bash script.

  Raises:
    errors.UserError: An option is malformed, or is --array.
  """
  for option in options:
    if option.startswith('--array'):
      raise errors.UserError(
        f'--sbatch={option} is no option that an array of runs can have; leave '
        'it out.'
      )
  at_once = f'%{num_jobs}' if num_jobs else ''
  directives = [
    '--job-name=sweep',
    *options,
    f'--array=0-{len(names) - 1}{at_once}',
    f'--signal=B:TERM@{_GRACE}',
    '--requeue',
    '--open-mode=append',
  ]
  lines = [
    '#!/bin/bash',
    *map(scripts.directive, directives),
    scripts.log_directive(logs, 'slurm_%A_%a.txt'),
    '',
    f'cd {scripts.quote(folder)} || exit 1',
    'runs=(',
    *(f'  {scripts.quote(name)}' for name in names),
    ')',
    # Slurm signals the shell, so the command has to take the shell's place.
    f'exec {scripts.join(command)} "--only=${{runs[$SLURM_ARRAY_TASK_ID]}}"',
  ]
  return '\n'.join(lines) + '\n'


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
  note: Callable[[pathlib.Path], None],
) -> _Child | None:
  """Starts a run, unless it is finished or another process is working on it.

  The new process inherits the lock on its folder, so that it holds the lock for
  as long as it lives, even if this process dies first.
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
    note(run.folder)
    log_start = os.fstat(log.fileno()).st_size
    process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**(environment or os.environ), 'PYTHONUNBUFFERED': '1'},
      start_new_session=True,  # Ctrl-C reaches it once, through this process
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
  """Writes the reason why a run ended to its error.txt, and returns it."""
  with open(child.run.folder / record_lib.LOG, 'rb') as log:
    end = log.seek(0, os.SEEK_END)
    log.seek(max(child.log_start, end - _TAIL))
    text = log.read().decode('utf-8', errors='replace')
  reason = _reason(text, child.process.returncode)
  files.write_whole(child.run.folder / record_lib.ERROR, f'{reason}\n')
  return reason


def _reason(text: str, code: int) -> str:
  """Returns the line of a log that says why the process ended."""
  number = -code if code < 0 else code - 128
  if number in set(signal.Signals):
    name = signal.Signals(number).name
    note = ', perhaps for lack of memory' if name == 'SIGKILL' else ''
    return f'stopped by {name}{note}'
  lines = [line.strip() for line in re.split(r'[\r\n]+', text)]
  lines = [line for line in lines if line]
  # Functions that run at exit may print more lines after the error.
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
