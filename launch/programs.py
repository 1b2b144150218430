"""The frame of a command-line program: flags, one-line errors, exit codes."""

from collections.abc import Callable
import pathlib
import sys

from absl import app
from absl import flags

from nested_learning import errors


def start(run: Callable[[], int | None], *, example: str | None = None) -> None:
  """Parses the flags, runs, and exits.

  The exit code is what `run` returns; 2, with one line on stderr, when a flag
  or what it names is wrong; 130 when interrupted.

  Args:
    run: The program, when its flags are parsed.
    example: A flag as it is to be written, for who writes an argument instead.
  """
  app.run(
    lambda argv: sys.exit(_run(run, argv, example)), flags_parser=_parse_flags
  )


def print_error(error: Exception | str) -> None:
  """Prints one line on stderr, with the program's name before it."""
  name = pathlib.Path(sys.argv[0]).name
  print(f'{name}: {" ".join(str(error).split())}', file=sys.stderr)


def _run(run, argv, example):
  try:
    if len(argv) > 1:
      hint = f'; flags begin with --, as in {example}' if example else ''
      raise errors.UserError(f'Unexpected argument {argv[1]!r}{hint}.')
    return run() or 0
  except KeyboardInterrupt:
    print_error('interrupted.')
    return 130
  except errors.UserError as error:
    print_error(error)
    return 2


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print_error(error)
    sys.exit(2)
