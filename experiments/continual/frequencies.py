"""Recall by the number of levels and by the clock of the slowest.

This is Figure 7 of the paper at a small scale, on the facts and streams of
`facts.py`. The MLPs of a chain are together as wide for every number of levels,
and the chain of two levels is that of `facts.py`. With every seed a learner is
trained for every number of levels. It then reads with several clocks of its
slowest level, the others spread evenly (in the logarithm) between that and the
fastest, and with several multiples of their learning rates.

Command:
  python launch/run.py --config=experiments/continual/frequencies.py \
    --workdir=runs/frequencies

The same command goes on where it was stopped, and
--set=results=experiments/results/frequencies also takes finished cells from
that folder and writes page and cells there.

Hardware: one CPU core.
Results: experiments/results/frequencies/README.md.
"""

import dataclasses
import functools
import itertools
import math
import pathlib

import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.continual import facts
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels
from nested_learning import models

_TASK = 'frequencies'
# Levels of chains, fastest first.
_NAMES = (*facts.LEVELS, 'slower', 'slowest')


@dataclasses.dataclass(frozen=True)
class FrequenciesConfig:
  """Numbers of levels, clocks and rates to compare."""

  stream: facts.StreamConfig = facts.StreamConfig()
  learner: reading.LearnerConfig = facts.FactsConfig().learner
  width: int = 256  # of the MLPs of all levels together
  fastest: int = 16  # tokens
  slowest: tuple[int, ...] = (128, 256, 1024)  # tokens; the paper: 512, 2K, 8K
  trained_at: int = 256  # clock of the slowest level in training
  num_levels: tuple[int, ...] = (0, 1, 2, 3, 4)
  rates: tuple[float, ...] = (0.3, 1.0)  # times the learning rates of training
  train_tellings: int = 8  # as in `facts.py`
  train_gap: int = 1536
  gaps: tuple[int, ...] = (1024, 16_384)
  num_streams: int = 16
  num_seeds: int = 3  # of training
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None


def get_config(arg: str | None = None) -> FrequenciesConfig:
  """Returns the config; 'full' asks after 2^17 tokens, 'small' is for tests."""
  config = FrequenciesConfig()
  if arg is None:
    return config
  if arg == 'full':
    return dataclasses.replace(
      config, gaps=(*config.gaps, 2**15, 2**17), rates=(0.1, 0.3, 1.0, 3.0)
    )
  if arg == 'small':
    small = facts.get_config('small')
    return dataclasses.replace(
      config,
      stream=small.stream,
      learner=small.learner,
      width=32,
      slowest=(32,),
      trained_at=32,
      num_levels=(0, 2),
      rates=(1.0,),
      train_tellings=small.train_tellings,
      train_gap=small.train_gap,
      gaps=(64,),
      num_streams=2,
      num_seeds=1,
    )
  raise errors.UserError(f"{arg!r} must be 'full' or 'small', or nothing.")


def update_every(
  num_levels: int, fastest: int, slowest: int
) -> tuple[int | None, ...]:
  """Returns clocks that are evenly spaced in the logarithm.

  Args:
    num_levels: Number of levels that learn; one level has the slowest clock.
    fastest: Clock of the fastest level, in tokens.
    slowest: Clock of the slowest level: `fastest` times a power of two.

  Returns:
    A clock for each level of the chain, fastest first; one that is None, at
    rest, if no level learns.

  Raises:
    errors.UserError: `slowest` is not `fastest` times a power of two.
  """
  ratio = slowest // fastest
  if slowest % fastest or ratio & (ratio - 1):
    raise errors.UserError(
      f'slowest={slowest} is no power of two times fastest={fastest}; change '
      'one.'
    )
  sizes = [slowest]
  if num_levels > 1:
    steps = np.arange(num_levels) / (num_levels - 1)
    sizes = [fastest * 2 ** round(x * math.log2(ratio)) for x in steps]
  return tuple(sizes[:num_levels]) or (None,)


def make_learner(
  config: FrequenciesConfig, num_levels: int, slowest: int, rate: float
) -> tuple[models.Model, levels.InnerConfig]:
  """Makes the model for a number of levels, and the config of their steps.

  Args:
    config: The experiment.
    num_levels: Number of levels that learn.
    slowest: Clock of the slowest, in tokens.
    rate: Multiple of their learning rates.

  Returns:
    The model and the config.
  """
  clocks = update_every(num_levels, config.fastest, slowest)
  learner = dataclasses.replace(
    config.learner, mlp_dim=config.width // len(clocks)
  )
  names = _NAMES[: len(clocks)]
  made = reading.make_config(learner, config.stream.vocab_size, names)
  inner = levels.make_inner(clocks, learning_rate=rate)
  return models.make_model(made), inner


