"""What the suite ends in: a page, its plots and one flat file of numbers."""

from collections.abc import Collection, Mapping, Sequence
import io
import json
import math
import pathlib
from typing import Any, NamedTuple

from experiments.small import gates as gates_lib
from experiments.small import page
from experiments.small import suite
from launch import sweeps
from launch.sweeps import record as record_lib
from launch.sweeps import report as sweep_report
from launch.sweeps import results as results_lib
from nested_learning import files

PAGE = 'README.md'
_LENGTH = 'length, over that in training'


class Report(NamedTuple):
  """What was written.

  Attributes:
    page: The file.
    gates: From each gate of the tasks and families that ran to its verdict.
  """

  page: pathlib.Path
  gates: Mapping[gates_lib.Gate, page.Verdict]


def write(
  record: sweeps.Record,
  workdir: pathlib.Path,
  folder: pathlib.Path,
  *,
  runs: Collection[str],
) -> Report:
  """Writes README.md, its plots and summary.json.

  summary.json has the mean over the seeds of a task's first column as
  'family.task' and of every other as 'family.task.key'; with more than one
  seed, their standard deviation with '.spread' behind. 'gate.family.task.key'
  is 'passed', 'failed' or 'not measured'.

  Args:
    record: The cells that were asked for.
    workdir: Where their runs are.
    folder: Where to write.
    runs: Names of those that were asked for.

  Returns:
    Where the page is, and the gates.
  """
  results = [r for r in results_lib.read(record, workdir) if r.name in runs]
  keys = {key for task in suite.TASKS.values() for key in _keys(task)}
  of_cell = results_lib.summarize(results, sorted(keys))
  table = {cell.row: of_cell[cell.name] for cell in record.cells}
  verdicts = _judge(record, results)
  images = {}
  for name in dict.fromkeys(row.split('.')[1] for row in table):
    image = _draw(name, table)
    if image is not None:
      images[name] = f'{name}.png'
      files.write_whole(folder / images[name], image)
  text = page.make(
    record,
    results,
    workdir=workdir,
    table=table,
    verdicts=verdicts,
    images=images,
  )
  summary = _summarize(record, results, table, verdicts)
  content = json.dumps(summary, indent=2) + '\n'
  files.write_whole(folder / record_lib.SUMMARY, content)
  files.write_whole(folder / PAGE, text)
  return Report(folder / PAGE, verdicts)


def _keys(task: suite.Task) -> list[str]:
  """Of a run's summary.json: the columns, and the first at every length."""
  return list(dict.fromkeys([*task.columns, *_by_length(task).values()]))


def _by_length(task: suite.Task) -> dict[int, str]:
  """From factors of the length to the key of what is plotted."""
  base, _ = page.split_key(task.columns[0])
  return {1: base} | {factor: f'{base}_{factor}x' for factor in task.longer}


def _judge(record, results) -> dict[gates_lib.Gate, page.Verdict]:
  """The gates of the runs that were asked for."""
  names = {cell.row: cell.name for cell in record.cells}
  verdicts = {}
  for gate in gates_lib.GATES:
    row = f'{gate.family}.{gate.task}'
    if row not in names:
      continue
    found = [r for r in results if r.cell == names[row]]
    values = [results_lib.number(result, gate.key) for result in found]
    values = [value for value in values if value is not None]
    verdicts[gate] = page.Verdict(gate.judge(values), tuple(values))
  return verdicts


def _draw(name: str, table) -> bytes | None:
  """The plot of a task, by length where it has several; None without runs."""
  task = suite.TASKS[name]
  by_length = _by_length(task)
  cells, values = [], {}
  for row, statistics in table.items():
    family, _, of_task = row.partition('.')
    for factor, key in by_length.items():
      if of_task != name or key not in statistics:
        continue
      place = ((_LENGTH, str(factor)),) if task.longer else ()
      label = f'{family} {factor}x' if task.longer else family
      cells.append(sweeps.Cell(label, '', (), row=family, point=place))
      values[label] = statistics[key]
  if not cells:
    return None
  image = io.BytesIO()
  label = page.head(by_length[1])
  sweep_report.make_figure(label, cells, values).savefig(image, dpi=110)
  return image.getvalue()


def _summarize(
  record: sweeps.Record,
  results: Sequence[results_lib.Result],
  table: Mapping[str, Mapping[str, results_lib.Statistic]],
  verdicts: Mapping[gates_lib.Gate, page.Verdict],
) -> dict[str, Any]:
  """Flat keys; what is not finite is a string, which JSON has."""
  count = lambda status: sum(r.status == status for r in results)
  summary = {
    'seeds': record.num_seeds,
    'runs': len(results),
    'finished': count('finished'),
    'failed': count('failed'),
  }
  for row, statistics in table.items():
    columns = suite.TASKS[row.split('.')[1]].columns
    for key in columns:
      if key not in statistics:
        continue
      name = row if key == columns[0] else f'{row}.{key}'
      summary[name] = statistics[key].mean
      if statistics[key].num_seeds > 1:
        summary[f'{name}.spread'] = statistics[key].spread
  for gate, verdict in verdicts.items():
    name = f'gate.{gate.family}.{gate.task}.{gate.key}'
    summary[name] = verdict.word
  return {
    name: str(value)
    if isinstance(value, float) and not math.isfinite(value)
    else value
    for name, value in summary.items()
  }
