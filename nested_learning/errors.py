"""The exception for mistakes of a user, and the checks that raise it."""

import dataclasses
import errno
import functools
import pathlib
import traceback
import typing
from typing import Any

_PACKAGE = pathlib.Path(__file__).resolve().parent


class UserError(ValueError):
  """An error caused by a setting, a file or a flag, not by a bug.

  The message is one line that names the value and the way out. The launcher
  prints that line instead of a traceback and exits with code 2.
  """


class Retryable(UserError):
  """A UserError that may be gone at the next attempt, as a full disk.

  The launcher exits with the code that asks for another attempt.
  """


def of_disk(number: int | None) -> type[UserError]:
  """Returns the class of error for an `errno` of the operating system."""
  return Retryable if number in (errno.ENOSPC, errno.EDQUOT) else UserError


def is_bug(error: Exception) -> bool:
  """Returns whether an exception is a bug of the package, not a mistake.

  `UserError` is a user's mistake wherever it is raised. Any other
  exception is a bug if it came out of the package's own code.

  Args:
    error: An exception that was raised and caught.
  """
  if isinstance(error, UserError):
    return False
  frames = traceback.extract_tb(error.__traceback__)
  return any(_is_in_package(frame) for frame in frames)


def _is_in_package(frame: traceback.FrameSummary) -> bool:
  path = pathlib.Path(frame.filename)
  # These call a user's code, so they are below every mistake in it.
  calls_users = path.parent == _PACKAGE / 'configs' and (
    frame.name in ('call_get_config', 'load', 'make')
  )
  return path.is_relative_to(_PACKAGE) and not calls_users


def first_line(error: Exception) -> str:
  """Returns the first line of an error, or its type where it has no text."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


def check_field(config: Any, name: str, passed: bool, rule: str) -> None:
  """Raises unless a field of a config holds an allowed value.

  Args:
    config: A dataclass.
    name: The field.
    passed: Whether its value is allowed.
    rule: What it must be, as in 'at least 1'.

  Raises:
    UserError: If `passed` is False; it names field, value and rule.
  """
  if not passed:
    raise UserError(f'{name}={getattr(config, name)!r} must be {rule}.')


def check_choices(config: Any) -> None:
  """Checks every field annotated with a `Literal` against its choices.

  Args:
    config: A dataclass; call this in its `__post_init__`.

  Raises:
    UserError: If a field holds none of its choices; it lists them.
  """
  for name, choices in _choices(type(config)).items():
    value = getattr(config, name)
    # `in` alone would take 1 for True, and fail on arrays.
    if not any(type(c) is type(value) and c == value for c in choices):
      known = ', '.join(map(repr, choices))
      raise UserError(f'{name}={value!r} must be one of {known}.')


@functools.cache
def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
  """Returns the choices of each field whose annotation has a `Literal`."""
  hints = typing.get_type_hints(cls)
  fields = (field.name for field in dataclasses.fields(cls))
  choices = {name: _literals(hints[name]) for name in fields}
  return {name: values for name, values in choices.items() if values}


def _literals(kind: Any) -> tuple[Any, ...]:
  """Returns the values of a `Literal`, or of a union of it and None."""
  if typing.get_origin(kind) is typing.Literal:
    return typing.get_args(kind)
  members = typing.get_args(kind)
  literals = [m for m in members if typing.get_origin(m) is typing.Literal]
  if not literals or set(members) - {*literals, type(None)}:
    return ()
  none = (None,) if type(None) in members else ()
  return sum(map(typing.get_args, literals), ()) + none
