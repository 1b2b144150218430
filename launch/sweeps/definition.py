"""What a sweep consists of: rows with names, and a grid of values."""

import dataclasses
import re

from nested_learning import errors

NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.+=,-]*')  # of a cell and its folder
_BEST = ('min', 'max')


@dataclasses.dataclass(frozen=True)
class Row:
  """A cell that has a name instead of a place in a grid."""

  name: str  # in the tables and of its folder
  assignments: tuple[str, ...] = ()  # fields to change, as for --set
  arg: str | None = None  # of get_config, where fields alone cannot say it
  printed: str = ''  # what the paper prints for it

  def __post_init__(self):
    if not NAME.fullmatch(self.name):
      raise errors.UserError(
        f'The row {self.name!r} needs a name that can be a folder: letters, '
        'digits and _ . + - = after a letter or digit.'
      )


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What an experiment file's `get_sweep()` returns.

  Rows and grid together make every row at every point of the grid; neither
  makes the one cell `config`, which is the config as it is.
  """

  rows: tuple[Row, ...] = ()
  grid: tuple[str, ...] = ()  # 'path=value,value', see parse_grid
  # Keys of summary.json in the order of the table's columns; 'loss:min' or
  # 'score:max' says which is best where the key alone does not. Empty shows
  # every number that is not the same in all runs.
  metrics: tuple[str, ...] = ()
  printed: str = ''  # what the rows' printed numbers are: their column's head
  seed_fields: tuple[str, ...] = ('seed', 'data.seed')  # those that exist

  def __post_init__(self):
    names = [row.name for row in self.rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
      raise errors.UserError(f'Two rows have the name {twice[0]!r}.')
    for metric in self.metrics:
      parse_metric(metric)
    paths = [parse_grid(text)[0] for text in self.grid]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
      raise errors.UserError(
        f'The grid has {twice[0]} twice; write its values behind one =, as in '
        f'{twice[0]}=1,2.'
      )


def parse_grid(text: str) -> tuple[str, tuple[str, ...]]:
  """Reads one field of a grid and its values.

  Values are separated by commas and typed as for --set. Commas inside brackets
  or quotes separate nothing: `roles=(k,v),(k,)` are two tuples, `roles=k,v`
  two of one entry each, and `prompt='a, b',c` two texts. The quotes around a
  whole value are taken off.

  Args:
    text: `path=value,value`.

  Returns:
    The path of the field, and the text of each value.

  Raises:
    errors.UserError: It is not of that form, or has a value twice.
  """
  path, equals, listed = text.partition('=')
  path = path.strip()
  if not equals or not path:
    raise errors.UserError(
      f'{text!r} is no field of a grid: write path=value,value, for example '
      'model.mixer.chunk_size=16,64.'
    )
  values = _split(listed, text)
  if '' in values:
    raise errors.UserError(
      f"{text!r} has an empty value; write '' where that is meant."
    )
  values = tuple(_unquote(value) for value in values)
  twice = sorted({value for value in values if values.count(value) > 1})
  if twice:
    raise errors.UserError(f'{text!r} has the value {twice[0]!r} twice.')
  return path, values


def parse_metric(text: str) -> tuple[str, str]:
  """Splits 'score:max' into key and 'max', or '' where it does not say."""
  name, colon, best = text.rpartition(':')
  if not colon:
    return text, ''
  if best not in _BEST or not name:
    raise errors.UserError(
      f'The metric {text!r} must end in :min or :max, whichever is best, or '
      'in neither.'
    )
  return name, best


def _split(listed: str, text: str) -> list[str]:
  """Splits at the commas outside of brackets and quotes."""
  values, depth, quote = [''], 0, ''
  for letter in listed:
    if letter == ',' and not depth and not quote:
      values.append('')
      continue
    values[-1] += letter
    if quote:
      quote = '' if letter == quote else quote
    elif letter in '\'"':
      quote = letter
    else:
      depth += (letter in '([{') - (letter in ')]}')
  if quote or depth:
    what = f'a quote {quote}' if quote else 'a bracket'
    raise errors.UserError(f'{text!r} has {what} without its partner.')
  return [value.strip() for value in values]


def _unquote(value: str) -> str:
  if len(value) > 1 and value[0] == value[-1] and value[0] in '\'"':
    return value[1:-1]
  return value
