"""Configs as JSON: a run is repeated from its `config.json`."""

from collections.abc import Iterator, Mapping
import contextlib
import difflib
import json
import sys
import typing
from typing import Any

from nested_learning import errors
from nested_learning.configs import fields
from nested_learning.configs import files

TYPE_KEY = '_type'  # Names the class of a dataclass.
RUN_KEY = '_run'  # Names the experiment file that has its own `run`.


def to_json(config: Any, run: str | None = None) -> str:
  """Returns the config as JSON that `from_json` turns back into it.

  Args:
    config: A dataclass.
    run: Module of the experiment whose own `run` made the run, if it has one.

  Returns:
    Indented JSON; every dataclass carries its qualified name under `_type`.

  Raises:
    TypeError: If a field holds something that a config cannot hold.
  """
  data = encode(config, '')
  if run:
    data[RUN_KEY] = run
  return json.dumps(data, indent=2) + '\n'


def from_json(text: str) -> Any:
  """Returns the config that `to_json` wrote.

  Fields that the text does not name keep their defaults, so a config can still
  be read after a field was added.

  Args:
    text: JSON of a dataclass of `nested_learning` or of a file under
      `experiments/`; no other class is made.

  Returns:
    The config.

  Raises:
    errors.UserError: If the text is not a config, or does not fit its classes.
  """
  data = decode(text)
  data.pop(RUN_KEY, None)
  return _from_json(data, object, '')


def differences(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
  """Returns the fields in which two configs differ.

  Args:
    ours: A dataclass.
    theirs: Another dataclass, perhaps of another class.

  Returns:
    From each path that differs to both values; '(absent)' is the value of a
    path that a config does not have. A field with a config of another class
    differs in the names of the classes, and not in what is below it.
  """
  left, right = (dict(leaves(encode(c, ''), '')) for c in (ours, theirs))
  lefts, rights = (
    {path: fields.class_name(cls) for path, cls in _classes(c, '')}
    for c in (ours, theirs)
  )
  left, right, absent = left | lefts, right | rights, '(absent)'
  changed = {
    path: (left.get(path, absent), right.get(path, absent))
    for path in left | right
    if left.get(path, absent) != right.get(path, absent)
  }
  others = [path for path in changed if path in lefts or path in rights]
  return {
    path or TYPE_KEY: pair
    for path, pair in changed.items()
    if not any(_is_below(path, other) for other in others)
  }


def _classes(value: Any, path: str) -> Iterator[tuple[str, type]]:
  """Yields the path and class of every config inside a value."""
  if fields.is_config(value):
    yield path, type(value)
    items = [
      (f.name, getattr(value, f.name)) for f in fields.init_fields(value)
    ]
  elif isinstance(value, tuple):
    items = [(str(i), item) for i, item in enumerate(value)]
  else:
    return
  for name, item in items:
    yield from _classes(item, fields.join(path, name))


def _is_below(path: str, other: str) -> bool:
  return path != other and path.startswith(fields.join(other, ''))


def encode(value: Any, path: str) -> Any:
  """Returns a config as dicts, lists, numbers and strings."""
  if fields.is_config(value):
    cls = type(value)
    data = {TYPE_KEY: f'{cls.__module__}.{cls.__qualname__}'}
    for field in fields.init_fields(value):
      item = getattr(value, field.name)
      data[field.name] = encode(item, fields.join(path, field.name))
    return data
  if isinstance(value, tuple):
    return [encode(v, f'{path}.{i}') for i, v in enumerate(value)]
  if value is None or type(value) in (bool, int, float, str):
    return value
  raise TypeError(
    f'{path} holds {value!r}, a {type(value).__name__}; a config holds '
    'numbers, strings, None, tuples and dataclasses.'
  )


def decode(text: str) -> dict[str, Any]:
  """Parses JSON that must be an object."""
  try:
    data = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise errors.UserError(
      f'not a config, or cut short ({error}). Use another --workdir, or the '
      'experiment file that it was made from.'
    ) from error
  if not isinstance(data, dict):
    raise errors.UserError(f'not a config: {fields.short(data)}.')
  return data


def leaves(
  data: Any, path: str, inner: bool = False
) -> Iterator[tuple[str, Any]]:
  """Yields the paths and values of an encoded config."""
  if isinstance(data, dict):
    items = list(data.items())
  elif isinstance(data, list) and data:
    items = [(str(i), item) for i, item in enumerate(data)]
  else:
    yield path, data
    return
  if inner:
    yield path, data
  for name, item in items:
    if not (inner and name == TYPE_KEY):
      yield from leaves(item, fields.join(path, name), inner)


def _from_json(value: Any, kind: Any, path: str) -> Any:
  """Checks a decoded JSON value against `kind` and makes its dataclasses."""
  if isinstance(value, Mapping):
    cls = _find_class(value.get(TYPE_KEY), path)
    if not any(issubclass(cls, option) for option in fields.classes(kind)):
      raise errors.UserError(
        f'{path} is a {cls.__name__}; it must be {fields.describe(kind)}.'
      )
    kinds, values = fields.annotations(cls), {}
    for name, item in value.items():
      if name in kinds:
        below = fields.join(path, name)
        values[name] = _from_json(item, kinds[name], below)
      elif name != TYPE_KEY:
        nearest = difflib.get_close_matches(name, kinds, 1, 0) or ['none']
        raise errors.UserError(fields.unknown(cls, name, path, nearest[0]))
    return fields.make(cls, values, path)
  for option in fields.options(kind):
    if fields.is_tuple(option) and isinstance(value, list):
      kinds = fields.item_kinds(option, len(value))
      if len(kinds) == len(value):
        pairs = enumerate(zip(value, kinds, strict=True))
        return tuple(_from_json(v, k, f'{path}.{i}') for i, (v, k) in pairs)
    elif typing.get_origin(option) is typing.Literal:
      if value in typing.get_args(option):
        return value
    elif option is float and type(value) in (int, float):
      return float(value)
    elif option in (bool, int, str, type(None)) and type(value) is option:
      return value
  raise errors.UserError(
    f'{path or "The config"} is {fields.describe(kind)}, not {value!r}.'
  )


def _find_class(name: Any, path: str) -> type:
  """Returns the config class of a qualified name from a JSON file."""
  module, _, cls = str(name).rpartition('.')
  found = None
  if module.split('.')[0] == 'nested_learning':
    with contextlib.suppress(ImportError):
      __import__(module)
      found = getattr(sys.modules[module], cls, None)
  elif module.startswith('launch.sweeps.'):
    # Not imported: a folder of this name may lie where the program runs.
    found = getattr(sys.modules.get(module), cls, None)
  elif files.is_experiment(module):
    found = getattr(files.find(module), cls, None)
  if not fields.is_config(found) or found.__module__ != module:
    raise errors.UserError(
      f'{path or "the config"} has {TYPE_KEY} {name!r}, which is no config '
      'class of nested_learning or of a file under experiments/.'
    )
  return found
