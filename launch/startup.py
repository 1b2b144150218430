"""The first lines of every program: signals, the terminal, huge pages.

Imports little of the standard library, so that a program can call `begin`
before the imports that take seconds.
"""

import contextlib
import os
import signal
import sys
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 10.0  # seconds from a signal to the end of the program

_TUNABLES = 'GLIBC_TUNABLES'
# The kernel gives huge pages only to processes that ask for them.
_HUGE_PAGES = 'glibc.malloc.hugetlb=1'

# Signals belong to the process, and so does this state.
_received: list[signal.Signals] = []
_ending = threading.Event()


class Interrupted(KeyboardInterrupt):
  """A signal asks the program to end."""


def begin(*, huge_pages: bool = False) -> None:
  """Prepares the process; call it before the slow imports.

  SIGINT, SIGTERM and SIGHUP end the process with one line and 128 plus the
  number of the signal, until `raise_on_signals` or the program itself installs
  other handlers. A signal that the parent ignores, as nohup does, stays
  ignored. Text that the terminal cannot show is escaped.

  Args:
    huge_pages: Whether to start the process again with pages of 2 MB.
      XLA takes the buffers of a step from malloc and returns them after it;
      with the usual pages of 4 KB the kernel maps each of them anew in every
      step. glibc reads the setting when a process starts. Without glibc 2.35,
      or where GLIBC_TUNABLES is set, nothing changes.
  """
  if huge_pages and sys.platform.startswith('linux'):
    if _TUNABLES not in os.environ:
      os.environ[_TUNABLES] = _HUGE_PAGES
      os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  _install(lambda number, _: _end(number))
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:  # it is closed
      stream.reconfigure(errors='backslashreplace')


def raise_on_signals() -> None:
  """Lets a signal raise `Interrupted` in the main thread.

  Finalisers, callbacks and extensions cannot raise: they print exceptions and
  go on. There the signal ends the process at once. Python runs handlers only
  between two of its instructions, not inside a long call such as a
  compilation: a second thread ends the process if it has not reached
  `end_on_signals` after a few seconds.
  """

  def handler(number, _):
    _received.append(signal.Signals(number))
    raise Interrupted

  def watch():
    while number := os.read(reading, 1):
      # Another handler is there while the trainer waits for a checkpoint.
      if signal.getsignal(number[0]) is handler:
        if not _ending.wait(_PATIENCE):
          _end(number[0])

  print_exception, print_unraisable = sys.excepthook, sys.unraisablehook

  def on_print(kind, value, trace):
    if issubclass(kind, Interrupted):
      _end(_received[0])
    print_exception(kind, value, trace)

  def on_unraisable(unraisable):
    if issubclass(unraisable.exc_type, Interrupted):
      _end(_received[0])
    print_unraisable(unraisable)

  sys.excepthook, sys.unraisablehook = on_print, on_unraisable
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  _install(handler)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=watch, daemon=True).start()


def end_on_signals() -> signal.Signals | None:
  """Lets a signal end the process at once, with one line.

  Returns:
    The signal that raised `Interrupted` before, or None.
  """
  _ending.set()
  _install(lambda number, _: _end(number))
  return _received[0] if _received else None


def program_name() -> str:
  """Returns the name of the program, for its messages."""
  return os.path.basename(sys.argv[0])


def _install(handler) -> None:
  for number in _SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)


def _end(number: int) -> None:
  name = signal.Signals(number).name
  line = f'{program_name()}: stopped by {name}; run the same command again.\n'
  with contextlib.suppress(OSError):  # nobody reads it
    os.write(2, line.encode(errors='backslashreplace'))
  os._exit(128 + number)
