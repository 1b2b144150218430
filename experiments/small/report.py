"""The results of the small suite: a page, its plots and summary.json."""

import collections
from collections.abc import Collection, Mapping, Sequence
import io
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from experiments.small import suite
from launch import provenance
from launch import sweeps
from launch.sweeps import record as record_lib
from launch.sweeps import report as sweep_report
from launch.sweeps import results as results_lib
from nested_learning import files
from nested_learning import markdown

PAGE = 'README.md'
_LENGTH = 'length, over that in training'
_EMPTY = '–'
_HEADS = {
  'accuracy': 'answers right',
  'macro_accuracy': 'answers right, mean over ids',
  'all_right': 'rows all right',
  'string_match': 'values written',
  'squared_error': 'squared error',
}
_INTRO = """\
Small models of the zoo on generated tasks. `experiments/small/suite.py` lists
the runs, and `model_config` of `experiments/tasks.py` defines the models.
Shares are in per cent. A number is the mean over the finished seeds, ± the
standard deviation of a sample; with one seed, small differences mean nothing.
"2x" is on rows twice as long as in training."""
_SCALE = (
  'The last column is printed in the paper ({where}). **Another scale**: its '
  'models and runs are different, and far larger where it gives a size, so the '
  'numbers cannot be compared.'
)


class Verdict(NamedTuple):
  """The result of a gate.

  Attributes:
    passed: None if nothing was measured.
    values: One per seed.
  """

  passed: bool | None
  values: tuple[float, ...]

  @property
  def word(self) -> str:
    """'passed', 'failed' or 'not measured'."""
    return {True: 'passed', False: 'failed', None: 'not measured'}[self.passed]


class Report(NamedTuple):
  """The written page and the results of its gates.

  Attributes:
    page: The file.
    gates: From each gate of the selected runs to its verdict.
  """

  page: pathlib.Path
  gates: Mapping[suite.Gate, Verdict]


