"""SIGTERM and Ctrl-C, kept until the trainer has saved."""

from collections.abc import Iterable, Iterator
import contextlib
import signal
import threading
from typing import TypeVar

import jax

T = TypeVar('T')


class Interrupted(Exception):
  """A signal arrived."""


@contextlib.contextmanager
def deferred() -> Iterator[list[signal.Signals]]:
  """Collects SIGTERM and SIGINT in a list instead of ending the process.

  A second signal does what it always does, so that a process that hangs can
  still be ended. The list stays empty outside the main thread, where Python
  allows no handlers, and where several processes train together: they have to
  agree on a step to stop at, which Orbax arranges (`reached_preemption`).

  Yields:
    The signals received so far.
  """
  received = []
  in_main_thread = threading.current_thread() is threading.main_thread()
  if jax.process_count() > 1 or not in_main_thread:
    yield received
    return
  previous = {}

  def note(number, _):
    received.append(signal.Signals(number))
    restore()

  def restore():
    for number, handler in previous.items():
      signal.signal(number, handler)

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.signal(number, note)
  try:
    yield received
  finally:
    restore()


def until(signals: list[signal.Signals], items: Iterable[T]) -> Iterator[T]:
  """Yields items; raises `Interrupted` as soon as there is a signal."""
  for item in items:
    if signals:
      raise Interrupted
    yield item
