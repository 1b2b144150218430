"""Changes to single fields of a config, as they are typed in a shell."""

from collections.abc import Sequence
import dataclasses
import difflib
import functools
import typing
from typing import Any

from nested_learning import errors
from nested_learning.configs import fields
from nested_learning.configs import serialization


def override(config: Any, assignments: Sequence[str]) -> Any:
  """Returns `config` with some fields changed.

  All changes are made at once, so that validation sees only the final config.

  Args:
    config: A frozen dataclass.
    assignments: Strings `path=value`. A path joins field names and indices of
      tuples by dots, as in `model.levels.0.chunk_size=64`. The value is read
      by the field's annotation: `none`, `true`, `1e-3`, `64,128`, or the name
      of a config class where the field is a choice between classes.

  Returns:
    The changed config.

  Raises:
    errors.UserError: If a path is not in the config, a value does not fit its
      field, or the changed config is not valid.
  """
  changes = _Changes()
  for assignment in assignments:
    path, equals, text = assignment.partition('=')
    if not equals or not path.strip():
      raise errors.UserError(
        f'{assignment!r} is not an assignment: write path=value, '
        'for example train.num_steps=50.'
      )
    changes.add(path.strip().split('.'), text)
  return _apply(config, type(config), changes, '', config)


class _Changes:
  """A tree of assignments: a value for this node, changes below it."""

  def __init__(self):
    self.text: str | None = None
    self.below: dict[str, _Changes] = {}

  def add(self, path: list[str], text: str) -> None:
    if not path:
      self.text, self.below = text, {}
    else:
      self.below.setdefault(path[0], _Changes()).add(path[1:], text)


def _apply(value: Any, kind: Any, changes: _Changes, path: str, root: Any):
  """Returns `value`, a field of annotation `kind` at `path`, changed."""
  if changes.text is not None:
    value = _from_text(changes.text, kind, path, value)
  if not changes.below:
    return value
  if fields.is_config(value):
    kinds = fields.annotations(type(value))
    children = {name: getattr(value, name) for name in kinds}
  elif isinstance(value, tuple):
    children = {str(i): item for i, item in enumerate(value)}
    items = fields.item_kinds(fields.tuple_kind(kind), len(value))
    kinds = dict(zip(children, items, strict=True))
  else:
    wanted = fields.join(path, next(iter(changes.below)))
    raise errors.UserError(
      f'{wanted} does not exist: {path} is {value!r} and has no fields.'
    )
  for name, change in changes.below.items():
    if name not in children:
      raise errors.UserError(_unknown(value, name, path, root))
    children[name] = _apply(
      children[name], kinds[name], change, fields.join(path, name), root
    )
  if isinstance(value, tuple):
    return tuple(children.values())
  changed = {name: children[name] for name in changes.below}
  replace = functools.partial(dataclasses.replace, value)
  return fields.make(replace, changed, path)


def _unknown(value: Any, name: str, path: str, root: Any) -> str:
  """Says that `value` has no field `name`, and which one was meant."""
  wanted = fields.join(path, name)
  if isinstance(value, tuple):
    return f'{wanted} does not exist: {path} has {len(value)} entries' + (
      f', 0 to {len(value) - 1}.' if value else '.'
    )
  data = serialization.encode(root, '')
  known = [p for p, _ in serialization.leaves(data, '', inner=True) if p]

  def likeness(candidate):
    same_name = candidate.rsplit('.', 1)[-1] == name
    return same_name, difflib.SequenceMatcher(a=wanted, b=candidate).ratio()

  nearest = max(known, key=likeness)
  names = ', '.join(field.name for field in fields.init_fields(value))
  return (
    f'{wanted} does not exist; the nearest field is {nearest}. '
    f'{type(value).__name__} has: {names}.'
  )


def _from_text(text: str, kind: Any, path: str, now: Any) -> Any:
  """Reads the value of a field of annotation `kind` from text."""
  for option in fields.options(kind):
    if option is type(None):
      if text.lower() == 'none':
        return None
    elif option is bool:
      if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    elif option in (int, float):
      try:
        return option(text)
      except ValueError:
        pass
    elif option is str:
      return text
    elif typing.get_origin(option) is typing.Literal:
      for choice in typing.get_args(option):
        if text == str(choice):
          return choice
    elif fields.is_tuple(option):
      items = _split(text)
      kinds = fields.item_kinds(option, len(items))
      if kinds and any(fields.is_config(k) for k in kinds):
        break  # Entries that are configs are changed by index.
      if len(kinds) == len(items):
        pairs = zip(items, kinds, strict=True)
        return tuple(_from_text(i, k, path, now) for i, k in pairs)
    elif dataclasses.is_dataclass(option) and text == option.__name__:
      return fields.make(option, {}, path)
  way_out = ''
  if fields.is_config(now):
    first = fields.init_fields(now)[0].name
    way_out = f' Set one of its fields, such as {fields.join(path, first)}.'
  elif isinstance(now, tuple) and now and fields.is_config(now[0]):
    first = fields.init_fields(now[0])[0].name
    way_out = f' Set a field of one entry, such as {path}.0.{first}.'
  raise errors.UserError(
    f'{path}={text} does not fit: {path} is {fields.describe(kind)}, '
    f'now {fields.short(now)}.{way_out}'
  )


def _split(text: str) -> list[str]:
  """Splits the text of a tuple at the commas outside of brackets."""
  text = text.strip()
  if text[:1] in ('(', '[') and text[-1:] in (')', ']'):
    text = text[1:-1]
  items, depth = [''], 0
  for letter in text:
    depth += (letter in '([') - (letter in ')]')
    if letter == ',' and not depth:
      items.append('')
    else:
      items[-1] += letter
  items = [item.strip().strip('\'"') for item in items]
  return items[:-1] if not items[-1] else items
