"""Several processes on this machine, each with its own CPU devices.

This is a small pod: the processes find each other, share the batches and save
together. If one fails, the launcher prints which one and the end of its log,
and ends the others. The launcher passes the first SIGTERM, SIGHUP or Ctrl-C on,
and the run saves; a second one ends everything at once.
"""

from collections.abc import Callable, Mapping
import contextlib
import ctypes
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from launch import scripts
from launch.targets import jobs
from nested_learning import distributed
from nested_learning import errors

_TOGETHER = 15  # seconds for the others to end for the same reason
_KILLED = 2  # the same if one was killed: the others cannot know of it


def plan(job: jobs.Job) -> jobs.Plan:
  """Plans N processes of M devices, from --target=local-procs:NxM."""
  match = re.fullmatch(r'([1-9]\d*)(?:x([1-9]\d*))?', job.size)
  if not match:
    raise errors.UserError(
      f'--target=local-procs:{job.size} must say how many processes, and '
      'optionally of how many devices: local-procs:4 or local-procs:4x2.'
    )
  if job.topology is not None:
    raise errors.UserError(
      f'--topology={job.topology} is not for --target=local-procs; its size is '
      'after the colon, as in local-procs:4x2.'
    )
  count, num_devices = int(match[1]), int(match[2] or 1)
  if not jobs.is_writable(job.workdir):
    raise errors.UserError(
      f'Cannot write to --workdir={job.workdir}; choose a folder that is yours.'
    )
  command = jobs.local_command(job)
  environments = [
    {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(num_devices),
      'JAX_COORDINATOR_ADDRESS': 'localhost:PORT',
      'JAX_NUM_PROCESSES': str(count),
      'JAX_PROCESS_ID': str(i),
      **job.env,
    }
    for i in range(count)
  ]
  lines = [
    scripts.join(['env', *(f'{k}={v}' for k, v in env.items()), *command])
    + ' &'
    for env in environments
  ]
  return jobs.Plan(
    script='\n'.join(
      ['# PORT is one that is free.', *lines, 'wait # for all of them', '']
    ),
    run=lambda: _run(job, command, environments),
    num_processes=count,
    num_devices=count * num_devices,
    shares_disk=True,
  )


def _run(
  job: jobs.Job, command: list[str], environments: list[dict[str, str]]
) -> int:
  """Runs the processes; starts them again if another attempt may help."""
  left = job.max_restarts or 0
  while True:
    with _Group(pathlib.Path(job.workdir) / 'logs') as group:
      port = _free_port()
      for i, env in enumerate(environments):
        env = env | {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}'}
        group.start(i, command, env)
      code = group.wait()
    retry = code == distributed.EXIT_RETRY or code >= 128
    if not retry or group.signal is not None or not left:
      return code
    left -= 1
    _say(f'starting again; {left} restarts are left.')


class _Group:
  """The processes of one attempt; none of them outlives the `with` block."""

  def __init__(self, logs: pathlib.Path):
    self.signal: int | None = None
    self._logs = logs
    self._processes: list[subprocess.Popen] = []
    self._files = contextlib.ExitStack()
    self._previous: Mapping[int, object] = {}

  def __enter__(self) -> '_Group':
    self._previous = {
      number: signal.signal(number, self._pass_on)
      for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    return self

  def __exit__(self, *_):
    self._kill()
    self._files.close()
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def start(self, index: int, command: list[str], env: dict[str, str]) -> None:
    """Starts a process; the first has the terminal, the others have logs."""
    output = None
    if index:
      self._logs.mkdir(parents=True, exist_ok=True)
      log = (self._logs / f'process-{index}.log').open('w')
      output = self._files.enter_context(log)
    self._processes.append(
      subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # Ctrl-C reaches only the launcher, which passes it on once.
        start_new_session=True,
        preexec_fn=_end_with_parent,
      )
    )

  def wait(self) -> int:
    """Waits for all; returns 0, or the code of the first that failed."""
    self._poll(lambda: any(self._codes()) or None not in self._codes())
    codes = self._codes()
    failed = [i for i, code in enumerate(codes) if code]
    if not failed:
      return 0
    first = failed[0]
    code = codes[first]
    # If it was killed, the others wait for it in vain.
    lost = code < 0 and self.signal is None
    patience = time.monotonic() + (_KILLED if lost else _TOGETHER)
    self._poll(lambda: None not in self._codes() or time.monotonic() > patience)
    alive = self._codes().count(None)
    if (alive or code < 0) and self.signal is None:
      how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
      others = f'; ending the other {alive}' if alive else ''
      _say(f'process {first} of {len(codes)} ended with {how}{others}.')
      if first:
        self._show_log(first)
    self._kill()
    if self.signal is not None:
      return 128 + self.signal
    return code if code > 0 else 128 - code

  def _poll(self, done: Callable[[], bool]) -> None:
    while not done():
      time.sleep(0.05)

  def _codes(self) -> list[int | None]:
    return [process.poll() for process in self._processes]

  def _pass_on(self, number: int, _) -> None:
    if self.signal is not None:
      self._kill()
      return
    self.signal = number
    for process in self._processes:
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)

  def _kill(self) -> None:
    for process in self._processes:
      if process.poll() is None:
        process.kill()
    for process in self._processes:
      process.wait()

  def _show_log(self, index: int) -> None:
    """Shows how the log of a process ends."""
    path = self._logs / f'process-{index}.log'
    lines = path.read_text(errors='replace').splitlines()
    for line in lines[-5:]:
      print(f'  {line}', file=sys.stderr)
    _say(f'the whole log is {path}.')


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


# Looked up at import: between fork and exec little is safe.
_PRCTL = getattr(ctypes.CDLL(None), 'prctl', None)


def _end_with_parent() -> None:
  """Asks Linux for SIGTERM if the launcher dies."""
  if _PRCTL is not None:
    _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _say(text: str) -> None:
  print(f'run.py: {text}', file=sys.stderr, flush=True)
