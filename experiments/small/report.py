"""The page of the small suite, from the sweeps of its tasks."""

from collections.abc import Mapping, Sequence
import csv
import io
import json
import math
import pathlib
import re
import statistics
from typing import Any, NamedTuple

from matplotlib import figure as mpl_figure

from experiments import report_files
from experiments.small import suite
from launch import provenance
from launch import sweeps
from nested_learning import files
from nested_learning import markdown

PAGE = 'README.md'
_EMPTY = '–'
_HEADS = {
  'accuracy': 'answers right',
  'macro_accuracy': 'answers right, mean over ids',
  'all_right': 'rows all right',
  'string_match': 'values written',
  'squared_error': 'squared error',
}
_INTRO = """\
Small models of the zoo on generated tasks. On a task, all have the same rows,
steps, optimiser and number of parameters within 3 per cent. Every learning rate
of one grid is tried with seed 0, and the one with the best score at the length
of training gets all seeds; the page of each task has all rates. Shares are in
per cent, mean over seeds ± the sample standard deviation; "2x" is on rows twice
as long as in training. A model below the bound of a task at the length of
training is **not trained**: it has not learned the task in these steps, and
counts in no comparison."""
_SCALE = (
  'The last column is printed in the paper ({where}). **Another scale**: its '
  'models and runs are different, and far larger where it gives a size, so the '
  'numbers cannot be compared.'
)


class Model(NamedTuple):
  """The runs of a family on a task, at its best learning rate.

  Attributes:
    rate: The learning rate, as typed.
    runs: Numbers of summary.json by seed.
    curves: Evaluations during training by seed.
    sources: Where the runs were made.
  """

  rate: str
  runs: Mapping[int, Mapping[str, Any]]
  curves: Mapping[int, Sequence[Mapping[str, float]]]
  sources: Sequence[Mapping[str, str]]

  def values(self, key: str) -> list[float]:
    """Returns a number by seed; text stands for those that are not finite."""
    found = [run[key] for _, run in sorted(self.runs.items()) if key in run]
    return [float(value) for value in found]

  def has_learned(self, task: suite.Task) -> bool:
    """Returns whether its mean score at the length of training is enough."""
    return task.is_learned(statistics.fmean(self.values(task.score)))


class Verdict(NamedTuple):
  """The result of a gate: a word, and the values by seed."""

  word: str
  values: Sequence[float]

  @property
  def failed(self) -> bool:
    """Whether the command has to fail."""
    return self.word == 'failed'


Models = Mapping[str, Mapping[str, Model]]  # by task and family


def read(folder: pathlib.Path) -> Models:
  """Reads the models whose best rate is known, from the folders of tasks."""
  found = {}
  for name in suite.TASKS:
    if (folder / name / 'runs.json').is_file():
      models = _read_task(folder / name)
      if models:
        found[name] = models
  return found


def write(folder: pathlib.Path) -> dict[suite.Gate, Verdict]:
  """Writes README.md, its plots and summary.json.

  summary.json has the mean of each column as 'task/family/key', with '/spread'
  added for the standard deviation; 'task/family/learned'; and of each gate its
  word as 'gate/task/family/key', with '/seed_0' added for the values.

  Args:
    folder: Folder of the page, with a folder for the sweep of each task.

  Returns:
    The verdicts of the gates.
  """
  models = read(folder)
  verdicts = check_gates(models)
  for name in models:
    image = io.BytesIO()
    _draw(name, models[name]).savefig(image, dpi=110)
    files.write_whole(folder / f'{name}.png', image.getvalue())
  summary = report_files.finite(_summarize(models, verdicts))
  text = json.dumps(summary, indent=2) + '\n'
  files.write_whole(folder / PAGE, _make_page(models, verdicts))
  files.write_whole(folder / 'summary.json', text)
  return verdicts


