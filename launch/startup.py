"""The first lines of every program: signals, the terminal, huge pages.

Imports the standard library alone, so that a program can call `begin` before
the imports that take seconds.
"""

import contextlib
import os
import pathlib
import signal
import sys
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 5.0  # seconds for the main thread to answer a signal

_TUNABLES = 'GLIBC_TUNABLES'
# The kernel gives huge pages only to processes that ask for them.
_HUGE_PAGES = 'glibc.malloc.hugetlb=1'


class Interrupted(KeyboardInterrupt):
  """A signal asks the program to end."""

  def __init__(self, number: int):
    super().__init__()
    self.signal = signal.Signals(number)


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
  end_on_signals()
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:  # it is closed
      stream.reconfigure(errors='backslashreplace')


def end_on_signals() -> None:
  """Lets a signal end the process at once, with one line."""
  _install(lambda number, _: _end(number))


def raise_on_signals() -> None:
  """Lets a signal raise `Interrupted` in the main thread.

  Python runs handlers between two of its instructions. If the main thread is
  inside a long call, such as a compilation, a second thread ends the process
  after a few seconds.
  """
  answered = threading.Event()

  def handler(number, _):
    answered.set()
    raise Interrupted(number)

  def watch():
    while number := os.read(reading, 1):
      if signal.getsignal(number[0]) is not handler:
        continue  # the trainer defers it until a checkpoint is saved
      if not answered.wait(_PATIENCE):
        _end(number[0])

  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  _install(handler)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=watch, daemon=True).start()


def program_name() -> str:
  """Returns the name of the program, for its messages."""
  return pathlib.Path(sys.argv[0]).name


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
