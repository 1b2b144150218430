"""The frame of a command-line program: flags, one-line errors, exit codes.

Exit codes of every program:

* what `run` returns, 0 when all is done;
* 2, with one line on stderr, if a flag, a config or a file is wrong;
* 128 plus the number of a signal, with one line; without it for SIGPIPE,
  when nobody reads the output any more, as behind `| head`;
* 42, with a traceback, for any other error. It is not known to be the user's
  mistake, so clusters make another attempt.
"""

from collections.abc import Callable, Sequence
import errno
import os
import select
import signal
import subprocess
import sys
import traceback
from typing import NoReturn

from absl import app
from absl import flags
from absl import logging

from launch import startup
from nested_learning import accelerators
from nested_learning import distributed
from nested_learning import errors

_USER_ERROR = 2
# What the operating system refuses is no bug: it gets one line. Room on a disk
# may be made before the next attempt.
_REFUSALS = {
  errno.ENOSPC: distributed.EXIT_RETRY,
  errno.EDQUOT: distributed.EXIT_RETRY,
  errno.EROFS: _USER_ERROR,
  errno.EACCES: _USER_ERROR,
  errno.EPERM: _USER_ERROR,
  errno.ENAMETOOLONG: _USER_ERROR,
  errno.EMFILE: _USER_ERROR,
  errno.ENFILE: _USER_ERROR,
}
_NO_DEVICE = 'Unable to initialize backend'  # a message of JAX
_CLOSED_PIPE = 128 + signal.SIGPIPE
# Room below a folder for the longest names that runs write in it.
_BELOW = 'x' * 150


def start(run: Callable[[], int | None], *, example: str | None = None) -> None:
  """Parses the flags, runs, and exits with one of the codes above.

  Args:
    run: The program; called when its flags are parsed.
    example: A flag as it is written, for users who write an argument instead.
  """
  try:
    app.run(
      lambda argv: sys.exit(_run(run, argv, example)), flags_parser=_parse_flags
    )
  except SystemExit as end:  # also that of --help
    _exit(end.code)
  except BrokenPipeError:  # nobody reads the line about an error
    _exit(_CLOSED_PIPE)


def print_error(error: Exception | str) -> None:
  """Prints one line on stderr, with the program's name before it."""
  text = ' '.join(str(error).split())
  print(f'{startup.program_name()}: {text}', file=sys.stderr)


def call(command: Sequence[str], folder: str | os.PathLike[str]) -> int:
  """Runs a program with its output here; returns its exit code.

  A signal that ends this process, Ctrl-C too, reaches the other program once,
  as SIGTERM, and this process waits for it.

  Args:
    command: The program and its arguments.
    folder: Its working folder.
  """
  # In a session of its own, a program does not get Ctrl-C of the terminal.
  process = subprocess.Popen(command, cwd=folder, start_new_session=True)
  try:
    return process.wait()
  except BaseException:
    process.terminate()
    process.wait()
    raise


def check_path(flag: str, path: str | None, *, folder: bool = False) -> None:
  """Raises an error if a path is too long for the file system.

  Args:
    flag: Name of the flag that gives it.
    path: The path, which need not exist; None passes.
    folder: Whether files are written below it.

  Raises:
    errors.UserError: It is too long.
  """
  if path is None:
    return
  try:
    os.lstat(path)
    if folder:
      os.lstat(os.path.join(path, _BELOW))
  except OSError as error:
    if error.errno == errno.ENAMETOOLONG:
      raise errors.UserError(
        f'--{flag}={_shorten(path)} is longer than the file system allows; '
        'choose a shorter name.'
      ) from error


def _run(run, argv, example) -> int | str | None:
  startup.raise_on_signals()
  try:
    if len(argv) > 1:
      hint = f'; flags begin with --, as in {example}' if example else ''
      raise errors.UserError(f'Unexpected argument {argv[1]!r}{hint}.')
    accelerators.check_platforms(os.environ.get('JAX_PLATFORMS'))
    code = run() or 0
    _flush()  # Python's exit reports no error of it in one line
    return code
  except BaseException as error:
    return _end(error, startup.end_on_signals())


