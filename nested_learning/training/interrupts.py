"""Defers SIGTERM, Ctrl-C, SIGHUP and SIGQUIT until the trainer has saved."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import os
import signal
import sys
import threading
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from nested_learning import distributed

T = TypeVar('T')

# Signals that ask a run to end. SSH and Slurm send SIGHUP; Windows lacks some.
SIGNALS = tuple(
  getattr(signal, name)
  for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT')
  if hasattr(signal, name)
)


class Interrupted(Exception):
  """Raised by `until` when it is time to stop."""


class Stop:
  """Tells whether to stop; processes that train together agree on when.

  Every process asks at the same points of the program. A signal to any of them
  makes all of them stop at the same point, the next that none has passed.

  Attributes:
    signal: The signal that arrived; SIGTERM if another process got it.
  """

  def __init__(self):
    self.signal: signal.Signals = signal.SIGTERM
    self._received = False
    self._asked = 0  # times, in the same order in every process

  def receive(self, number: int) -> None:
    """Takes note of a signal."""
    self.signal, self._received = signal.Signals(number), True

  def requested(self) -> bool:
    """Returns whether to stop here. Once true, always true.

    Asking also reports that the process is alive (`distributed.progress`).
    """
    distributed.progress()
    if not self._received and jax.distributed.is_initialized():
      self._asked += 1
      self._received = multihost_utils.reached_preemption_sync_point(
        self._asked
      )
    return self._received


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
  """Keeps `SIGNALS` for `Stop` instead of ending the process.

  A second signal does what it does by default, so that a process that hangs can
  still be ended. If processes train together, JAX has taken SIGTERM and tells
  all of them; the other signals become SIGTERM here.

  Yields:
    A `Stop`.
  """
  stop = Stop()

  def note(number, _):
    for name in SIGNALS:
      if _is_heard(name):
        signal.signal(name, _default(name))
    stop.receive(number)

  def pass_on(number, _):
    signal.signal(number, _default(number))
    os.kill(os.getpid(), signal.SIGTERM)

  if jax.distributed.is_initialized():
    numbers, handler = [n for n in SIGNALS if n != signal.SIGTERM], pass_on
  else:
    numbers, handler = SIGNALS, note
  with _handling(numbers, handler):
    yield stop


def until(stop: Stop, items: Iterable[T]) -> Iterator[T]:
  """Yields items; raises `Interrupted` as soon as it is time to stop."""
  for item in items:
    if stop.requested():
      raise Interrupted
    yield item


@contextlib.contextmanager
def ending(message: str) -> Iterator[None]:
  """Ends the process at one of `SIGNALS` with a line, not a traceback.

  For the work after the last save, where nothing can be lost.

  Args:
    message: A line that says how to resume. Process 0 prints it.

  Yields:
    Nothing.
  """
  with _handling(SIGNALS, lambda number, _: end(number, message)):
    yield


def end(number: int, message: str) -> None:
  """Raises SystemExit with the code of a signal, after a line by process 0."""
  if jax.process_index() == 0:
    with contextlib.suppress(OSError):  # a terminal that was closed
      print(f'{signal.Signals(number).name}: {message}', file=sys.stderr)
  raise SystemExit(128 + number)


@contextlib.contextmanager
def _handling(
  numbers: Iterable[signal.Signals], handler: Callable[[int, Any], None]
) -> Iterator[None]:
  """Handles signals, except those that the process ignores, as under nohup."""
  if threading.current_thread() is not threading.main_thread():
    yield  # Python allows no handlers here
    return
  previous = {
    number: signal.signal(number, handler)
    for number in numbers
    if _is_heard(number)
  }
  try:
    yield
  finally:
    for number, before in previous.items():
      signal.signal(number, before)


def _is_heard(number: signal.Signals) -> bool:
  return signal.getsignal(number) is not signal.SIG_IGN


def _default(number: signal.Signals) -> Any:
  is_interrupt = number == signal.SIGINT
  return signal.default_int_handler if is_interrupt else signal.SIG_DFL
