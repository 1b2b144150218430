"""Trains a task with every optimiser: a search of rates, then more seeds.

A training is a cell: one optimiser, rate and seed. All rates of the grid are
tried with seed 0. While the best one is at an end of those tried, the next one
beyond it is tried as well, for all optimisers alike. Then the best rate gets
the other seeds.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import statistics
import time
from typing import Any, NamedTuple

from experiments import cells as cells_lib
from experiments import report_files
from experiments.benchmarks import timing

_MOST_RATES = 8  # of an optimiser, those beyond the grid included
_CLOCK = 'AdamW'  # its training time is the equal time of all


class Training(NamedTuple):
  """A task that optimisers are compared on.

  Attributes:
    name: Name of the task.
    title: Heading of its section.
    description: Data, sizes and schedule, in a sentence or two.
    score: Value that is compared; lower is better.
    columns: Further values for the table, with their headings.
    num_steps: Steps of a training.
    per_entry: Steps of which an entry of `losses` is the mean.
    settings: `settings(optimizer)` is everything that a cell depends on, beside
      rate and seed.
    train: `train(optimizer, rate, seed)` returns the values of a cell: `losses`
      [entry], `seconds`, the score and the columns.
    time: `time(optimizer)` returns the numbers of `time_in_turn`, and
      `state_bytes` per parameter.
  """

  name: str
  title: str
  description: str
  score: str
  columns: Mapping[str, str]
  num_steps: int
  per_entry: int
  settings: Callable[[str], Mapping[str, Any]]
  train: Callable[[str, float, int], Mapping[str, Any]]
  time: Callable[[str], Mapping[str, Any]]


class Search(NamedTuple):
  """Optimisers, rates and seeds that every task is measured with.

  Attributes:
    names: Optimisers, the most informative ones first.
    rates: The grid, evenly in the logarithm; see `next_rate`.
    num_seeds: Trainings at the best rate.
  """

  names: Sequence[str]
  rates: Sequence[float]
  num_seeds: int


class Result(NamedTuple):
  """The trainings of one optimiser.

  Attributes:
    optimizer: Its name.
    searched: Score by rate, with seed 0; infinite after a divergence.
    rate: The best rate.
    cells: Cells of that rate, one per seed.
    time: The cell with its time; None if that is not finished.
  """

  optimizer: str
  searched: Mapping[float, float]
  rate: float
  cells: Sequence[cells_lib.Cell]
  time: cells_lib.Cell | None

  def values(self, key: str) -> list[float]:
    """Returns a number of every seed."""
    return [cells_lib.number(cell, key) for cell in self.cells]


def measure(training: Training, search: Search, store: cells_lib.Store) -> None:
  """Measures every cell that is not finished, one optimiser after the other.

  Args:
    training: The task.
    search: Optimisers, rates and seeds.
    store: The folders of cells.
  """
  for name in search.names:
    settings = dict(training.settings(name))

    def train(rate, seed, name=name, settings=settings):
      return cells_lib.measure(
        store,
        training.name,
        _cell_name(name, rate, seed),
        settings | {'rate': rate, 'seed': seed},
        lambda: training.train(name, rate, seed),
      )

    cells_lib.measure(
      store,
      training.name,
      _time_name(name),
      settings,
      lambda name=name: training.time(name),
    )
    scores = {}
    while (rate := next_rate(search, scores)) is not None:
      scores[rate] = cells_lib.number(train(rate, 0), training.score)
    found = min(scores, key=scores.get)
    if math.isfinite(scores[found]):
      for seed in range(1, search.num_seeds):
        train(found, seed)


def next_rate(search: Search, scores: Mapping[float, float]) -> float | None:
  """Returns the next rate to try with seed 0; None if the search is over.

  Args:
    search: Optimisers, rates and seeds.
    scores: Score by rate that was tried; infinite after a divergence.
  """
  for rate in search.rates:
    if rate not in scores:
      return rate
  tried = sorted(scores)
  if len(search.rates) < 2 or len(tried) >= _MOST_RATES:
    return None
  factor = search.rates[1] / search.rates[0]
  best = min(tried, key=scores.get)  # the lowest rate if all diverged
  if best == tried[0]:
    beyond = best / factor
  elif best == tried[-1]:
    beyond = best * factor
  else:
    return None
  return float(f'{beyond:g}')


def summarize(
  training: Training, search: Search, store: cells_lib.Store
) -> dict[str, Result]:
  """Returns the finished trainings by optimiser, the best mean first.

  Args:
    training: The task.
    search: Optimisers, rates and seeds.
    store: The folders of cells.
  """
  finished = cells_lib.read(store, training.name)
  results = []
  for name in search.names:
    settings = training.settings(name)
    ours = {
      key: cell
      for key, cell in finished.items()
      if key.startswith(f'{report_files.key(name)},')
      and cells_lib.agrees(cell, settings)
    }
    searched = {
      cell.settings['rate']: cells_lib.number(cell, training.score)
      for cell in ours.values()
      if cell.settings.get('seed') == 0
    }
    if not searched:
      continue
    rate = min(searched, key=searched.get)
    names = [_cell_name(name, rate, i) for i in range(search.num_seeds)]
    cells = [ours[key] for key in names if key in ours]
    time_cell = ours.get(_time_name(name))
    results.append(Result(name, searched, rate, cells, time_cell))
  results.sort(key=lambda result: _mean(result.values(training.score)))
  return {result.optimizer: result for result in results}


def loss_at(cell: cells_lib.Cell, share: float) -> float:
  """Returns the training loss before a share of the steps, over 1/12 of them.

  Args:
    cell: A training.
    share: Share of the steps that were taken by then, at most 1.
  """
  losses = cell.values['losses']
  width = max(1, len(losses) // 12)
  end = max(width, math.floor(share * len(losses)))
  window = [
    math.inf if loss is None else loss for loss in losses[end - width : end]
  ]
  return _mean(window)


def losses_in_time(result: Result) -> tuple[list[float], list[float]] | None:
  """Returns losses by seed at the end, and when AdamW has ended.

  An optimiser whose step takes 1.25 times that of AdamW has taken 0.8 of its
  steps by then. AdamW itself has taken all, whatever its measured ratio, which
  shows the noise of the times.

  Args:
    result: Trainings of one optimiser.

  Returns:
    Both lists; None without the time of a step.
  """
  if result.time is None:
    return None
  share = min(1.0, 1 / result.time.values['over_adamw'])
  if result.optimizer == _CLOCK:
    share = 1.0
  return (
    [loss_at(cell, 1.0) for cell in result.cells],
    [loss_at(cell, share) for cell in result.cells],
  )


def count(
  search: Search, results: Mapping[str, Result]
) -> tuple[int, int, list[str]]:
  """Counts the cells of a task.

  Args:
    search: Optimisers, rates and seeds.
    results: From `summarize`.

  Returns:
    How many are finished, how many there are, and the optimisers that lack
    some.
  """
  finished, total, lacking = 0, 0, []
  for name in search.names:
    found, missing = 0, len(search.rates) + search.num_seeds
    if name in results:
      searched, rate, cells, time_cell = results[name][1:]
      # No other seeds are trained at a rate that diverges.
      more = len(cells) if math.isfinite(searched[rate]) else search.num_seeds
      found = len(searched) + more - 1 + (time_cell is not None)
      missing = search.num_seeds - more + (time_cell is None)
      missing += sum(rate not in searched for rate in search.rates)
      missing += not missing and next_rate(search, searched) is not None
    finished += found
    total += found + missing
    if missing:
      lacking.append(name)
  return finished, total, lacking


def show(values: Sequence[float]) -> str:
  """Returns the mean of some numbers and, if there are several, the spread."""
  if not all(map(math.isfinite, values)):
    return 'diverged'
  mean = _mean(values)
  if len(values) < 2:
    return f'{mean:.4g}'
  spread = statistics.stdev(values)
  # Two digits of the spread, and no more than four of the mean.
  digits = min(
    2 - _magnitude(spread) if spread else 4,
    4 - _magnitude(mean) if mean else 4,
  )
  return f'{mean:.{max(digits, 0)}f} ± {spread:.{max(digits, 0)}f}'


def time_in_turn(
  adamw: Callable[[], Any],
  other: Callable[[], Any],
  *,
  num_steps: int,
  num_rounds: int,
) -> dict[str, float]:
  """Times a program and that of AdamW in turn.

  The time is that of the processor, summed over its cores, which other work on
  the machine hardly changes.

  Args:
    adamw: Takes `num_steps` steps with AdamW; returns arrays.
    other: Takes as many with another optimiser.
    num_steps: Steps of a call.
    num_rounds: Calls of each; the fastest one counts.

  Returns:
    `step_seconds` of the other, and `over_adamw`.
  """
  seconds = timing.fastest(
    {'adamw': (adamw,), 'other': (other,)}, num_rounds, time.process_time
  )
  return {
    'step_seconds': seconds['other'] / num_steps,
    'over_adamw': seconds['other'] / seconds['adamw'],
  }


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values) if values else math.inf


def _magnitude(value: float) -> int:
  """Returns the number of digits before the point; 0.012 has -1."""
  return 1 + math.floor(math.log10(abs(value)))


def _cell_name(optimizer: str, rate: float, seed: int) -> str:
  return f'{report_files.key(optimizer)},rate={rate:g},seed={seed}'


def _time_name(optimizer: str) -> str:
  return f'{report_files.key(optimizer)},time'
