"""The cells that rows and a grid make, each checked before anything starts."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import itertools
import re
from typing import Any

from launch.sweeps import definition
from nested_learning import configs
from nested_learning import errors
from nested_learning.configs import files

_PLAIN = 'config'  # the name of a cell that changes nothing
_LONGEST = 120  # letters of a cell's name


@dataclasses.dataclass(frozen=True)
class Cell:
  """One config of a sweep, whatever the seed."""

  name: str
  spec: str  # --config of the run
  assignments: tuple[str, ...]  # --set of the run, those of all cells first
  row: str = ''  # name of its row, if it has one
  point: tuple[tuple[str, str], ...] = ()  # its place in the grid: path, value
  printed: str = ''


def load_sweep(spec: str) -> definition.Sweep:
  """Returns what the file's `get_sweep()` makes; without one, an empty sweep.

  Args:
    spec: An experiment file, also with an argument, or a config.json.

  Raises:
    errors.UserError: As `configs.load`, or if get_sweep returns no Sweep.
  """
  if spec.endswith('.json'):
    return definition.Sweep()
  module, _ = files.call_get_config(spec)
  if not hasattr(module, 'get_sweep'):
    return definition.Sweep()
  sweep = module.get_sweep()
  if not isinstance(sweep, definition.Sweep):
    raise errors.UserError(
      f'{spec}: get_sweep returned {sweep!r}; return a sweeps.Sweep.'
    )
  return sweep


def make_cells(
  spec: str, sweep: definition.Sweep, *, assignments: Sequence[str] = ()
) -> tuple[Cell, ...]:
  """Returns every row at every point of the grid.

  Args:
    spec: Experiment file, with an argument or without, or a config.json.
    sweep: Rows and grid.
    assignments: Changes to all cells, as for --set.

  Returns:
    The cells. Their names do not change when the sweep gets another row, or a
    field of the grid another value.

  Raises:
    errors.UserError: If two cells have the same name.
  """
  grid = [definition.parse_grid(text) for text in sweep.grid]
  labels = _labels([path for path, _ in grid])
  points = itertools.product(
    *([(path, value) for value in values] for path, values in grid)
  )
  made: dict[str, Cell] = {}
  for row, point in itertools.product(sweep.rows or (None,), points):
    cell = _make_cell(spec, row, point, labels, tuple(assignments))
    if cell.name in made:
      raise errors.UserError(
        f'{cell.point} and {made[cell.name].point} would both be called '
        f'{cell.name!r}; name them as rows of a Sweep instead.'
      )
    made[cell.name] = cell
  return tuple(made.values())


def _make_cell(
  spec: str,
  row: definition.Row | None,
  point: tuple[tuple[str, str], ...],
  labels: Mapping[str, str],
  assignments: tuple[str, ...],
) -> Cell:
  """The cell of a row, if there are rows, at a point of the grid."""
  names = [f'{labels[path]}={_slug(value)}' for path, value in point]
  changes = tuple(f'{path}={value}' for path, value in point)
  if row is None:
    name = _shorten(','.join(names) or _PLAIN)
    return Cell(name, spec, assignments + changes, point=point)
  if row.arg is not None:
    spec = f'{spec.partition(".py")[0]}.py:{row.arg}'
  return Cell(
    name=_shorten(','.join([row.name, *names])),
    spec=spec,
    assignments=assignments + row.assignments + changes,
    row=row.name,
    point=point,
    printed=row.printed,
  )


def load_cells(
  cells: Sequence[Cell], *, num_seeds: int, seed_fields: Sequence[str]
) -> dict[tuple[str, int], tuple[tuple[str, ...], Any]]:
  """Makes every config of a sweep, so that nothing wrong is found later.

  Args:
    cells: The cells.
    num_seeds: Runs of each, with the seeds from 0.
    seed_fields: Paths of fields that take the seed; those that a config has
      not are left out.

  Returns:
    From the name of a cell and the seed to all assignments and the config.

  Raises:
    errors.UserError: A field is unknown, a value does not fit, a cell sets a
      seed, or two cells are the same config.
  """
  loaded, seen = {}, {}
  for cell in cells:
    base = configs.load(cell.spec)
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


def _has(config: Any, path: str) -> bool:
  for name in path.split('.'):
    if not hasattr(config, name):
      return False
    config = getattr(config, name)
  return True


def _labels(paths: Sequence[str]) -> dict[str, str]:
  """The shortest end of each path that no other path has."""
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
  """A value as a part of a folder's name."""
  if value[:1] in '([' and value[-1:] in ')]':
    value = '+'.join(v.strip('\'" ') for v in value[1:-1].split(',') if v)
  return re.sub(r'[^A-Za-z0-9.+-]+', '_', value) or 'empty'


def _shorten(name: str) -> str:
  """A name that a file system takes."""
  if len(name) <= _LONGEST:
    return name
  return f'{name[: _LONGEST - 9]}-{hashlib.sha1(name.encode()).hexdigest()[:8]}'
