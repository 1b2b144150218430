"""What a sweep ends in: a page, tables and plots of its finished runs."""

from collections.abc import Mapping, Sequence
import csv
import difflib
import io
import json
import math
import pathlib
import re

from launch.sweeps import page
from launch.sweeps import plots
from launch.sweeps import record as record_lib
from launch.sweeps import results as results_lib
from nested_learning import files

PAGE = 'README.md'
_CSV = 'results.csv'


def collect(
  record: record_lib.Record,
  workdir: pathlib.Path,
  folder: pathlib.Path | None = None,
) -> list[str]:
  """Writes what the finished runs of a sweep gave.

  README.md has the table and the plots; results.csv a line for each run;
  summary.json the mean of each metric of a cell as `cell/metric` and, with more
  than one seed, the standard deviation as `cell/metric/spread`.

  Args:
    record: The sweep.
    workdir: Its folder.
    folder: For what is written; None is the workdir.

  Returns:
    A line for each metric that is asked for and that no run has.
  """
  folder = workdir if folder is None else folder
  results = results_lib.read(record, workdir)
  wanted = results_lib.metrics(record, results)
  known = sorted({key for result in results for key in result.values})
  metrics = {key: best for key, best in wanted.items() if key in known}
  table = results_lib.summarize(results, tuple(metrics))
  images = {}
  for key in metrics:
    images[key] = re.sub(r'[^A-Za-z0-9._-]+', '_', key) + '.png'
    values = {cell: row[key] for cell, row in table.items() if key in row}
    image = io.BytesIO()
    plots.make_figure(key, record.cells, values).savefig(image, dpi=110)
    files.write_whole(folder / images[key], image.getvalue())
  text = page.make(record, results, metrics=metrics, table=table, images=images)
  summary = json.dumps(_summary(results, table), indent=2) + '\n'
  for name, content in (
    (_CSV, _make_csv(record, results)),
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


def _make_csv(
  record: record_lib.Record, results: Sequence[results_lib.Result]
) -> str:
  """One line for each run: its place, and all that its summary has."""
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
  results: Sequence[results_lib.Result],
  table: Mapping[str, Mapping[str, results_lib.Statistic]],
) -> dict[str, float | int | str]:
  """The table as flat keys; what is not finite is a string, which JSON has."""
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
  return {
    key: value if math.isfinite(value) else str(value)
    for key, value in summary.items()
  }