def _end(
  error: BaseException, received: signal.Signals | None
) -> int | str | None:
  """Says why the program ends; returns its exit code."""
  if isinstance(error, SystemExit):  # the trainer has saved, and said so
    code = error.code
    return _fail(code) if isinstance(code, int) else code
  # Imports of extensions turn an interruption into errors of their own.
  if received or isinstance(error, KeyboardInterrupt):
    received = received or signal.SIGINT
    again = 'run the same command again.'
    return _fail(128 + received, f'stopped by {received.name}; {again}')
  if isinstance(error, BrokenPipeError) and _is_unread():
    return _fail(_CLOSED_PIPE)
  if logging.level_debug():
    traceback.print_exception(error)
  if isinstance(error, errors.Retryable):
    return _fail(distributed.EXIT_RETRY, error)
  if isinstance(error, errors.UserError):
    return _fail(_USER_ERROR, error)
  if isinstance(error, RuntimeError) and str(error).startswith(_NO_DEVICE):
    # Another process may hold the devices, or they are not ready yet.
    return _fail(distributed.EXIT_RETRY, str(error).splitlines()[0])
  if isinstance(error, OSError) and error.errno in _REFUSALS:
    where = 'a file that this program reads or writes'
    if error.filename:
      where = _shorten(str(error.filename))
    return _fail(
      _REFUSALS[error.errno],
      f'{where}: {error.strerror}. Fix this and run the same command again.',
    )
  if not logging.level_debug():
    traceback.print_exception(error)
  together = distributed.is_together()
  name = type(error).__name__
  return _fail(
    distributed.EXIT_RETRY, f'{name}, see the traceback.' if together else None
  )


def _fail(code: int, message: Exception | str | None = None) -> int:
  """Prints a line and, where there are several processes, ends them."""
  if code:
    distributed.end(code, message and f'{startup.program_name()}: {message}')
  return code


def _exit(code: int | str | None) -> NoReturn:
  """Ends the process; after a signal, without the exit functions of Python.

  They would take down the backends of JAX while XLA's threads may still compile
  or run a program, which crashes the process. Locks end with the process.
  """
  at_once = isinstance(code, int) and code > 128
  try:
    _flush()
  except BrokenPipeError:  # Python's exit would try again, and print an error
    code, at_once = code if at_once else _CLOSED_PIPE, True
  except OSError:
    pass  # Python's exit reports it
  if at_once:
    distributed.leave()
    os._exit(code)
  sys.exit(code)


def _flush() -> None:
  for stream in (sys.stdout, sys.stderr):
    if stream is not None:  # it is closed
      stream.flush()


def _is_unread() -> bool:
  """Returns whether stdout or stderr is a pipe that nobody reads."""
  poll = select.poll()
  for stream in filter(None, (sys.stdout, sys.stderr)):
    poll.register(stream, 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    for argument in argv:
      if not argument.isprintable():
        argument.encode()  # bytes that are not UTF-8 became lone surrogates
    argv = flags.FLAGS(argv)
  except UnicodeEncodeError:
    encoding = sys.getfilesystemencoding().upper()
    print_error(
      f'The argument {argument!a} is not {encoding}; LC_ALL=C.UTF-8 takes '
      'every argument that is UTF-8.'
    )
    sys.exit(_USER_ERROR)
  except flags.Error as error:
    print_error(error)
    sys.exit(_USER_ERROR)
  if flags.FLAGS['verbosity'].using_default_value:
    # Orbax logs every step of a save as INFO; --verbosity=0 shows that.
    flags.FLAGS.verbosity = logging.WARNING
  return argv


def _shorten(path: str) -> str:
  return path if len(path) <= 80 else f'{path[:60]}...{path[-12:]}'
