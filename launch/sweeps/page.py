"""The page of a sweep, in Markdown."""

from collections.abc import Mapping, Sequence
import math

from launch.sweeps import cells as cells_lib
from launch.sweeps import record as record_lib
from launch.sweeps import results as results_lib
from nested_learning import markdown

_EMPTY = '–'


def make(
  record: record_lib.Record,
  results: Sequence[results_lib.Result],
  *,
  metrics: Mapping[str, str],
  table: Mapping[str, Mapping[str, results_lib.Statistic]],
  images: Mapping[str, str],
) -> str:
  """Returns the page.

  Args:
    record: The sweep.
    results: What each run left.
    metrics: The columns, each with 'min', 'max' or ''.
    table: From cell and metric to its statistic.
    images: From each metric to the name of its plot.

  Returns:
    Markdown.
  """
  finished = [r for r in results if r.status == 'finished']
  sections = [
    f'# Sweep of {record.spec}',
    markdown.fenced('\n'.join(record.commands)),
    f'{len(finished)} of {len(results)} runs are finished. Numbers are means '
    'over the seeds of a cell that finished, ± the standard deviation of a '
    'sample; the best mean is bold.',
    _table(record, results, metrics, table),
    *_provenance(record, finished),
  ]
  failed = [r for r in results if r.status == 'failed']
  if failed:
    listed = [
      f'- [{r.name}](cells/{r.name}/{record_lib.LOG}): {r.error}'
      for r in failed
    ]
    sections += ['## Failed', '\n'.join(listed)]
  rows = [
    (cell.name, f'`{_changes(record, cell)}`')
    for cell in record.cells
    if cell.row
  ]
  if rows:
    sections += ['## What the cells change', markdown.table(('cell', ''), rows)]
  for key, image in images.items():
    sections += [f'## {key}', f'![{key} of the cells]({image})']
  return '\n\n'.join(sections) + '\n'


def _table(record, results, metrics, table) -> str:
  """The cells by the metrics."""
  best = {
    key: results_lib.best_cells(table, key, which)
    for key, which in metrics.items()
  }
  rows = []
  for cell in record.cells:
    statuses = [r.status for r in results if r.cell == cell.name]
    seeds = f'{statuses.count("finished")} of {len(statuses)}'
    if 'failed' in statuses:
      seeds += f', **{statuses.count("failed")} failed**'
    row = [cell.name]
    for key in metrics:
      text = _text(table[cell.name].get(key))
      row.append(f'**{text}**' if cell.name in best[key] else text)
    row.append(seeds)
    if record.printed:
      row.append(cell.printed or _EMPTY)
    rows.append(row)
  head = ['cell', *metrics, 'seeds']
  return markdown.table(head + [record.printed] * bool(record.printed), rows)


def _provenance(record, finished) -> list[str]:
  """Where and with which code the numbers were made, as far as it is known."""
  devices = {
    f'{r.values.get("num_devices", 1)} x {r.values["device"]}'
    for r in finished
    if 'device' in r.values
  }
  lines = []
  if devices:
    lines.append(f'Devices of a run: {", ".join(sorted(devices))}.')
  if record.commits:
    lines.append(f'Commit: {", ".join(record.commits)}.')
  return lines


def _changes(record: record_lib.Record, cell: cells_lib.Cell) -> str:
  """What a cell changes that the others do not."""
  changes = list(cell.assignments[len(record.assignments) :])
  if cell.spec != record.spec:
    changes.insert(0, f'--config={cell.spec}')
  return ' '.join(changes) or _EMPTY


def _text(statistic: results_lib.Statistic | None) -> str:
  if statistic is None:
    return _EMPTY
  text = f'{statistic.mean:.4g}'
  if math.isfinite(statistic.spread):
    text += f' ± {statistic.spread:.2g}'
  return text