def check_gates(models: Models) -> dict[suite.Gate, Verdict]:
  """Returns the verdicts on models that were measured."""
  verdicts = {}
  for gate in suite.GATES:
    model = models.get(gate.task, {}).get(gate.family)
    if model is None:
      continue
    values = model.values(gate.key)
    passed = gate.passed(values)
    word = {True: 'passed', False: 'failed', None: 'not measured'}[passed]
    learned = model.has_learned(suite.TASKS[gate.task])
    if math.isfinite(gate.below) and not learned:
      word = 'not trained'
    verdicts[gate] = Verdict(word, values)
  return verdicts


def _read_task(folder: pathlib.Path) -> dict[str, Model]:
  read_text = lambda name: (folder / name).read_text(encoding='utf-8')
  summary = json.loads(read_text('summary.json'))
  # Of the runs in runs.json, those with earlier settings are not in the table.
  shown = {
    f'{row["cell"]}/seed_{row["seed"]}'
    for row in csv.DictReader(io.StringIO(read_text('results.csv')))
  }
  kept = json.loads(read_text('runs.json'))['runs']
  models = {}
  for family in suite.FAMILIES:
    best = summary.get(f'{family}/{suite.FIELD}')
    runs, curves, sources, rate = {}, {}, [], ''
    for name, entry in kept.items():
      match = re.fullmatch(rf'{family},\w+=([^/]+)/seed_(\d+)', name)
      if match is None or best is None or name not in shown:
        continue
      if float(match[1]) != best:
        continue
      rate, seed = match[1], int(match[2])
      runs[seed] = entry['summary']
      curves[seed] = entry.get('evaluations', [])
      sources += entry['source']
    if runs:
      models[family] = Model(rate, runs, curves, sources)
  return models


def _summarize(models: Models, verdicts) -> dict[str, Any]:
  summary = {}
  for name, by_family in models.items():
    task = suite.TASKS[name]
    paper = suite.PRINTED.get(name)
    for family, model in by_family.items():
      place = f'{name}/{family}'
      for key in (*task.columns, 'train_seconds'):
        values = model.values(key)
        if values:
          summary[f'{place}/{key}'] = statistics.fmean(values)
        if len(values) > 1:
          summary[f'{place}/{key}/spread'] = statistics.stdev(values)
      summary[f'{place}/learned'] = model.has_learned(task)
      if paper and family in paper.values:
        summary[f'{place}/printed'] = paper.values[family]
  for gate, verdict in verdicts.items():
    place = f'gate/{gate.task}/{gate.family}/{gate.key}'
    summary[place] = verdict.word
    for seed, value in enumerate(verdict.values):
      summary[f'{place}/seed_{seed}'] = value
  return summary


def _make_page(models: Models, verdicts) -> str:
  """Returns the page in Markdown."""
  sections = ['# Small models on small tasks', _INTRO]
  if verdicts:
    sections += ['## Gates', _gates(verdicts)]
  for name, by_family in models.items():
    sections += _task(name, by_family)
  sources = [
    {key: value for key, value in source.items() if key != 'command'}
    for by_family in models.values()
    for model in by_family.values()
    for source in model.sources
  ]
  command = {'command': '`python experiments/bench_small.py`'}
  sections += [report_files.MADE, provenance.listed(sources, command)]
  return '\n\n'.join(sections) + '\n'


def _gates(verdicts: Mapping[suite.Gate, Verdict]) -> str:
  """Returns a table with one row per gate."""
  rows = []
  for gate, verdict in verdicts.items():
    if math.isfinite(gate.below):
      bound = f'below {100 * gate.below:g} %'
    else:
      bound = f'at least {100 * gate.at_least:g} %'
    values = ', '.join(f'{100 * value:.1f}' for value in verdict.values)
    word = f'**{verdict.word}**' if verdict.failed else verdict.word
    about = f'{_head(gate.key)}: {bound}'
    rows.append((gate.task, gate.family, about, values or _EMPTY, word))
  return markdown.table(
    ('task', 'model', 'gate', 'measured, by seed', ''), rows
  )


