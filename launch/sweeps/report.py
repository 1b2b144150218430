"""Writes what the runs of a sweep gave: a page, tables and plots."""

from collections.abc import Mapping, Sequence
import csv
import difflib
import io
import itertools
import json
import math
import pathlib
import re
import shlex

from matplotlib import figure as mpl_figure
from matplotlib import ticker

from launch import provenance
from launch.sweeps import cells as cells_lib
from launch.sweeps import record as record_lib
from launch.sweeps import results as results_lib
from launch.sweeps import tuning
from nested_learning import files
from nested_learning import markdown

PAGE = 'README.md'
_CSV = 'results.csv'
_EMPTY = '–'
_OF_A_PART = ('--only', '--jobs')  # flags that change no result


def collect(
  record: record_lib.Record,
  workdir: pathlib.Path,
  folder: pathlib.Path | None = None,
) -> list[str]:
  """Writes the results of the finished runs of a sweep.

  README.md has the tables and the plots, results.csv a line per run, and
  summary.json the mean of each metric of a cell as `cell/metric`. With more
  than one seed, it has the standard deviation as `cell/metric/spread` and, of
  the first metric, the mean difference from the first cell, seed by seed, as
  `cell/metric/difference`. If a field is tuned, these are the cells with its
  best value, named without it, and summary.json has the value as `cell/FIELD`.

  Args:
    record: The sweep.
    workdir: Its folder.
    folder: Folder of these files; None is the workdir.

  Returns:
    A warning for each requested metric that no run has.
  """
  folder = workdir if folder is None else folder
  results = results_lib.read(record, workdir)
  searches = tuning.search(record, results)
  results = [
    r
    for r in results
    if r.status != 'not begun' or tuning.is_due(searches, r.cell, r.seed)
  ]
  lines, shown = _make_csv(record, results), results
  if searches:
    record, shown = tuning.at_best(record, results, searches)
  wanted = results_lib.metrics(record, results)
  known = sorted({key for result in results for key in result.values})
  metrics = {key: best for key, best in wanted.items() if key in known}
  table = {cell.name: {} for cell in record.cells}
  table |= results_lib.summarize(shown, tuple(metrics))
  images = {}
  for key in metrics:
    images[key] = re.sub(r'[^A-Za-z0-9._-]+', '_', key) + '.png'
    values = {cell: row[key] for cell, row in table.items() if key in row}
    image = io.BytesIO()
    make_figure(key, record.cells, values).savefig(image, dpi=110)
    files.write_whole(folder / images[key], image.getvalue())
  best = {s.name: s.best for s in searches if s.best is not None}
  parts = [_table(record, shown, metrics, table, best)]
  first = next(iter(metrics), None)
  compared = results_lib.compare(record, shown, first)
  if searches:
    parts = tuning.sections(record, shown, searches, *parts)
  parts.append(_differences(record, first, compared))
  text = _make_page(
    record, results, workdir, folder=folder, parts=parts, images=images
  )
  summary = _summary(record, results, table, best)
  for cell, statistic in compared.items():
    summary[f'{cell}/{first}/difference'] = statistic.mean
  summary = json.dumps(summary, indent=2) + '\n'
  for name, content in (
    (_CSV, lines),
    (PAGE, text),
    (record_lib.SUMMARY, summary),
  ):
    files.write_whole(folder / name, content)
  return [
    f'no run has the metric {key!r}; the nearest is '
    f'{difflib.get_close_matches(key, known, 1, 0)[0]}.'
    for key in wanted
    if known and key not in known
  ]


def make_figure(
  metric: str,
  cells: Sequence[cells_lib.Cell],
  values: Mapping[str, results_lib.Statistic],
) -> mpl_figure.Figure:
  """Draws a metric, with its spread over the seeds as error bars.

  If the grid has a field of numbers, the first such field is the x axis, and
  rows and the other fields make curves. Otherwise every cell has a line.

  Args:
    metric: Its name.
    cells: The cells, in order.
    values: From the name of a cell to the metric; cells may be missing.

  Returns:
    The figure.
  """
  shown = [
    cell
    for cell in cells
    if cell.name in values and math.isfinite(values[cell.name].mean)
  ]
  field = _number_field(cells)
  height = 4.0 if field else 1.2 + 0.3 * len(shown)
  figure = mpl_figure.Figure(figsize=(7, height), layout='tight')
  axes = figure.subplots()
  if field:
    _draw_curves(axes, field, shown, values)
    axes.set_ylabel(metric)
  else:
    _draw_cells(axes, shown, values)
    axes.set_xlabel(metric)
  return figure


