"""Changes to fields of a config, as they are typed in a shell."""

from collections.abc import Sequence
import dataclasses
import difflib
import typing
from typing import Any

from nested_learning import errors
from nested_learning.configs import fields
from nested_learning.configs import serialization

_ALL = 'all'  # in place of the index of an entry


def override(config: Any, assignments: Sequence[str]) -> Any:
  """Returns `config` with some fields changed.

  All changes are made at once, and only the final config is validated.

  Args:
    config: A frozen dataclass.
    assignments: Strings `path=value`. A path joins field names and indices of
      tuples by dots, as in `model.levels.0.chunk_size=64`. The value is read
      by the field's annotation: `none`, `true`, `1e-3`, `64,128`, or the name
      of a config class (its `NAME`, as `m3`, if it has one) where the field is
      a choice between classes. `all` in place of an index is all entries, and
      comes before indices. The value of a config, or the values of a tuple of
      them, are those of the field `SHORT` of its class, if it names one; other
      fields keep their values, and new entries have the defaults, or are like
      the last one if a field of their class has none.

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
  """A tree of assignments: the text for a node, and changes below it."""

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
  chosen = _named_class(changes.text, kind)
  if chosen is not None:
    return _choose(chosen, changes, path, root)
  if changes.text is not None:
    value = _from_text(changes.text, kind, path, value)
  if not changes.below:
    return value
  if fields.is_config(value):
    _check_choice(value, kind, changes, path)
    names = fields.annotations(type(value))
    children = {name: getattr(value, name) for name in names}
    changed = _apply_below(children, type(value), changes, path, root)
    return fields.make(type(value), changed, path, now=value)
  if isinstance(value, tuple):
    return _apply_to_items(value, kind, changes, path, root)
  wanted = fields.join(path, next(iter(changes.below)))
  raise errors.UserError(
    f'{wanted} does not exist: {path} is {value!r} and has no fields.'
  )


def _apply_to_items(
  value: tuple[Any, ...], kind: Any, changes: _Changes, path: str, root: Any
) -> tuple[Any, ...]:
  """Returns a tuple with changes to its entries."""
  items = {str(i): item for i, item in enumerate(value)}
  kinds = fields.item_kinds(fields.tuple_kind(kind), len(value))
  for name, change in sorted(changes.below.items(), key=lambda x: x[0] != _ALL):
    if name not in items and not (name == _ALL and items):
      last = f', 0 to {len(value) - 1}.' if value else '.'
      raise errors.UserError(
        f'{fields.join(path, name)} does not exist: {path} has '
        f'{len(value)} entries{last}{_way_to_entries(kind, path)}'
      )
    for place in items if name == _ALL else (name,):
      below = fields.join(path, place)
      items[place] = _apply(
        items[place], kinds[int(place)], change, below, root
      )
  return tuple(items.values())


def _way_to_entries(kind: Any, path: str) -> str:
  """Returns how to give a tuple more entries, if their class has `SHORT`."""
  item, *_ = (*fields.item_kinds(fields.tuple_kind(kind), 1), None)
  short = getattr(item, 'SHORT', None)
  if short is None:
    return ''
  return f' Set {path} to the {short} of each, separated by commas.'


def _check_choice(value: Any, kind: Any, changes: _Changes, path: str) -> None:
  """Raises an error for a field that only another choice of class has."""
  for name in set(changes.below) - set(fields.annotations(type(value))):
    for other in filter(fields.is_config, fields.classes(kind)):
      if name in fields.annotations(other):
        raise errors.UserError(
          f'{fields.join(path, name)} does not exist: {path} is '
          f'{fields.short(value)}. Set {path}={fields.class_name(other)} '
          'before it.'
        )


def _apply_below(
  children: dict[str, Any], cls: type, changes: _Changes, path: str, root: Any
) -> dict[str, Any]:
  """Returns the changed fields of a `cls`, from their present values."""
  kinds, changed = fields.annotations(cls), {}
  for name, change in changes.below.items():
    if name not in kinds:
      raise errors.UserError(_unknown(cls, name, path, root))
    below = fields.join(path, name)
    changed[name] = _apply(children.get(name), kinds[name], change, below, root)
  return changed


def _named_class(text: str | None, kind: Any) -> type | None:
  """Returns the config class that `text` names, if there is one."""
  for option in fields.classes(kind):
    names = fields.class_name(option), option.__name__
    if fields.is_config(option) and text in names:
      return option
  return None


def _choose(cls: type, changes: _Changes, path: str, root: Any) -> Any:
  """Makes a `cls` from its defaults and the changes below."""
  defaults, missing = {}, []
  for field in fields.init_fields(cls):
    if field.default is not dataclasses.MISSING:
      defaults[field.name] = field.default
    elif field.default_factory is not dataclasses.MISSING:
      defaults[field.name] = field.default_factory()
    elif field.name not in changes.below:
      missing.append(fields.join(path, field.name))
  changed = _apply_below(defaults, cls, changes, path, root)
  if missing:
    raise errors.UserError(
      f'{path}={cls.__name__} is not complete: set {", ".join(missing)} too.'
    )
  return fields.make(cls, defaults | changed, path)


def _unknown(cls: type, name: str, path: str, root: Any) -> str:
  """Returns the error for an unknown field `name` of `cls`."""
  data = serialization.encode(root, '')
  known = [p for p, _ in serialization.leaves(data, '', inner=True) if p]
  siblings = [field.name for field in fields.init_fields(cls)]
  known += [fields.join(path, sibling) for sibling in siblings]

  def likeness(candidate):
    parent, _, leaf = candidate.rpartition('.')
    ratio = difflib.SequenceMatcher(a=name, b=leaf).ratio()
    return leaf == name, ratio + 0.2 * (parent == path)

  return fields.unknown(cls, name, path, max(known, key=likeness))


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
        if not all(hasattr(k, 'SHORT') for k in kinds):
          break  # Entries that are configs are changed by index.
        olds = now if isinstance(now, tuple) else ()
        new = olds[-1] if olds and not _has_defaults(type(olds[-1])) else None
        olds = (*olds, *[new] * len(items))[: len(items)]
        return tuple(
          _from_text(item, k, fields.join(path, str(i)), old)
          for i, (item, k, old) in enumerate(
            zip(items, kinds, olds, strict=True)
          )
        )
      if len(kinds) == len(items):
        pairs = zip(items, kinds, strict=True)
        return tuple(_from_text(i, k, path, now) for i, k in pairs)
    elif fields.is_config(option) and hasattr(option, 'SHORT'):
      old = now if isinstance(now, option) else option()
      name, kinds = option.SHORT, fields.annotations(option)
      below = fields.join(path, name)
      value = _from_text(text, kinds[name], below, getattr(old, name))
      return fields.make(option, {name: value}, path, now=old)
  way_out = ''
  choices = [
    fields.class_name(c) for c in fields.classes(kind) if fields.is_config(c)
  ]
  if len(choices) > 1:
    nearest = difflib.get_close_matches(text, choices, 1, 0)[0]
    way_out = f' The nearest is {path}={nearest}.'
  elif fields.is_config(now):
    first = fields.init_fields(now)[0].name
    way_out = f' Set one of its fields, such as {fields.join(path, first)}.'
  elif isinstance(now, tuple) and now and fields.is_config(now[0]):
    first = fields.init_fields(now[0])[0].name
    way_out = f' Set a field of one entry, such as {path}.0.{first}.'
  raise errors.UserError(
    f'{path}={text} does not fit: {path} is {fields.describe(kind)}, '
    f'now {fields.short(now)}.{way_out}'
  )


def _has_defaults(cls: type) -> bool:
  """Returns whether every field of a config class has a default."""
  missing = dataclasses.MISSING
  return all(
    field.default is not missing or field.default_factory is not missing
    for field in fields.init_fields(cls)
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