def run(config: FrequenciesConfig, workdir: str, mode: str) -> None:
  """Trains with every number of levels, reads with every clock and rate."""
  report_files.check_mode(mode)
  if max(config.num_levels) > len(_NAMES):
    raise errors.UserError(
      f'num_levels={config.num_levels} must be at most {len(_NAMES)}, the '
      'number of levels of the chain.'
    )
  store = cells_lib.open_store(pathlib.Path(workdir), config.results)
  scores = {}
  for seed in range(config.num_seeds):
    for number in config.num_levels:
      for setting, found in _measure(config, store, number, seed).items():
        scores.setdefault(setting, []).append(np.mean(found, axis=0))
  # [seed, gap] by number of levels, clock and rate.
  _write(config, store, {key: np.stack(x) for key, x in scores.items()})


def _measure(config, store, number, seed):
  """Returns recall [stream, gap] by number of levels, clock and rate."""
  settings = dataclasses.asdict(config)
  for name in ('num_seeds', 'results', 'slowest', 'rates', 'num_levels'):
    del settings[name]
  model, _ = make_learner(config, number, config.trained_at, 1.0)
  settings['model'] = dataclasses.asdict(model.config)
  asked = facts.AskConfig(config.stream, config.gaps, config.num_streams)

  @functools.cache
  def train():
    model, inner = make_learner(config, number, config.trained_at, 1.0)
    make_row = functools.partial(
      facts.make_row,
      config.stream,
      tellings=config.train_tellings,
      gap=config.train_gap,
      multiple_of=config.trained_at if number == 1 else config.fastest,
    )
    params, _ = reading.train(
      model,
      inner,
      make_row,
      config.learner,
      seed=seed,
      name=f'{number} levels, seed {seed}',
      file=store.workdir / 'parts' / f'levels_{number}_{seed}.npz',
    )
    return params

  def recall(slowest, rate, name):
    model, inner = make_learner(config, number, slowest, rate)
    found = facts.recall(
      asked,
      model,
      inner,
      train(),
      segment_size=slowest if number == 1 else config.fastest,
      name=name,
    )
    return {'recall': found}

  found = {}
  for slowest, rate in itertools.product(config.slowest, config.rates):
    # Without levels there is no clock and no rate.
    name = f'slowest {slowest}, rate {rate:g}, ' if number else ''
    name = f'{number} levels, {name}seed {seed}'
    cell = cells_lib.measure(
      store,
      _TASK,
      name,
      settings,
      functools.partial(recall, slowest, rate, name),
    )
    found[number, slowest, rate] = np.asarray(cell.values['recall'], float)
  return found


def _write(config, store, scores):
  chance = 1 / config.stream.num_values
  summary, rows = {'chance': chance}, []
  for (number, slowest, rate), found in sorted(scores.items()):
    rows.append(
      (number, slowest, rate, *map(report_files.mean_and_spread, found.T))
    )
    for gap, score in zip(config.gaps, found.T, strict=True):
      key = f'levels_{number}_slowest_{slowest}_rate_{rate:g}_after_{gap}'
      summary |= report_files.summarize(key, score)
  last = {key: float(np.mean(found[:, -1])) for key, found in scores.items()}
  best = max(last, key=last.get)
  summary['best_levels'], summary['best_slowest'], summary['best_rate'] = best
  # Range of the result over one setting, averaged over the others.
  sensitivity = []
  for axis, name in enumerate(('levels', 'slowest', 'rate')):
    groups = {}
    for key, score in last.items():
      if key[0]:  # with no level there is no clock and no rate
        groups.setdefault(key[:axis] + key[axis + 1 :], []).append(score)
    moved = float(np.mean([max(x) - min(x) for x in groups.values()]))
    summary[f'sensitivity_{name}'] = moved
    sensitivity.append((name, moved))
  reading.plot_lines(
    store.workdir / 'frequencies.png',
    config.num_levels,
    {
      f'slowest every {slowest}, rate x {rate:g}': np.stack(
        [scores[n, slowest, rate][:, -1] for n in config.num_levels], axis=1
      )
      for slowest in config.slowest
      for rate in config.rates
    },
    xlabel='levels that learn',
    ylabel=f'facts recalled after {config.gaps[-1]:,} tokens',
    log_x=False,
    floor=chance,
  )
  cells_lib.write_page(
    store,
    _TASK,
    config,
    module=__name__,
    summary=summary,
    sections=[
      '# Levels and their clocks',
      f'Share of {config.stream.num_facts} facts recalled over '
      f'{config.num_streams} streams, mean and spread over {config.num_seeds} '
      f'trainings; a guess gives {chance:.3f}. '
      f'Trained with the slowest level stepping every {config.trained_at} '
      'tokens.',
      report_files.table(
        (
          'levels',
          'slowest',
          'rate',
          *(f'after {gap:,} tokens' for gap in config.gaps),
        ),
        rows,
      ),
      '![Recall by the number of levels](frequencies.png)',
      'Sensitivity of recall after the longest gap: best minus worst over one '
      'setting, averaged over the others:',
      report_files.table(('setting', 'moves'), sensitivity),
    ],
    plots=['frequencies.png'],
  )