def write(
  record: sweeps.Record,
  workdir: pathlib.Path,
  folder: pathlib.Path,
  *,
  runs: Collection[str],
) -> Report:
  """Writes README.md, its plots and summary.json.

  summary.json has the mean over seeds of a task's first column under
  'family.task', and of the others under 'family.task.key'; with more than one
  seed, standard deviations under the same keys with '.spread' added.
  'gate.family.task.key' is 'passed', 'failed' or 'not measured'.

  Args:
    record: The selected cells.
    workdir: Folder of their runs.
    folder: Folder of the page.
    runs: Names of the selected runs.

  Returns:
    The page and its gates.
  """
  results = [r for r in results_lib.read(record, workdir) if r.name in runs]
  keys = {key for task in suite.TASKS.values() for key in _keys(task)}
  of_cell = results_lib.summarize(results, sorted(keys))
  table = {cell.row: of_cell[cell.name] for cell in record.cells}
  verdicts = _check_gates(record, results)
  images = {}
  for name in dict.fromkeys(row.split('.')[1] for row in table):
    image = _draw(name, table)
    if image is not None:
      images[name] = f'{name}.png'
      files.write_whole(folder / images[name], image)
  text = _make_page(
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
  """Returns the columns of a task, and the first one at every length."""
  return list(dict.fromkeys([*task.columns, *_by_length(task).values()]))


def _by_length(task: suite.Task) -> dict[int, str]:
  """Returns the plotted key for each factor of the length."""
  base, _ = split_key(task.columns[0])
  return {1: base} | {factor: f'{base}_{factor}x' for factor in task.longer}


def _check_gates(record, results) -> dict[suite.Gate, Verdict]:
  """Returns the verdicts of the gates of the selected runs."""
  names = {cell.row: cell.name for cell in record.cells}
  verdicts = {}
  for gate in suite.GATES:
    row = f'{gate.family}.{gate.task}'
    if row not in names:
      continue
    found = [r for r in results if r.cell == names[row]]
    values = [results_lib.number(result, gate.key) for result in found]
    values = [value for value in values if value is not None]
    verdicts[gate] = Verdict(gate.passed(values), tuple(values))
  return verdicts


def _draw(name: str, table) -> bytes | None:
  """Plots a task, by length if it has several; None without runs."""
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
  label = _head(by_length[1])
  sweep_report.make_figure(label, cells, values).savefig(image, dpi=110)
  return image.getvalue()


def _summarize(
  record: sweeps.Record,
  results: Sequence[results_lib.Result],
  table: Mapping[str, Mapping[str, results_lib.Statistic]],
  verdicts: Mapping[suite.Gate, Verdict],
) -> dict[str, Any]:
  """Returns flat numbers; those that are not finite become strings."""
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


def _make_page(
  record: sweeps.Record,
  results: Sequence[results_lib.Result],
  *,
  workdir: pathlib.Path,
  table: Mapping[str, Mapping[str, results_lib.Statistic]],
  verdicts: Mapping[suite.Gate, Verdict],
  images: Mapping[str, str],
) -> str:
  """Returns the page in Markdown.

  Args:
    record: The cells.
    results: The results of the runs.
    workdir: Folder of the runs.
    table: From 'family.task' and key to the statistic.
    verdicts: The results of the gates.
    images: From tasks to the names of their plots.
  """
  sections = ['# Small models on small tasks', _INTRO]
  sections.append(_provenance(results, workdir))
  if verdicts:
    sections += ['## Gates', _gates(verdicts)]
  for name in dict.fromkeys(row.split('.')[1] for row in table):
    sections += _task(name, record, results, table)
    if name in images:
      sections.append(f'![{name}]({images[name]})')
  failed = [result for result in results if result.status == 'failed']
  if failed:
    lines = [f'- {result.name}: {result.error}' for result in failed]
    sections += ['## Failed', '\n'.join(lines)]
  return '\n\n'.join([*sections, '## Settings', _settings(record)]) + '\n'


def split_key(key: str) -> tuple[str, str]:
  """Splits 'all_right_8x' into 'all_right' and '8x', which may be empty."""
  match = re.fullmatch(r'(.*?)(?:_(\d+x))?', key)
  return match[1], match[2] or ''


def _head(key: str) -> str:
  """Returns a key of a run's summary.json in words."""
  base, factor = split_key(key)
  return ', '.join(filter(None, [_HEADS[base], factor]))


def _provenance(results, workdir) -> str:
  """Returns a list of code, machine and date."""
  finished = [result for result in results if result.status == 'finished']
  seconds = sum(results_lib.number(r, 'seconds') or 0.0 for r in finished)
  seeds = collections.Counter(result.cell for result in results).values()
  sources, more = sweep_report.read_sources(finished, workdir)
  more |= {
    'runs': f'{len(finished)} of {len(results)} finished',
    'seeds': ' to '.join(map(str, sorted({min(seeds), max(seeds)}))),
    'minutes, the sum over the runs': f'{seconds / 60:.0f}',
  }
  return provenance.listed(sources, more)


def _gates(verdicts: Mapping[suite.Gate, Verdict]) -> str:
  """Returns a table with one row per gate."""
  rows = []
  for gate, verdict in verdicts.items():
    if math.isfinite(gate.below):
      bound = f'below {100 * gate.below:g} %'
    else:
      bound = f'at least {100 * gate.at_least:g} %'
    values = ', '.join(f'{100 * value:.1f}' for value in verdict.values)
    word = verdict.word if verdict.passed else f'**{verdict.word}**'
    task = gate.task, gate.family, f'{_head(gate.key)}: {bound}'
    rows.append((*task, values or _EMPTY, word))
  return markdown.table(
    ('task', 'model', 'gate', 'measured, by seed', ''), rows
  )


def _task(name, record, results, table) -> list[str]:
  """Returns the sections of a task without its plot."""
  task, paper = suite.TASKS[name], suite.PRINTED.get(name)
  rows = []
  for cell in record.cells:
    family, _, of_task = cell.row.partition('.')
    if of_task != name:
      continue
    runs = [result for result in results if result.cell == cell.name]
    sizes = [results_lib.number(run, 'num_parameters') for run in runs]
    sizes = [f'{size:,.0f}' for size in sizes if size is not None]
    row = [family]
    row += [_text(table[cell.row].get(key), key) for key in task.columns]
    row += [sizes[0] if sizes else _EMPTY, _seeds(runs)]
    row += [paper.values.get(family, _EMPTY)] if paper else []
    rows.append(row)
  heads = ['model', *map(_head, task.columns), 'parameters', 'seeds']
  heads += ['printed'] if paper else []
  sections = [f'## {name}', task.about, markdown.table(heads, rows)]
  if paper:
    sections.append(_SCALE.format(where=paper.where))
  return sections


def _seeds(runs: Sequence[results_lib.Result]) -> str:
  statuses = [run.status for run in runs]
  text = f'{statuses.count("finished")} of {len(statuses)}'
  if 'failed' in statuses:
    text += f', **{statuses.count("failed")} failed**'
  return text


def _text(statistic: results_lib.Statistic | None, key: str) -> str:
  """Formats a mean with its spread; shares are in per cent."""
  if statistic is None:
    return _EMPTY
  is_share = split_key(key)[0] != 'squared_error'
  factor, digits = (100, '.1f') if is_share else (1, '.3g')
  text = format(factor * statistic.mean, digits)
  if math.isfinite(statistic.spread):
    text += f' ± {format(factor * statistic.spread, digits)}'
  return text


def _settings(record: sweeps.Record) -> str:
  """Returns a table of the flags of `launch/run.py` for each run."""
  rows = []
  for cell in record.cells:
    spec = f'experiments/{pathlib.Path(cell.spec).name}'
    changes = ' '.join(cell.assignments)
    rows.append((f'`{spec}`', f'`{changes}`'))
  return markdown.table(('--config', '--set'), rows)
