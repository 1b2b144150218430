"""The section of a training on the page of results."""

from collections.abc import Mapping, Sequence
import functools
import math
import pathlib

from matplotlib import figure as mpl_figure
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.optimizers import rules
from experiments.optimizers import trainings
from launch import sweeps

_REFERENCE = 'Muon'  # M3 without its two parts
_PARTS = {
  'M3 no second moment': 'second moment',
  'M3 no slow momentum': 'slow momentum',
}


def make_task(
  training: trainings.Training, search: trainings.Search
) -> cells_lib.Task:
  """Makes a part of the comparison from a training.

  Args:
    training: The training.
    search: Optimisers, rates and seeds.
  """
  return cells_lib.Task(
    training.name,
    functools.partial(trainings.measure, training, search),
    functools.partial(_report, training, search),
  )


def _report(training, search, store, folder) -> cells_lib.Report:
  """Reports on any cells that are finished; draws their plot."""
  results = trainings.summarize(training, search, store)
  sections = [f'## {training.title}', training.description]
  finished, total, lacking = trainings.count(search, results)
  if lacking:
    sections.append(
      f'**{finished} of {total} cells are finished.** Cells are missing of '
      f'{", ".join(lacking)}.'
    )
  if not results:
    return cells_lib.Report(sections, {})
  plot = f'{training.name}.png'
  _plot(folder / plot, training, search, results)
  sections += [
    report_files.table(*_table(training, results)),
    f'![Losses by step and time, scores by rate]({plot})',
    sweeps.outcome(
      training.score.replace('_', ' '),
      'min',
      {name: r.values(training.score) for name, r in results.items()},
    ),
    _at_equal_time(results),
    _at_the_edge(search, results),
    *_parts(training, results),
  ]
  sections = list(filter(None, sections))
  return cells_lib.Report(sections, _numbers(training, results))


def _numbers(training, results) -> dict[str, float]:
  numbers = {}
  for name, result in results.items():
    scores, name = result.values(training.score), report_files.key(name)
    numbers[f'{name}_{training.score}'] = float(np.mean(scores))
    if len(scores) > 1:
      numbers[f'{name}_spread'] = float(np.std(scores, ddof=1))
    numbers[f'{name}_rate'] = result.rate
    numbers[f'{name}_seeds'] = len(scores)
  return numbers


def _table(training, results):
  head = (
    'optimiser',
    'best rate',
    training.score.replace('_', ' '),
    *training.columns.values(),
    'training loss',
    'at equal time',
    'step over AdamW',
    'bytes of state',
    'seeds',
  )
  rows = []
  for name, result in results.items():
    ends, cut, ratio, size = '–', '–', '–', '–'
    losses = trainings.losses_in_time(result)
    if losses is not None:
      ends, cut = map(trainings.show, losses)
      ratio = f'{result.time.values["over_adamw"]:.2f}'
      size = f'{result.time.values["state_bytes"]:.1f}'
    rows.append(
      (
        name,
        f'{result.rate:g}',
        trainings.show(result.values(training.score)),
        *(trainings.show(result.values(key)) for key in training.columns),
        ends,
        cut,
        ratio,
        size,
        len(result.cells),
      )
    )
  return head, rows


def _at_equal_time(results) -> str:
  """Returns the lowest training losses at equal steps and at equal time."""
  found = {
    name: losses
    for name, result in results.items()
    if (losses := trainings.losses_in_time(result)) is not None
  }
  if not found:
    return ''
  sentences = []
  for i, when in enumerate(('at equal steps', 'when AdamW has ended')):
    means = {name: np.mean(both[i]) for name, both in found.items()}
    best = min(means, key=means.get)
    # They lie orders of magnitude apart, and so do the spreads.
    logs = {
      name: [math.log(max(loss, np.finfo(float).tiny)) for loss in both[i]]
      for name, both in found.items()
    }
    equal = [
      name
      for name in logs
      if name != best and sweeps.differ(logs[best], logs[name]) is False
    ]
    but = f'; no different: {", ".join(equal)}' if equal else ''
    sentences.append(f'{best} has the lowest training loss {when}{but}.')
  return (
    f'{" ".join(sentences)} The losses are means over the last twelfth of the '
    'steps, and are compared in the logarithm. At equal time, an optimiser is '
    'cut off when AdamW has ended, before its rate has fallen as far. Times '
    'are those of the processor, with the gradient, measured in turn with '
    'those of AdamW; its own ratio to itself shows the noise.'
  )


