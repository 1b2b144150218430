"""What the runs of a sweep left, as numbers."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import statistics
from typing import NamedTuple

from launch.sweeps import definition
from launch.sweeps import record as record_lib

# Numbers that are better the larger, or the smaller, by what is in their name.
_LARGER = ('accuracy', 'exact', 'per_second', 'gain', 'score', 'recall')
_SMALLER = ('loss', 'bits_per_byte', 'perplexity', 'error', 'seconds', 'bytes')


class Result(NamedTuple):
  """What one run left.

  Attributes:
    name: `cell/seed_0`.
    cell: Name of its cell.
    seed: From 0.
    status: 'finished', 'failed', 'unfinished' or 'not begun'.
    values: Of its summary.json.
    error: Why it failed.
  """

  name: str
  cell: str
  seed: int
  status: str
  values: Mapping[str, str | float | int | bool]
  error: str = ''


class Statistic(NamedTuple):
  """A number over the seeds of a cell.

  Attributes:
    mean: Over the seeds.
    spread: Standard deviation of a sample, NaN for one seed.
    num_seeds: That have the number.
  """

  mean: float
  spread: float
  num_seeds: int


def read(record: record_lib.Record, workdir: pathlib.Path) -> list[Result]:
  """Reads what each run left; no run's damage harms another."""
  return [
    _read_run(workdir / 'cells' / cell.name / f'seed_{seed}', cell.name, seed)
    for cell in record.cells
    for seed in range(record.num_seeds)
  ]


def metrics(
  record: record_lib.Record, results: Sequence[Result]
) -> dict[str, str]:
  """Returns the columns of the table, each with 'min', 'max' or ''."""
  if record.metrics:
    parsed = [definition.parse_metric(text) for text in record.metrics]
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
  """Returns from cell and key to its statistic; without runs there is none."""
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


def best_cells(
  table: Mapping[str, Mapping[str, Statistic]], key: str, best: str
) -> set[str]:
  """Returns the cells with the best mean; none where none is asked for."""
  means = {
    cell: row[key].mean
    for cell, row in table.items()
    if key in row and math.isfinite(row[key].mean)
  }
  if not best or len(means) < 2:
    return set()
  found = (min if best == 'min' else max)(means.values())
  return {cell for cell, mean in means.items() if mean == found}


def number(result: Result, key: str) -> float | None:
  """A number of a run; 'nan' and 'inf' are numbers of one that diverged."""
  value = result.values.get(key)
  if isinstance(value, bool | int | float):
    return float(value)
  return float(value) if value in ('nan', 'inf', '-inf') else None


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
