"""The thread that owns the service: it works on requests and runs calls.

Everything that touches JAX and the store happens in this one thread; event
loops hand it functions and wait for what they return.
"""

from collections.abc import Callable
import concurrent.futures
import contextlib
import queue
import threading
from typing import Any

from absl import logging

from nested_learning import errors
from nested_learning.serving import service as service_lib

_WAIT_SECONDS = 0.2  # between two looks at the clock, when idle


class Worker:
  """Runs a service in a thread of its own."""

  def __init__(
    self,
    make_service: Callable[[], service_lib.Service],
    *,
    context: Callable[[], Any] = contextlib.nullcontext,
  ):
    """Starts the thread, which makes the service.

    Args:
      make_service: Called in the thread.
      context: Makes a context manager in which the thread works, such as one
        for a mesh.

    Raises:
      errors.UserError: What `make_service` raises, and other errors of it.
    """
    self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    self._stopping = threading.Event()
    ready = concurrent.futures.Future()
    self._ended = concurrent.futures.Future()
    self._thread = threading.Thread(
      target=self._run,
      args=(make_service, context, ready),
      name='serving',
      daemon=True,
    )
    self._thread.start()
    self.service = ready.result()

  @property
  def is_alive(self) -> bool:
    """Whether the thread works."""
    return self._thread.is_alive() and not self._stopping.is_set()

  def call(self, function: Callable[..., Any], *args, **kwargs):
    """Has the thread call a function.

    Returns:
      A `concurrent.futures.Future` of the function's result.
    """
    future = concurrent.futures.Future()

    def run():
      if future.set_running_or_notify_cancel():
        try:
          future.set_result(function(*args, **kwargs))
        except Exception as error:
          future.set_exception(error)

    if not self.is_alive:
      raise errors.UserError('the server is ending; try again later.')
    self._calls.put(run)
    return future

  def stop(self) -> None:
    """Saves all sessions and ends the thread.

    Raises:
      errors.UserError: If a session cannot be saved.
    """
    self._stopping.set()
    self._calls.put(lambda: None)
    self._ended.result()

  def _run(self, make_service, context, ready) -> None:
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(context())
        service = make_service()
      except BaseException as error:
        ready.set_exception(error)
        return
      ready.set_result(service)
      self._work(service)

  def _work(self, service: service_lib.Service) -> None:
    """Works until it is stopped, and saves everything then."""
    has_work = False
    while not self._stopping.is_set():
      self._run_calls(wait=not has_work)
      try:
        has_work = service.step()
      except Exception as error:  # of the disk: requests catch their own
        logging.error('%s', error, exc_info=errors.is_bug(error))
        has_work = False
    try:
      service.close()
      self._ended.set_result(None)
    except Exception as error:
      self._ended.set_exception(error)

  def _run_calls(self, *, wait: bool) -> None:
    try:
      call = self._calls.get(timeout=_WAIT_SECONDS if wait else 0)
      while True:
        call()
        call = self._calls.get_nowait()
    except queue.Empty:
      pass
