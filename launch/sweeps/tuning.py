"""The search of one field with seed 0, before the other seeds."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
from typing import NamedTuple

from launch.sweeps import cells as cells_lib
from launch.sweeps import record as record_lib
from launch.sweeps import results as results_lib
from nested_learning import errors
from nested_learning import markdown


class Search(NamedTuple):
  """The cells that differ in the tuned field only.

  Attributes:
    name: Name of their row and point of the grid, without the field.
    cells: From each value of the field to its cell.
    tried: From each value that has finished or failed with seed 0 to its score:
      the first metric, infinite if it diverged, NaN without one.
    due: The values to try next.
    best: The best value; None while some are due, or if none is finite.
  """

  name: str
  cells: Mapping[str, cells_lib.Cell]
  tried: Mapping[str, float]
  due: Sequence[str]
  best: str | None


def search(
  record: record_lib.Record, results: Sequence[results_lib.Result]
) -> list[Search]:
  """Returns the search at every row and point of the grid.

  Args:
    record: A sweep, perhaps without a tuned field, which has no searches.
    results: Results of all its runs of seed 0, and perhaps others.

  Raises:
    errors.UserError: It is not known which value of the first metric is best.
  """
  if not record.tune:
    return []
  key, best = _criterion(record)
  select = min if best == 'min' else max
  groups: dict[str, dict[str, cells_lib.Cell]] = {}
  for cell in record.cells:
    name = cells_lib.cell_name(cell.row, _rest(cell, record), record.fields)
    groups.setdefault(name, {})[dict(cell.point)[record.tune]] = cell
  ended = {
    result.cell: _score(result, key)
    for result in results
    if result.seed == 0 and result.status in ('finished', 'failed')
  }
  searches = []
  for name, cells in groups.items():
    tried = {v: ended[c.name] for v, c in cells.items() if c.name in ended}
    finite = {v: score for v, score in tried.items() if math.isfinite(score)}
    found = None
    if finite:
      found = select(finite, key=finite.get)  # the first of equal ones
    near = list(cells)
    if record.descends and all(map(results_lib.is_number, near)):
      near = _next_numbers(near, tried, found)
    due = [value for value in cells if value in near and value not in tried]
    searches.append(Search(name, cells, tried, due, None if due else found))
  return searches


def _next_numbers(
  values: Sequence[str], tried: Mapping[str, float], best: str | None
) -> list[str]:
  """Returns the numbers to try next in a search from the largest down.

  The two largest come first, then the neighbours of the best one.

  Args:
    values: All values.
    tried: Those that are tried.
    best: The best of them; None if none is finite.
  """
  ordered = sorted(values, key=float)
  if best is not None:
    at = ordered.index(best)
    return ordered[max(at - 1, 0) : at + 2]
  untried = [value for value in ordered if value not in tried]
  return untried[-1:] if tried else untried[-2:]  # past those that diverged


def is_due(searches: Sequence[Search], cell: str, seed: int) -> bool:
  """Returns whether a run of a cell is to be done, as far as is known."""
  if seed == 0:
    names = (s.cells[v].name for s in searches for v in (*s.tried, *s.due))
  else:
    names = (s.cells[s.best].name for s in searches if s.best is not None)
  return not searches or cell in names


def list_due(
  record: record_lib.Record,
  workdir: pathlib.Path,
  runs: Sequence[record_lib.Run],
  *,
  only: str = '*',
) -> tuple[list[record_lib.Run], list[str]]:
  """Selects the runs to do: of a tuned sweep, next values and best ones.

  Args:
    record: The sweep.
    workdir: Its folder.
    runs: Its runs, or a part of them.
    only: A run with exactly this name is due.

  Returns:
    The runs; and the names of the searches with a part in `runs` that are to
    have other seeds and have not ended.

  Raises:
    errors.UserError: As `search`.
  """
  firsts = dataclasses.replace(record, num_seeds=1)
  searches = search(record, results_lib.read(firsts, workdir))
  due = [
    run
    for run in runs
    if run.name == only or is_due(searches, run.cell.name, run.seed)
  ]
  names = {run.cell.name for run in runs if record.num_seeds > 1}
  return due, [
    s.name
    for s in searches
    if s.due and any(cell.name in names for cell in s.cells.values())
  ]


def at_best(
  record: record_lib.Record,
  results: Sequence[results_lib.Result],
  searches: Sequence[Search],
) -> tuple[record_lib.Record, list[results_lib.Result]]:
  """Returns the sweep of the best values, with one cell for each search."""
  cells = []
  for found in searches:
    cell = next(iter(found.cells.values()))  # they differ in the field only
    rest = _rest(cell, record)
    changes = cell.assignments[: -len(cell.point)]
    changes += tuple(f'{path}={value}' for path, value in rest)
    cells.append(
      dataclasses.replace(
        cell, name=found.name, assignments=changes, point=rest
      )
    )
  names = {s.cells[s.best].name: s.name for s in searches if s.best is not None}
  return dataclasses.replace(record, cells=tuple(cells)), [
    result._replace(cell=names[result.cell])
    for result in results
    if result.cell in names
  ]


def sections(
  record: record_lib.Record,
  results: Sequence[results_lib.Result],
  searches: Sequence[Search],
  table: str,
) -> list[str]:
  """Returns the part of a page on the best values and on those tried.

  Args:
    record: The sweep of the best values, from `at_best`.
    results: Its results.
    searches: From `search`.
    table: Table of its results.
  """
  key, best = _criterion(record)
  word = 'lowest' if best == 'min' else 'highest'
  by_cell: dict[str, list[float]] = {}
  for result in results:
    if (number := results_lib.number(result, key)) is not None:
      by_cell.setdefault(result.cell, []).append(number)
  ends = ', '.join(f'{s.name} ({s.best})' for s in searches if _is_at_end(s))
  values = list(dict.fromkeys(v for found in searches for v in found.cells))
  if all(map(results_lib.is_number, values)):
    values.sort(key=float)
  how = f'Every value of `{record.tune}` runs'
  if record.descends:
    how = (
      f'Values of `{record.tune}` run from the largest down, until the best '
      'one has no neighbour that was not tried,'
    )
  scores = [[s.name, *(_text(s, value) for value in values)] for s in searches]
  return [
    f'{how} with seed 0. The one with the {word} {key} runs with all '
    f'{record.num_seeds} seeds, whose results are shown. The value is selected '
    'by the same number that cells are compared by.',
    table,
    f'**Best at an end of the values tried: {ends}.**' if ends else '',
    results_lib.outcome(key, best, by_cell),
    f'{key} with seed 0, by {record.tune}:',
    markdown.table(['cell', *values], scores),
  ]


def _criterion(record: record_lib.Record) -> tuple[str, str]:
  """Returns the metric that selects a value, and 'min' or 'max'."""
  columns = results_lib.metrics(record, ())
  key = next(iter(columns), None)
  if not columns.get(key):
    raise errors.UserError(
      f'To tune {record.tune}, the first metric must say which value is best; '
      f'it is {key!r}; name one, as in --metrics=loss:min.'
    )
  return key, columns[key]


def _rest(cell, record) -> tuple[tuple[str, str], ...]:
  """Returns the point of a cell without the tuned field."""
  return tuple((p, value) for p, value in cell.point if p != record.tune)


def _score(result: results_lib.Result, key: str) -> float:
  score = results_lib.number(result, key)
  if score is None:
    return math.nan
  return score if math.isfinite(score) else math.inf


def _is_at_end(found: Search) -> bool:
  """Returns whether the best value is the smallest or largest number."""
  if found.best is None or not all(map(results_lib.is_number, found.cells)):
    return False
  values = [float(value) for value in found.cells]
  return float(found.best) in (min(values), max(values))


def _text(found: Search, value: str) -> str:
  """Returns the score of a value; the best one is bold."""
  score = found.tried.get(value)
  if score is None:
    return '–'
  if math.isnan(score):
    return 'failed'
  text = f'{score:.4g}' if math.isfinite(score) else 'diverged'
  return f'**{text}**' if value == found.best else text
