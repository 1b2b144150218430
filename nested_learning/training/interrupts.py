"""SIGTERM and Ctrl-C, kept until the trainer has saved."""

from collections.abc import Iterable, Iterator
import contextlib
import os
import signal
import sys
import threading
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from nested_learning import distributed

T = TypeVar('T')

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
  """It is time to stop."""


class Stop:
  """Whether to stop; processes that train together agree on when.

  Every process asks at the same points of the program. A signal to any of them
  makes all of them stop at one and the same of these points, the next that none
  has passed.

  Attributes:
    signal: The signal that arrived; SIGTERM where another process got it.
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

    To ask is to say that the process is alive (`distributed.progress`).
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
  """Keeps SIGTERM and SIGINT for `Stop` instead of ending the process.

  A second signal does what it does by default, so that a process that hangs can
  still be ended. Where processes train together, JAX has taken SIGTERM and
  tells all of them; SIGINT becomes SIGTERM here. Outside the main thread
  Python allows no handlers, and nothing is kept.

  Yields:
    Whether to stop.
  """
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  together = jax.distributed.is_initialized()
  defaults = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
  }

  def note(number, _):
    for name in previous:
      signal.signal(name, defaults[name])
    stop.receive(number)

  def pass_on(number, _):
    signal.signal(number, defaults[number])
    os.kill(os.getpid(), signal.SIGTERM)

  handlers = (
    {signal.SIGINT: pass_on} if together else dict.fromkeys(_SIGNALS, note)
  )
  previous = {
    number: signal.signal(number, handler)
    for number, handler in handlers.items()
  }
  try:
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def until(stop: Stop, items: Iterable[T]) -> Iterator[T]:
  """Yields items; raises `Interrupted` as soon as it is time to stop."""
  for item in items:
    if stop.requested():
      raise Interrupted
    yield item


@contextlib.contextmanager
def ending(message: str) -> Iterator[None]:
  """Ends the process on SIGTERM and SIGINT with a line, not a traceback.

  For what comes after the last save, where nothing can be lost.

  Args:
    message: What is saved and how to go on. Process 0 prints it.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  previous = {
    number: signal.signal(number, lambda number, _: end(number, message))
    for number in _SIGNALS
  }
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def end(number: int, message: str) -> None:
  """Raises SystemExit with the code of a signal, after a line by process 0."""
  if jax.process_index() == 0:
    print(f'{signal.Signals(number).name}: {message}', file=sys.stderr)
  raise SystemExit(128 + number)
