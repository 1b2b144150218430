"""The types of config fields, by their annotations."""

import dataclasses
import functools
import re
import types
import typing
from typing import Any

from nested_learning import errors


def is_config(value: Any) -> bool:
  """Returns whether the value, or the class, is a config."""
  return dataclasses.is_dataclass(value)


def init_fields(value: Any) -> list[dataclasses.Field]:
  """Returns the fields that a caller can set."""
  return [field for field in dataclasses.fields(value) if field.init]


@functools.cache
def annotations(cls: type) -> dict[str, Any]:
  """Returns the annotation of each field that a caller can set."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in init_fields(cls)}


def options(kind: Any) -> tuple[Any, ...]:
  """Returns the members of a union; of another annotation, itself alone."""
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    # None and numbers come before str, which takes any text.
    return tuple(sorted(typing.get_args(kind), key=lambda k: k is str))
  return (kind,)


def classes(kind: Any) -> tuple[type, ...]:
  """Returns the classes that a config in a field of this annotation may be."""
  if kind is Any:
    return (object,)
  return tuple(option for option in options(kind) if isinstance(option, type))


def class_name(cls: type) -> str:
  """Returns the name of a config class on the command line.

  A class may have a plain one in `NAME`; others go by the name of the class.
  """
  return getattr(cls, 'NAME', cls.__name__)


def is_tuple(kind: Any) -> bool:
  """Returns whether an annotation is a tuple with typed entries."""
  return typing.get_origin(kind) is tuple


def tuple_kind(kind: Any) -> Any:
  """Returns the tuple among the options of an annotation."""
  return next((option for option in options(kind) if is_tuple(option)), tuple)


def item_kinds(kind: Any, length: int) -> tuple[Any, ...]:
  """Returns the annotation of each entry of a tuple of `length` entries."""
  kinds = typing.get_args(kind)
  if len(kinds) == 2 and kinds[1] is Ellipsis:
    return kinds[:1] * length
  return kinds


def make(
  cls: type, values: dict[str, Any], path: str, *, now: Any = None
) -> Any:
  """Makes a dataclass; errors name the path in the config.

  Args:
    cls: The dataclass.
    values: Values of fields.
    path: Where in the config it stands; '' for the config itself.
    now: A value of the class whose fields are kept where `values` has none.

  Returns:
    The dataclass.

  Raises:
    errors.UserError: If the class refuses a value, or a field is missing.
  """
  if now is not None:
    values = {f.name: getattr(now, f.name) for f in init_fields(now)} | values
  missing = [
    join(path, field.name)
    for field in init_fields(cls)
    if field.name not in values
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise errors.UserError(
      f'{path or cls.__name__} lacks {", ".join(missing)}.'
    )
  try:
    return cls(**values)
  except ValueError as error:
    if errors.is_bug(error):
      raise
    message = str(error)
    names = '|'.join(re.escape(field.name) for field in init_fields(cls))
    if path and re.match(rf'({names})=', message):
      message = f'{path}.{message}'  # model.levels.0.name='' must be ...
    elif path:
      message = f'{path}: {message}'
    raise errors.UserError(message) from error


def find_misfit(error: Exception) -> str | None:
  """Finds the config field whose value has a wrong type, after an exception.

  Args:
    error: An exception that was raised while a config was made.

  Returns:
    The field, its value and its type in words; None if all values fit.
  """
  step = error.__traceback__
  while step is not None:
    frame, step = step.tb_frame, step.tb_next
    made = frame.f_locals.get('self')
    if frame.f_code.co_name != '__init__' or not is_config(made):
      continue
    for name, kind in annotations(type(made)).items():
      value = frame.f_locals.get(name)
      if name in frame.f_locals and not fits(value, kind):
        return f'{name}={short(value)} must be {describe(kind)}.'
  return None


def fits(value: Any, kind: Any) -> bool:
  """Returns whether a value is of the type of an annotation."""
  if kind is Any:
    return True
  for option in options(kind):
    if typing.get_origin(option) is typing.Literal:
      if value in typing.get_args(option):
        return True
    elif is_tuple(option):
      if isinstance(value, tuple):
        kinds = item_kinds(option, len(value))
        if len(kinds) == len(value) and all(map(fits, value, kinds)):
          return True
    elif isinstance(option, type):
      accepted = (int, float) if option is float else option
      # bool is an int in Python, but not in a config.
      wrong_bool = isinstance(value, bool) and option in (int, float)
      if isinstance(value, accepted) and not wrong_bool:
        return True
    else:  # an annotation that is not checked
      return True
  return False


def unknown(cls: type, name: str, path: str, nearest: str) -> str:
  """Returns the error for an unknown field `name` of a class.

  A class may name its renamed fields in `RENAMED`, from old to new name.

  Args:
    cls: The config class.
    name: The unknown field.
    path: Where in the config the class stands.
    nearest: Path of the field whose name is most alike.
  """
  new = getattr(cls, 'RENAMED', {}).get(name)
  if new is not None:
    return f'{join(path, name)} is now called {join(path, new)}; rename it.'
  names = ', '.join(field.name for field in init_fields(cls))
  return (
    f'{join(path, name)} does not exist; the nearest field is {nearest}. '
    f'{class_name(cls)} has: {names}.'
  )


def join(path: str, name: str) -> str:
  """Returns the path of a field inside the config at `path`."""
  return f'{path}.{name}' if path else name


def describe(kind: Any) -> str:
  """Returns an annotation in words."""
  if kind is object:
    return 'a config'
  if kind is type(None):
    return 'none'
  if typing.get_origin(kind) is typing.Literal:
    return 'one of ' + ', '.join(str(arg) for arg in typing.get_args(kind))
  if len(options(kind)) > 1:
    return ' or '.join(describe(option) for option in typing.get_args(kind))
  if is_tuple(kind):
    names = ('...' if a is ... else describe(a) for a in typing.get_args(kind))
    return f'tuple[{", ".join(names)}]'
  return class_name(kind) if isinstance(kind, type) else str(kind)


def short(value: Any) -> str:
  """Returns a value in at most 60 letters, for errors."""
  text = class_name(type(value)) if is_config(value) else repr(value)
  return text if len(text) <= 60 else text[:57] + '...'
