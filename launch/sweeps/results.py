"""Reads the results of the runs of a sweep, and averages over seeds."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import statistics
from typing import NamedTuple

from launch.sweeps import cells as cells_lib
from launch.sweeps import record as record_lib

# Words in the names of metrics whose larger, or smaller, values are better.
_LARGER = ('accuracy', 'exact', 'per_second', 'gain', 'score', 'recall')
_SMALLER = ('loss', 'bits_per_byte', 'perplexity', 'error', 'seconds', 'bytes')


class Result(NamedTuple):
  """The result of one run.

  Attributes:
    name: For example `cell/seed_0`.
    cell: Name of its cell.
    seed: Its seed, from 0.
    status: 'finished', 'failed', 'unfinished' or 'not begun'.
    values: Entries of its summary.json.
    error: Reason why it failed.
  """

  name: str
  cell: str
  seed: int
  status: str
  values: Mapping[str, str | float | int | bool]
  error: str = ''


class Statistic(NamedTuple):
  """Mean and spread of a metric over the seeds of a cell.

  Attributes:
    mean: Mean over the seeds.
    spread: Sample standard deviation; NaN for one seed.
    num_seeds: Number of seeds that have the metric.
  """

  mean: float
  spread: float
  num_seeds: int


def read(record: record_lib.Record, workdir: pathlib.Path) -> list[Result]:
  """Reads the result of every run; a damaged one counts as failed."""
  return [
    _read_run(workdir / 'cells' / cell.name / f'seed_{seed}', cell.name, seed)
    for cell in record.cells
    for seed in range(record.num_seeds)
  ]


def metrics(
  record: record_lib.Record, results: Sequence[Result]
) -> dict[str, str]:
  """Returns the columns of the table: key, and 'min', 'max' or ''."""
  if record.metrics:
    parsed = [cells_lib.parse_metric(text) for text in record.metrics]
    return {key: best or _best(key) for key, best in parsed}
  found: dict[str, set[float]] = {}
  for result in results:
    for key in result.values:
      value = number(result, key)
      if value is not None:
        found.setdefault(key, set()).add(value)
  several = sum(result.status == 'finished' for result in results) > 1
  return {
    key: _best(key)
    for key, values in found.items()
    if len(values) > 1 or not several
  }


def summarize(
  results: Sequence[Result], keys: Sequence[str]
) -> dict[str, dict[str, Statistic]]:
  """Returns the statistic of every cell and key that has values."""
  table: dict[str, dict[str, list[float]]] = {}
  for result in results:
    row = table.setdefault(result.cell, {})
    for key in keys:
      value = number(result, key)
      if value is not None:
        row.setdefault(key, []).append(value)
  return {
    cell: {key: _statistic(values) for key, values in row.items()}
    for cell, row in table.items()
  }


def compare(
  record: record_lib.Record, results: Sequence[Result], key: str | None
) -> dict[str, Statistic]:
  """Returns how far a metric is from that of the first cell, seed by seed.

  Args:
    record: The sweep.
    results: Results of its cells.
    key: The metric; None gives nothing.

  Returns:
    The statistic of the differences, for cells that have two or more finite
    values with seeds of the first one.
  """
  values: dict[str, dict[int, float]] = {}
  for result in results if key is not None else ():
    value = number(result, key)
    if value is not None and math.isfinite(value):
      values.setdefault(result.cell, {})[result.seed] = value
  first = values.get(record.cells[0].name, {})
  found = {}
  for cell in record.cells[1:]:
    own = values.get(cell.name, {})
    differences = [own[seed] - first[seed] for seed in own if seed in first]
    if len(differences) > 1:
      found[cell.name] = _statistic(differences)
  return found


def best_cells(
  table: Mapping[str, Mapping[str, Statistic]], key: str, best: str
) -> set[str]:
  """Returns the cells with the best mean; none if `best` is empty."""
  means = {
    cell: row[key].mean
    for cell, row in table.items()
    if key in row and math.isfinite(row[key].mean)
  }
  if not best or len(means) < 2:
    return set()
  found = (min if best == 'min' else max)(means.values())
  return {cell for cell, mean in means.items() if mean == found}


def differ(ours: Sequence[float], theirs: Sequence[float]) -> bool | None:
  """Returns whether two means differ by twice the larger spread.

  Args:
    ours: Numbers by seed.
    theirs: Numbers by seed.

  Returns:
    None if either has one seed only.
  """
  if min(len(ours), len(theirs)) < 2:
    return None
  if not all(map(math.isfinite, (*ours, *theirs))):
    return statistics.fmean(ours) != statistics.fmean(theirs)
  spread = max(statistics.stdev(ours), statistics.stdev(theirs))
  return abs(statistics.fmean(ours) - statistics.fmean(theirs)) >= 2 * spread


def outcome(
  metric: str, best: str, values: Mapping[str, Sequence[float]]
) -> str:
  """Returns sentences on the best mean and on those that differ from it.

  Args:
    metric: Name of the metric.
    best: 'min' or 'max'.
    values: From a name to numbers by seed, at least one.
  """
  word, select = ('lowest', min) if best == 'min' else ('highest', max)
  means = {
    name: statistics.fmean(numbers)
    for name, numbers in values.items()
    if all(map(math.isfinite, numbers))
  }
  first = select(means, key=means.get, default=None)
  listed = {'equal': [], 'behind': [], 'diverged': [], 'open': []}
  for name, numbers in values.items():
    if name not in means:
      listed['diverged'].append(name)
    elif name != first:
      key = {True: 'behind', False: 'equal', None: 'open'}
      listed[key[differ(values[first], numbers)]].append(name)
  sentences = [f'The {word} {metric} is that of {first}.'] if means else []
  for key, text in (
    ('equal', 'No different from it by twice the larger spread: {}.'),
    ('behind', 'Behind it: {}.'),
    ('diverged', 'Diverged: {}.'),
    ('open', 'Not known yet, for lack of seeds: {}.'),
  ):
    if listed[key]:
      sentences.append(text.format(', '.join(listed[key])))
  return ' '.join(sentences)


def number(result: Result, key: str) -> float | None:
  """Returns a number of a run; text 'nan' and 'inf' come from divergence."""
  value = result.values.get(key)
  if isinstance(value, bool | int | float):
    return float(value)
  return float(value) if value in ('nan', 'inf', '-inf') else None


def is_number(text: str) -> bool:
  """Returns whether a value of a field is a finite number."""
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False


def _read_run(folder: pathlib.Path, cell: str, seed: int) -> Result:
  name = f'{cell}/{folder.name}'
  make = lambda status, values=None, error='': Result(
    name, cell, seed, status, values or {}, error
  )
  summary, error = folder / record_lib.SUMMARY, folder / record_lib.ERROR
  try:
    if summary.is_file():
      values = json.loads(summary.read_text(encoding='utf-8'))
      if isinstance(values, dict):
        return make('finished', values)
      return make('failed', error=f'{summary} holds no JSON object')
    if error.is_file():
      text = error.read_text(encoding='utf-8').strip()
      return make('failed', error=text or 'no reason was left')
  except (OSError, ValueError) as cause:
    return make('failed', error=f'cannot read {folder}: {cause}')
  begun = (folder / 'config.json').is_file()
  return make('unfinished' if begun else 'not begun')


def _best(key: str) -> str:
  for words, best in ((_LARGER, 'max'), (_SMALLER, 'min')):
    if any(word in key for word in words):
      return best
  return ''


def _statistic(values: Sequence[float]) -> Statistic:
  spread = math.nan
  finite = all(map(math.isfinite, values))
  if finite and len(values) > 1:
    spread = statistics.stdev(values)
  mean = statistics.fmean(values) if finite else math.nan
  return Statistic(mean, spread, len(values))
