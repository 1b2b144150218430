"""The section of a stream on the page of results."""

import functools
import pathlib
from typing import NamedTuple

from matplotlib import figure as mpl_figure
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.optimizers import rules
from experiments.optimizers import streams
from experiments.optimizers import trainings

_NUMBERS = {
  'online': 'loss before steps',
  'final': 'loss of all tasks at the end',
  'forgotten': 'forgotten',
}
# A learner with a slow momentum, and the same without.
_PAIRS = {
  'M3 slow every 4': 'M3 no slow momentum',
  'M3': 'M3 no slow momentum',
  'M3 slow every 64': 'M3 no slow momentum',
  'AdEMAMix': 'AdamW',
}


class _Measured(NamedTuple):
  """Numbers by seed, each at the rate that is best for it."""

  online: list[float]
  final: list[float]
  forgotten: list[float] | None  # at the best rate of `final`


def make_task(
  stream: streams.Stream, rates: tuple[float, ...], num_seeds: int
) -> cells_lib.Task:
  """Makes a part of the comparison from a stream.

  Args:
    stream: The tasks in sequence.
    rates: Learning rates.
    num_seeds: Seeds of parameters and data.
  """
  return cells_lib.Task(
    stream.name,
    functools.partial(
      streams.measure, stream, rates=rates, num_seeds=num_seeds
    ),
    functools.partial(_report, stream),
  )


def _report(stream, store, folder) -> cells_lib.Report:
  """Reports on any cells that are finished; draws their plot."""
  finished = cells_lib.read(store, stream.name)
  cells = {
    (order, name): finished[key]
    for order in streams.orders(stream)
    for name in rules.STREAM_NAMES
    if (key := streams.cell_name(order, name)) in finished
    and cells_lib.agrees(finished[key], stream.settings)
  }
  measured = {key: _best(cell) for key, cell in cells.items()}
  total = len(streams.orders(stream)) * len(rules.STREAM_NAMES)
  sections = [f'## {stream.title}', stream.description]
  if len(measured) < total:
    sections.append(f'**{len(measured)} of {total} cells are finished.**')
  if not measured:
    return cells_lib.Report(sections, {})
  plot = f'{stream.name}.png'
  _plot(folder / plot, stream, cells)
  orders = ', '.join(
    f'{order} ({block} step{"s" if block > 1 else ""} of a task at a time)'
    for order, block in streams.orders(stream).items()
  )
  rates = next(iter(cells.values())).settings['rates']
  sections += [
    f'The same batches in three orders: {orders}. Each number at the best of '
    f'the constant rates {", ".join(f"{rate:g}" for rate in rates)} for it; '
    'forgotten is the mean rise of the loss of a task since its last block, at '
    'the rate with the lowest loss at the end.',
    report_files.table(*_table(stream, measured)),
    f'![Loss before steps and loss at the end, by rate]({plot})',
    'A point of the plot is a rate, the mean over seeds. A learner is better '
    'if its points lie lower and further to the left.',
    'With a slow momentum against without, and the mean change over seeds. A '
    'change below twice its standard deviation over seeds is no difference; '
    'both learners have the same initial parameters and batches.',
    report_files.table(*_verdicts(stream, measured)),
    _conclude(measured),
  ]
  numbers = {
    f'{streams.cell_name(order, name)}_{key}': float(np.mean(values))
    for (order, name), found in measured.items()
    for key, values in found._asdict().items()
    if values is not None
  }
  return cells_lib.Report(sections, numbers)


def _best(cell: cells_lib.Cell) -> _Measured:
  """Returns the numbers of a cell at the best rates."""
  values = {
    key: np.array(value, float)  # [rate, seed]; None becomes NaN
    for key, value in cell.values.items()
  }
  best = {
    key: rules.best(values[key].mean(axis=1)) for key in ('online', 'final')
  }
  forgotten = values.get('forgotten')
  return _Measured(
    online=list(values['online'][best['online']]),
    final=list(values['final'][best['final']]),
    forgotten=None if forgotten is None else list(forgotten[best['final']]),
  )


def _columns(stream) -> list[tuple[str, str]]:
  """Returns the order and the number of each column."""
  return [
    (order, key)
    for order, block in streams.orders(stream).items()
    for key in _NUMBERS
    if key != 'forgotten' or block > 1
  ]


def _table(stream, measured):
  columns = _columns(stream)
  head = ('learner', *(f'{order}: {_NUMBERS[key]}' for order, key in columns))
  rows = [
    (
      name,
      *(
        trainings.show(getattr(measured[order, name], key))
        if (order, name) in measured
        else '–'
        for order, key in columns
      ),
    )
    for name in rules.STREAM_NAMES
  ]
  return head, rows


def _verdicts(stream, measured):
  """Returns a table: what a slow momentum changes, in words."""
  columns = [column for column in _columns(stream) if column[1] != 'forgotten']
  head = ('', *(f'{order}: {_NUMBERS[key]}' for order, key in columns))
  rows = []
  for name, base in _PAIRS.items():
    row = [f'{name} against {base}']
    for order, key in columns:
      word, change = _compare(measured, order, key, name, base)
      row.append(word if change is None else f'{word} ({change:+.3f})')
    rows.append(row)
  return head, rows


def _compare(measured, order, key, name, base):
  """Returns a word, and the mean change; None if it is not known.

  Seeds are compared one by one: both learners begin with the same parameters
  and get the same batches.
  """
  if (order, name) not in measured or (order, base) not in measured:
    return '–', None
  ours, theirs = (
    np.array(getattr(measured[order, learner], key)) for learner in (name, base)
  )
  changes = ours - theirs
  change = np.mean(changes)
  if len(changes) < 2 or abs(change) < 2 * np.std(changes, ddof=1):
    return 'no different', change
  return 'better' if change < 0 else 'worse', change


def _conclude(measured) -> str:
  """Returns how often a slow momentum helps, by order."""
  sentences = []
  for order in dict.fromkeys(order for order, _ in measured):
    words = [
      _compare(measured, order, key, name, base)[0]
      for name, base in _PAIRS.items()
      for key in ('online', 'final')
    ]
    known = [word for word in words if word != '–']
    counts = ', '.join(
      f'{word} in {known.count(word)}'
      for word in ('better', 'worse', 'no different')
    )
    sentences.append(f'{order}: {counts} of {len(known)} comparisons.')
  return ' '.join(sentences)


def _plot(path: pathlib.Path, stream, cells) -> None:
  """Draws what is learned against what is left of it, a point per rate."""
  orders = list(streams.orders(stream))
  figure = mpl_figure.Figure(
    figsize=(3.6 * len(orders) + 1.5, 3.8), layout='constrained'
  )
  panels = figure.subplots(1, len(orders))
  for axes, order in zip(panels, orders, strict=True):
    for name in rules.STREAM_NAMES:
      if (order, name) in cells:
        values = cells[order, name].values
        online, final = (
          np.mean(np.array(values[key], float), axis=1)
          for key in ('online', 'final')
        )
        style = rules.style(name)
        axes.plot(online, final, marker='.', label=name, **style)
    lowest = axes.dataLim.y0
    axes.set(title=order, yscale='log')
    axes.set_ylim(0.9 * lowest, min(30 * lowest, 1.1 * axes.dataLim.y1))
    axes.set_xlabel(_NUMBERS['online'])
  panels[0].set_ylabel(_NUMBERS['final'])
  panels[-1].legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  report_files.save_figure(figure, path)