def _at_the_edge(search, results) -> str:
  """Returns the optimisers whose best rate may lie beyond those tried."""
  names = [
    name
    for name, result in results.items()
    if trainings.next_rate(search, result.searched) is None
    and result.rate in (min(result.searched), max(result.searched))
  ]
  if not names:
    return ''
  return f'The best rate is at an end of those tried for {", ".join(names)}.'


def _parts(training, results) -> list[str]:
  """Returns a table of M3 with and without its parts, and what they do."""
  names = ('M3', *_PARTS, _REFERENCE)
  if not all(name in results for name in names):
    return []
  values = {name: results[name].values(training.score) for name in names}
  shown = {name: trainings.show(values[name]) for name in names}
  table = report_files.table(
    ('', 'slow momentum', 'no slow momentum'),
    [
      ('second moment', shown['M3'], shown['M3 no slow momentum']),
      ('no second moment', shown['M3 no second moment'], shown[_REFERENCE]),
    ],
  )
  against = _compare('M3', values['M3'], _REFERENCE, values[_REFERENCE])
  sentences = [against]
  for name, part in _PARTS.items():
    differ = sweeps.differ(values[name], values['M3'])
    if differ is None:
      sentences.append(f'The effect of its {part} is not known yet.')
    elif not differ:
      sentences.append(f'Its {part} makes no difference.')
    else:
      word = (
        'hurts' if np.mean(values[name]) < np.mean(values['M3']) else 'helps'
      )
      sentences.append(f'Its {part} {word}.')
  return ['### Parts of M3', table, ' '.join(sentences)]


def _compare(name, ours, other, theirs) -> str:
  differ = sweeps.differ(ours, theirs)
  if differ is None:
    return f'{name} and {other} cannot be compared yet, for lack of seeds.'
  if not differ:
    return f'{name} and {other} are no different.'
  word = 'better' if np.mean(ours) < np.mean(theirs) else 'worse'
  return f'{name} is {word} than {other}.'


def _plot(
  path: pathlib.Path,
  training: trainings.Training,
  search: trainings.Search,
  results: Mapping[str, trainings.Result],
) -> None:
  """Draws the loss by step and by time, and the score by rate."""
  figure = mpl_figure.Figure(figsize=(13, 4.2), layout='constrained')
  by_step, by_time, by_rate = figure.subplots(1, 3)
  tops = []
  for name in search.names:
    if name not in results:
      continue
    result, style = results[name], rules.style(name)
    curve = _mean_curve(result.cells)
    steps = training.per_entry * (0.5 + np.arange(len(curve)))
    by_step.plot(steps, curve, linewidth=1, **style)
    tops.append(curve[0])
    if result.time is not None:
      seconds = steps * result.time.values['over_adamw']
      by_time.plot(seconds, curve, linewidth=1, **style)
    rates = sorted(result.searched)
    scores = [result.searched[rate] for rate in rates]
    by_rate.plot(rates, scores, marker='.', label=name, linewidth=1, **style)
  for axes, label in (
    (by_step, 'step'),
    (by_time, 'time, in steps of AdamW'),
  ):
    axes.set(xlabel=label, ylabel='training loss', yscale='log')
    axes.set_ylim(top=1.2 * np.nanmax(tops))
  by_time.set_xlim(0, 3 * training.num_steps)
  by_rate.set(xlabel='learning rate', xscale='log', yscale='log')
  by_rate.set_ylabel(f'{training.score.replace("_", " ")}, seed 0')
  by_rate.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
  report_files.save_figure(figure, path)


def _mean_curve(cells: Sequence[cells_lib.Cell]) -> np.ndarray:
  """Returns the mean of the losses over seeds [entry]; NaN where one is."""
  return np.mean([np.array(c.values['losses'], float) for c in cells], axis=0)
