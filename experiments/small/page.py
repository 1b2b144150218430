"""The page of the suite, in Markdown."""

import collections
from collections.abc import Mapping, Sequence
import math
import pathlib
import re
from typing import NamedTuple

from experiments import report_files
from experiments.small import gates as gates_lib
from experiments.small import printed
from experiments.small import provenance
from experiments.small import suite
from launch import sweeps
from launch.sweeps import results as results_lib

_EMPTY = '–'
_HEADS = {
  'accuracy': 'answers right',
  'macro_accuracy': 'answers right, mean over ids',
  'all_right': 'rows all right',
  'string_match': 'values written',
  'squared_error': 'squared error',
}
_INTRO = """\
Small models of the zoo on generated tasks; `experiments/small/suite.py` says
which, and `make_model` of `experiments/tasks.py` how small. Shares are in per
cent. A number is the mean over the seeds that finished, ± the standard
deviation of a sample; with one seed, small differences mean nothing. "2x" is on
rows twice as long as in training."""
_SCALE = (
  'The last column is what the paper prints ({where}). **Another scale**: its '
  'models and trainings are other ones, far larger where it says how large; '
  'the number stands there for orientation and is not one to compare with.'
)


class Verdict(NamedTuple):
  """How a gate came out.

  Attributes:
    passed: None where nothing was measured.
    values: One for each seed.
  """

  passed: bool | None
  values: tuple[float, ...]

  @property
  def word(self) -> str:
    """'passed', 'failed' or 'not measured'."""
    return {True: 'passed', False: 'failed', None: 'not measured'}[self.passed]


def make(
  record: sweeps.Record,
  results: Sequence[results_lib.Result],
  *,
  workdir: pathlib.Path,
  table: Mapping[str, Mapping[str, results_lib.Statistic]],
  verdicts: Mapping[gates_lib.Gate, Verdict],
  images: Mapping[str, str],
) -> str:
  """Returns the page.

  Args:
    record: The cells that were asked for.
    results: What each run left.
    workdir: Where the runs are.
    table: From 'family.task' and key to the statistic.
    verdicts: Of the gates.
    images: From tasks to the names of their plots.

  Returns:
    Markdown.
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
  """'all_right_8x' as 'all_right' and '8x'; the second may be empty."""
  match = re.fullmatch(r'(.*?)(?:_(\d+x))?', key)
  return match[1], match[2] or ''


def head(key: str) -> str:
  """A key of a run's summary.json in words."""
  base, factor = split_key(key)
  return ', '.join(filter(None, [_HEADS[base], factor]))


def _provenance(results, workdir) -> str:
  """Where, when and with which code the numbers were made."""
  finished = [result for result in results if result.status == 'finished']
  starts = [
    start
    for result in finished
    for start in provenance.read_starts(workdir / 'cells' / result.name)
  ]
  listed = lambda key: '; '.join(sorted({start[key] for start in starts}))
  devices = {
    f'{result.values.get("num_devices", 1)} x {result.values["device"]}'
    for result in finished
    if 'device' in result.values
  }
  seconds = sum(results_lib.number(r, 'seconds') or 0.0 for r in finished)
  seeds = collections.Counter(result.cell for result in results).values()
  rows = [
    ('command', listed('command') and f'`{listed("command")}`'),
    ('runs', f'{len(finished)} of {len(results)} finished'),
    ('seeds', ' to '.join(map(str, sorted({min(seeds), max(seeds)})))),
    ('commit', listed('commit')),
    ('machine', listed('machine')),
    ('devices of a run', '; '.join(sorted(devices))),
    ('date', listed('date')),
    ('software', listed('software')),
    ('minutes, the sum over the runs', f'{seconds / 60:.0f}'),
  ]
  return report_files.table(
    ('', ''), [(what, value or _EMPTY) for what, value in rows]
  )


def _gates(verdicts: Mapping[gates_lib.Gate, Verdict]) -> str:
  """One line for each gate."""
  rows = []
  for gate, verdict in verdicts.items():
    if math.isfinite(gate.below):
      bound = f'below {100 * gate.below:g} %'
    else:
      bound = f'at least {100 * gate.at_least:g} %'
    values = ', '.join(f'{100 * value:.1f}' for value in verdict.values)
    word = verdict.word if verdict.passed else f'**{verdict.word}**'
    task = gate.task, gate.family, f'{head(gate.key)}: {bound}'
    rows.append((*task, values or _EMPTY, word))
  return report_files.table(
    ('task', 'model', 'gate', 'measured, by seed', ''), rows
  )


def _task(name, record, results, table) -> list[str]:
  """The sections of a task, but for its plot."""
  task, paper = suite.TASKS[name], printed.PRINTED.get(name)
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
  heads = ['model', *map(head, task.columns), 'parameters', 'seeds']
  heads += ['printed'] if paper else []
  sections = [f'## {name}', task.about, report_files.table(heads, rows)]
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
  """A mean with its spread; shares in per cent."""
  if statistic is None:
    return _EMPTY
  is_share = split_key(key)[0] != 'squared_error'
  factor, digits = (100, '.1f') if is_share else (1, '.3g')
  text = format(factor * statistic.mean, digits)
  if math.isfinite(statistic.spread):
    text += f' ± {format(factor * statistic.spread, digits)}'
  return text


def _settings(record: sweeps.Record) -> str:
  """What each run was, for `launch/run.py --config --set`."""
  rows = []
  for cell in record.cells:
    spec = f'experiments/{pathlib.Path(cell.spec).name}'
    changes = ' '.join(cell.assignments)
    rows.append((f'`{spec}`', f'`{changes}`'))
  return report_files.table(('--config', '--set'), rows)