def _task(name: str, models: Mapping[str, Model]) -> list[str]:
  """Returns the sections of a task."""
  task, paper = suite.TASKS[name], suite.PRINTED.get(name)
  rows = []
  for family, model in models.items():
    row = [family, '' if model.has_learned(task) else '**not trained**']
    row += [_text(model.values(key), key) for key in task.columns]
    sizes = model.values('num_parameters')
    row += [f'{sizes[0]:,.0f}' if sizes else _EMPTY, model.rate]
    row += [_text(model.values('train_seconds'), 'seconds')]
    row += [str(len(model.runs))]
    row += [paper.values.get(family, _EMPTY)] if paper else []
    rows.append(row)
  heads = ['model', '', *map(_head, task.columns)]
  heads += ['parameters', 'rate', 'seconds', 'seeds']
  heads += ['printed'] if paper else []
  bound = (
    f'{task.learned:g}' if task.best == 'min' else (f'{100 * task.learned:g} %')
  )
  return [
    f'## {name}',
    f'{task.about} {task.num_steps} steps; learned: {_head(task.score)} '
    f'{"at most" if task.best == "min" else "at least"} {bound}. '
    f'[All rates]({name}/README.md).',
    markdown.table(heads, rows),
    *_outcomes(task, models),
    *([_SCALE.format(where=paper.where)] if paper else []),
    f'![Score by length of the rows, and by step]({name}.png)',
  ]


def _outcomes(task: suite.Task, models: Mapping[str, Model]) -> list[str]:
  """Returns sentences on the best score of models that learned the task."""
  learned = {x: m for x, m in models.items() if m.has_learned(task)}
  if len(learned) < 2:
    return ['Fewer than two models have learned the task: no comparison.']
  keys = dict.fromkeys(_by_length(task).values())
  return [
    sweeps.outcome(
      _head(key), task.best, {x: m.values(key) for x, m in learned.items()}
    )
    for key in keys
    if all(model.values(key) for model in learned.values())
  ]


def _by_length(task: suite.Task) -> dict[int, str]:
  """Returns the score's key for each factor of the length."""
  return {1: task.score} | {n: f'{task.score}_{n}x' for n in task.longer}


def _draw(name: str, models: Mapping[str, Model]) -> mpl_figure.Figure:
  """Draws the score by length and, during training, by step."""
  task = suite.TASKS[name]
  figure = mpl_figure.Figure(figsize=(9, 4), layout='constrained')
  by_length, by_step = figure.subplots(1, 2, sharey=True)
  for family, model in models.items():
    lengths = {n: model.values(key) for n, key in _by_length(task).items()}
    lengths = {n: values for n, values in lengths.items() if values}
    by_length.errorbar(
      list(lengths),
      [statistics.fmean(values) for values in lengths.values()],
      [_spread(values) for values in lengths.values()],
      marker='.',
      capsize=3,
      label=family,
    )
    points: dict[int, list[float]] = {}
    for curve in model.curves.values():
      for line in curve:
        if f'validation/{task.score}' in line:
          value = float(line[f'validation/{task.score}'])
          points.setdefault(line['step'], []).append(value)
    by_step.plot(
      sorted(points),
      [statistics.fmean(points[x]) for x in sorted(points)],
      '.-',
    )
  by_length.set_xlabel('length, over that in training')
  by_length.set_ylabel(_head(task.score))
  by_length.legend(fontsize=8)
  by_step.set_xlabel('step, at the length of training')
  return figure


def _spread(values: Sequence[float]) -> float:
  return statistics.stdev(values) if len(values) > 1 else 0.0


def _head(key: str) -> str:
  """Returns a key of a run's summary.json in words."""
  base, factor = re.fullmatch(r'(.*?)(?:_(\d+x))?', key).groups()
  return ', '.join(filter(None, [_HEADS[base], factor]))


def _text(values: Sequence[float], key: str) -> str:
  """Formats a mean with its spread; shares are in per cent."""
  if not values:
    return _EMPTY
  is_share = 'error' not in key and key != 'seconds'
  factor, form = (100, '.1f') if is_share else (1, '.3g')
  numbers = [statistics.fmean(values)]
  numbers += [statistics.stdev(values)] if len(values) > 1 else []
  return ' ± '.join(format(factor * number, form) for number in numbers)
