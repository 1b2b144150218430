"""Sweeps and the cells that they consist of.

A sweep has rows with names, a grid of values, or both. Every row at every point
of the grid is a cell: one config, whatever the seed.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import inspect
import itertools
import re
from typing import Any

from nested_learning import configs
from nested_learning import errors
from nested_learning.configs import files

_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.+=,-]*')  # of a cell and its folder
_BEST = ('min', 'max')
_PLAIN = 'config'  # name of a cell that changes nothing
_LONGEST = 120  # letters of a cell's name


@dataclasses.dataclass(frozen=True)
class Row:
  """A cell with a name of its own."""

  name: str  # in tables, and of its folder
  assignments: tuple[str, ...] = ()  # fields to change, as for --set
  arg: str | None = None  # argument of get_config
  printed: str = ''  # number that the paper prints for it

  def __post_init__(self):
    if not _NAME.fullmatch(self.name):
      raise errors.UserError(
        f'The row {self.name!r} needs a name that can be a folder: letters, '
        'digits and _ . + - = after a letter or digit.'
      )


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep, as `get_sweep()` of an experiment file returns it.

  Rows and a grid make a cell for every row at every point of the grid. A sweep
  with neither has one cell, `config`, without changes. A tuned field makes the
  cells that it would make in the grid. They run with seed 0, and of those that
  differ in this field only, the one with the best first metric runs with the
  other seeds.
  """

  rows: tuple[Row, ...] = ()
  grid: tuple[str, ...] = ()  # 'path=value,value', see parse_grid
  tune: str = ''  # the same, of one field that is searched before the seeds
  # Whether its numbers are tried from the largest down until the best one has
  # no untried neighbour, for metrics with one valley, in place of all.
  descends: bool = False
  # Keys of summary.json, in the order of the table's columns. 'loss:min' and
  # 'score:max' say which value is best if the key does not. An empty tuple
  # shows every number that differs among the runs.
  metrics: tuple[str, ...] = ()
  printed: str = ''  # heading of the column of the rows' printed numbers
  seed_fields: tuple[str, ...] = ('seed', 'data.seed')  # missing ones pass

  def __post_init__(self):
    names = [row.name for row in self.rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
      raise errors.UserError(f'Two rows have the name {twice[0]!r}.')
    for metric in self.metrics:
      parse_metric(metric)
    paths = [parse_grid(text)[0] for text in as_grid(self)]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
      raise errors.UserError(
        f'The sweep has {twice[0]} twice; write its values behind one =, as in '
        f'{twice[0]}=1,2, in the grid or as the tuned field.'
      )


@dataclasses.dataclass(frozen=True)
class Cell:
  """One config of a sweep, without its seed."""

  name: str
  spec: str  # --config of the run
  assignments: tuple[str, ...]  # --set of the run; those of all cells first
  row: str = ''  # name of its row, if any
  point: tuple[tuple[str, str], ...] = ()  # path and value of each grid field
  printed: str = ''


def parse_grid(text: str) -> tuple[str, tuple[str, ...]]:
  """Reads one field of a grid and its values.

  Values are separated by commas and written as for --set. Commas inside
  brackets or quotes do not separate: `roles=(k,v),(k,)` has two tuples, and
  `prompt='a, b',c` two texts. Quotes around a whole value are removed.

  Args:
    text: `path=value,value`.

  Returns:
    The path of the field, and the text of each value.

  Raises:
    errors.UserError: The text has another form, or a value twice.
  """
  path, equals, listed = text.partition('=')
  path = path.strip()
  if not equals or not path:
    raise errors.UserError(
      f'{text!r} is not a field of a grid: write path=value,value, as in '
      'model.mixer.chunk_size=16,64.'
    )
  values = _split(listed, text)
  if '' in values:
    raise errors.UserError(
      f"{text!r} has an empty value; write '' if it is meant."
    )
  values = tuple(_unquote(value) for value in values)
  twice = sorted({value for value in values if values.count(value) > 1})
  if twice:
    raise errors.UserError(f'{text!r} has the value {twice[0]!r} twice.')
  return path, values


def as_grid(sweep: Sweep, fields: Sequence[str] = ()) -> tuple[str, ...]:
  """Returns the grid of a sweep with the tuned field in it.

  Args:
    sweep: The sweep.
    fields: Paths in the order of the stored sweep; others come after them.
  """
  grid = (*sweep.grid, *([sweep.tune] if sweep.tune else []))
  order = {path: place for place, path in enumerate(fields)}
  return tuple(
    sorted(grid, key=lambda text: order.get(parse_grid(text)[0], len(order)))
  )


def parse_metric(text: str) -> tuple[str, str]:
  """Splits 'score:max' into 'score' and 'max'; 'score' into it and ''."""
  name, colon, best = text.rpartition(':')
  if not colon:
    return text, ''
  if best not in _BEST or not name:
    raise errors.UserError(
      f'The metric {text!r} must end in :min or :max, whichever is best, or '
      'in neither of them.'
    )
  return name, best


def load_sweep(spec: str) -> Sweep:
  """Calls `get_sweep()` of an experiment file.

  Args:
    spec: An experiment file, with or without an argument, or a config.json. If
      `get_sweep` takes an argument, it gets that of the file, or None.

  Returns:
    The sweep; an empty one if the file has no `get_sweep`.

  Raises:
    errors.UserError: As `configs.load`, or get_sweep returns something else.
  """
  if spec.endswith('.json'):
    return Sweep()
  module, _ = files.call_get_config(spec)
  if not hasattr(module, 'get_sweep'):
    return Sweep()
  takes = inspect.signature(module.get_sweep).parameters
  arg = spec.partition('.py:')[2] or None
  sweep = module.get_sweep(arg) if takes else module.get_sweep()
  if not isinstance(sweep, Sweep):
    raise errors.UserError(
      f'{spec}: get_sweep returned {sweep!r}; return a sweeps.Sweep.'
    )
  return sweep


def make_cells(
  spec: str, sweep: Sweep, *, assignments: Sequence[str] = ()
) -> tuple[Cell, ...]:
  """Makes a cell for every row at every point of the grid.

  Args:
    spec: An experiment file, with or without an argument, or a config.json.
    sweep: Rows, grid and tuned field.
    assignments: Changes to all cells, as for --set.

  Returns:
    The cells. Another row, or another value of a field, does not change the
    names of the others.

  Raises:
    errors.UserError: Two cells have the same name.
  """
  grid = [parse_grid(text) for text in as_grid(sweep)]
  paths = [path for path, _ in grid]
  points = itertools.product(
    *([(path, value) for value in values] for path, values in grid)
  )
  made: dict[str, Cell] = {}
  for row, point in itertools.product(sweep.rows or (None,), points):
    cell = _make_cell(spec, row, point, paths, tuple(assignments))
    if cell.name in made:
      raise errors.UserError(
        f'{cell.point} and {made[cell.name].point} would both be called '
        f'{cell.name!r}; name them as rows of a Sweep instead.'
      )
    made[cell.name] = cell
  return tuple(made.values())


def _make_cell(
  spec: str,
  row: Row | None,
  point: tuple[tuple[str, str], ...],
  paths: Sequence[str],
  assignments: tuple[str, ...],
) -> Cell:
  """Makes the cell of a row, if there are rows, at a point of the grid."""
  changes = tuple(f'{path}={value}' for path, value in point)
  if row is None:
    name = cell_name('', point, paths)
    return Cell(name, spec, assignments + changes, point=point)
  if row.arg is not None:
    spec = f'{spec.partition(".py")[0]}.py:{row.arg}'
  return Cell(
    name=cell_name(row.name, point, paths),
    spec=spec,
    assignments=assignments + row.assignments + changes,
    row=row.name,
    point=point,
    printed=row.printed,
  )


def cell_name(
  row: str, point: Iterable[tuple[str, str]], paths: Sequence[str]
) -> str:
  """Returns the name of the cell of a row at a point of the grid.

  Args:
    row: Name of the row, if any.
    point: Path and value of each field that the name has.
    paths: Paths of all fields of the grid.
  """
  labels = _labels(paths)
  names = [f'{labels[path]}={_slug(value)}' for path, value in point]
  return _shorten(','.join([row] * bool(row) + names) or _PLAIN)


def load_cells(
  cells: Sequence[Cell], *, num_seeds: int, seed_fields: Sequence[str]
) -> dict[tuple[str, int], tuple[tuple[str, ...], Any]]:
  """Makes every config of a sweep, so that mistakes appear before a run starts.

  Args:
    cells: The cells.
    num_seeds: Runs of each cell, with the seeds 0, 1, ...
    seed_fields: Paths of the fields that take the seed; a config may lack some.

  Returns:
    From (name of a cell, seed) to (all assignments, config).

  Raises:
    errors.UserError: A field is unknown, a value does not fit, a cell sets a
      seed, or two cells are the same config.
  """
  loaded, seen = {}, {}
  specs = dict.fromkeys(cell.spec for cell in cells)
  bases = {spec: configs.load(spec) for spec in specs}
  for cell in cells:
    base = bases[cell.spec]
    fields = [path for path in seed_fields if _has(base, path)]
    for assignment in cell.assignments:
      if assignment.partition('=')[0].strip() in fields:
        raise errors.UserError(
          f'{assignment} sets a seed; leave it out, --seeds counts them from 0.'
        )
    if not fields and num_seeds > 1:
      raise errors.UserError(
        f'--seeds={num_seeds}, but the config of {cell.spec} has none of the '
        f'fields {", ".join(seed_fields)}; use --seeds=1, or name its field in '
        'the seed_fields of its Sweep.'
      )
    for seed in range(num_seeds):
      seeds = tuple(f'{path}={seed}' for path in fields)
      assignments = (*cell.assignments, *seeds)
      try:
        config = configs.override(base, assignments)
      except errors.UserError as error:
        raise errors.UserError(f'cell {cell.name}: {error}') from error
      other = seen.setdefault(configs.to_json(config), cell.name)
      if other != cell.name:
        raise errors.UserError(
          f'The cells {other} and {cell.name} are the same config; leave out '
          'one of them.'
        )
      loaded[cell.name, seed] = assignments, config
  return loaded


def _split(listed: str, text: str) -> list[str]:
  """Splits at the commas outside brackets and quotes."""
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


def _has(config: Any, path: str) -> bool:
  for name in path.split('.'):
    if not hasattr(config, name):
      return False
    config = getattr(config, name)
  return True


def _labels(paths: Sequence[str]) -> dict[str, str]:
  """Returns the shortest end of each path that no other path has."""
  labels = {}
  for path in paths:
    parts = path.split('.')
    ends = ['.'.join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
    others = [f'.{other}' for other in paths if other != path]
    labels[path] = next(
      (e for e in ends if not any(o.endswith(f'.{e}') for o in others)), path
    )
  return labels


def _slug(value: str) -> str:
  """Returns a value as a part of a folder's name."""
  if value[:1] in '([' and value[-1:] in ')]':
    value = '+'.join(v.strip('\'" ') for v in value[1:-1].split(',') if v)
  return re.sub(r'[^A-Za-z0-9.+-]+', '_', value) or 'empty'


def _shorten(name: str) -> str:
  """Returns a name that is short enough for file systems."""
  if len(name) <= _LONGEST:
    return name
  return f'{name[: _LONGEST - 9]}-{hashlib.sha1(name.encode()).hexdigest()[:8]}'