def read_sources(
  finished: Sequence[results_lib.Result], workdir: pathlib.Path
) -> tuple[list[dict[str, str]], dict[str, str]]:
  """Returns the sources of results and further lines, for `provenance.listed`.

  Args:
    finished: Results of the finished runs.
    workdir: Folder of their sweep.
  """
  starts = [
    provenance.read_starts(workdir / 'cells' / result.name)
    for result in finished
  ]
  devices = {
    f'{result.values.get("num_devices", 1)} x {result.values["device"]}'
    for result in finished
    if 'device' in result.values
  }
  lacking = sum(not lines for lines in starts)
  more = {
    'devices of a run': '; '.join(sorted(devices)),
    'runs that left no record of these': str(lacking or ''),
  }
  more = {key: value for key, value in more.items() if value}
  return list(itertools.chain(*starts)), more


def _make_page(
  record: record_lib.Record,
  results: Sequence[results_lib.Result],
  workdir: pathlib.Path,
  *,
  folder: pathlib.Path,
  parts: Sequence[str],
  images: Mapping[str, str],
) -> str:
  """Returns README.md: commands, parts with tables, failed runs and plots."""
  finished = [r for r in results if r.status == 'finished']
  sections = [
    f'# Sweep of {record.spec}',
    markdown.fenced('\n'.join(_whole_commands(record, folder))),
    f'{len(finished)} of {len(results)} runs are finished. Numbers are means '
    'over the finished seeds of a cell, ± the sample standard deviation; the '
    'best mean is bold.',
    *parts,
    _sources(record, finished, workdir),
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
  return '\n\n'.join(filter(None, sections)) + '\n'


def _whole_commands(
  record: record_lib.Record, folder: pathlib.Path
) -> list[str]:
  """Returns the commands that make all of a sweep.

  Commands with --only or --jobs made a part of it, or the same in another
  order. In a relative folder, which may be that of published results, the
  commands name it and have no absolute folders.
  """
  found = []
  for command in record.commands:
    words, kept = iter(shlex.split(command)), []
    for word in words:
      name, equals, _ = word.partition('=')
      name = re.sub('^--?', '--', name)
      names_results = name == '--results' and not folder.is_absolute()
      if name not in _OF_A_PART and not names_results:
        kept.append(word)
        continue
      if not equals:
        next(words, None)  # its value
      kept += [f'--results={folder}'] * names_results
    command = shlex.join(kept)
    relative = not folder.is_absolute()
    found.append(provenance.portable(command) if relative else command)
  return list(dict.fromkeys(found))


def _table(record, results, metrics, table, values) -> str:
  """Returns the table of cells, best values if any, and metrics."""
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
    row = [cell.name] + [values.get(cell.name, _EMPTY)] * bool(record.tune)
    for key in metrics:
      text = _text(table[cell.name].get(key))
      row.append(f'**{text}**' if cell.name in best[key] else text)
    row.append(seeds if statuses else _EMPTY)
    if record.printed:
      row.append(cell.printed or _EMPTY)
    rows.append(row)
  head = ['cell'] + [record.tune] * bool(record.tune) + [*metrics, 'seeds']
  return markdown.table(head + [record.printed] * bool(record.printed), rows)


def _differences(
  record: record_lib.Record,
  metric: str | None,
  compared: Mapping[str, results_lib.Statistic],
) -> str:
  """Returns the table of differences from the first cell, or ''."""
  if not compared:
    return ''
  rows = []
  for name, statistic in compared.items():
    is_clear = abs(statistic.mean) >= 2 * statistic.spread
    word = 'higher' if statistic.mean > 0 else 'lower'
    text = f'{statistic.mean:+.3g} ± {statistic.spread:.2g}'
    rows.append((name, text, word if is_clear else 'no different'))
  first = record.cells[0].name
  return (
    f'{metric} less that of {first} with the same seed, which has the same '
    'data in the same order. A difference below twice its standard deviation '
    f'over seeds is no difference:\n\n'
    f'{markdown.table(("cell", "difference", "is"), rows)}'
  )


def _sources(record, finished, workdir) -> str:
  """Returns a list of code and machines; the page begins with the commands."""
  sources, more = read_sources(finished, workdir)
  for source in sources:
    source.pop('command', None)
  earlier = [{'commit': commit} for commit in record.commits]
  return provenance.listed([*earlier, *sources], more)


def _changes(record: record_lib.Record, cell: cells_lib.Cell) -> str:
  """Returns the assignments of a cell that are not those of all cells."""
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


def _make_csv(
  record: record_lib.Record, results: Sequence[results_lib.Result]
) -> str:
  """Returns results.csv: cell, seed, grid fields and results of each run."""
  points = {cell.name: dict(cell.point) for cell in record.cells}
  keys = list(dict.fromkeys(key for r in results for key in r.values))
  place = ('cell', 'seed', 'status', 'error')
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow([*place, *record.fields, *keys])
  for result in results:
    point = points[result.cell]
    writer.writerow(
      [
        *(getattr(result, name) for name in place),
        *(point.get(field, '') for field in record.fields),
        *(result.values.get(key, '') for key in keys),
      ]
    )
  return file.getvalue()


def _summary(
  record: record_lib.Record,
  results: Sequence[results_lib.Result],
  table: Mapping[str, Mapping[str, results_lib.Statistic]],
  best: Mapping[str, str],
) -> dict[str, float | int | str]:
  """Returns the table with flat keys; JSON has no NaN, so it is a string."""
  count = lambda status: sum(r.status == status for r in results)
  summary = {
    'cells': len(table),
    'runs': len(results),
    'finished': count('finished'),
    'failed': count('failed'),
  }
  for cell, row in table.items():
    for key, statistic in row.items():
      summary[f'{cell}/{key}'] = statistic.mean
      if statistic.num_seeds > 1:
        summary[f'{cell}/{key}/spread'] = statistic.spread
  for cell, value in best.items():
    is_number = results_lib.is_number(value)
    summary[f'{cell}/{record.tune}'] = float(value) if is_number else value
  return {
    key: value if isinstance(value, str) or math.isfinite(value) else str(value)
    for key, value in summary.items()
  }


def _draw_curves(axes, field, cells, values) -> None:
  """Draws a curve over the field for each setting of the other fields."""
  curves: dict[str, list[tuple[float, results_lib.Statistic]]] = {}
  for cell in cells:
    rest = [f'{p.split(".")[-1]}={v}' for p, v in cell.point if p != field]
    label = ', '.join([cell.row] * bool(cell.row) + rest)
    x = float(dict(cell.point)[field])
    curves.setdefault(label, []).append((x, values[cell.name]))
  for label, points in curves.items():
    points.sort(key=lambda point: point[0])
    axes.errorbar(
      [x for x, _ in points],
      [y.mean for _, y in points],
      [_length(y) for _, y in points],
      marker='.',
      capsize=3,
      label=label,
    )
  axes.set_xlabel(field)
  numbers = sorted({x for points in curves.values() for x, _ in points})
  if numbers and numbers[0] > 0 and numbers[-1] >= 4 * numbers[0]:
    axes.set_xscale('log', base=2)
  axes.set_xticks(numbers, [f'{x:g}' for x in numbers])
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  if len(curves) > 1:
    axes.legend(fontsize=8)


def _draw_cells(axes, cells, values) -> None:
  """Draws a point per cell, the first at the top."""
  places = range(len(cells))
  axes.errorbar(
    [values[cell.name].mean for cell in cells],
    places,
    xerr=[_length(values[cell.name]) for cell in cells],
    fmt='o',
    capsize=3,
  )
  axes.set_yticks(places, [cell.name for cell in cells])
  axes.margins(y=0.5 / max(len(cells), 1))
  axes.invert_yaxis()
  axes.grid(axis='x', alpha=0.4)


def _length(statistic: results_lib.Statistic) -> float:
  """Returns the length of an error bar, to either side."""
  return statistic.spread if math.isfinite(statistic.spread) else 0.0


def _number_field(cells: Sequence[cells_lib.Cell]) -> str | None:
  """Returns the first field of the grid with two or more numbers."""
  fields = cells[0].point if cells else ()
  for i, (path, _) in enumerate(fields):
    values = {cell.point[i][1] for cell in cells}
    if len(values) > 1 and all(map(results_lib.is_number, values)):
      return path
  return None
