"""Recall by the number of levels and by the clock of the slowest.

This is Figure 7 of the paper at a small scale. The chain has four levels, and
facts and streams are those of `facts.py`. A learner is trained once for every
number of levels. It then reads with several clocks of its slowest level, the
others spread evenly (in the logarithm) between that and the fastest, and with
several multiples of their learning rates.

Command:
  python launch/run.py --config=experiments/continual/frequencies.py \
    --workdir=runs/frequencies

Hardware: one CPU core, fifteen minutes.
Results: experiments/results/continual/README.md.
"""

import dataclasses
import math
import pathlib

import numpy as np

from experiments import report_files
from experiments.continual import facts
from experiments.continual import reading
from nested_learning import errors
from nested_learning import levels
from nested_learning import models

_MOST_LEVELS = 4


@dataclasses.dataclass(frozen=True)
class FrequenciesConfig:
  """Numbers of levels, clocks and rates to compare."""

  stream: facts.StreamConfig = facts.StreamConfig()
  learner: reading.LearnerConfig = reading.LearnerConfig(
    mlp_dim=64, connection='nested', batch_size=4, learning_rate=6e-3
  )
  # Clocks are set below.
  inner: levels.InnerConfig = levels.make_inner((None,) * _MOST_LEVELS)
  fastest: int = 16  # tokens
  slowest: tuple[int, ...] = (128, 256, 1024)  # tokens; the paper: 512, 2K, 8K
  trained_at: int = 256  # clock of the slowest level in training
  num_levels: tuple[int, ...] = (0, 1, 2, 3, 4)
  rates: tuple[float, ...] = (0.3, 1.0)  # times the learning rates of training
  train_plant: int = 512  # tokens, as in `facts.py`
  train_gap: int = 1536
  gaps: tuple[int, ...] = (1024, 16_384)
  num_streams: int = 16


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
      slowest=(32,),
      trained_at=32,
      num_levels=(0, 2),
      rates=(1.0,),
      train_plant=small.train_plant,
      train_gap=small.train_gap,
      gaps=(64,),
      num_streams=2,
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
    A clock for each level of the chain, fastest first; None is at rest.

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
  rest = (None,) * (_MOST_LEVELS - num_levels)
  return (*sizes[:num_levels], *rest)


def run(config: FrequenciesConfig, workdir: str, mode: str) -> None:
  """Trains with every number of levels, reads with every clock and rate."""
  report_files.check_mode(mode)
  if max(config.num_levels) > _MOST_LEVELS:
    raise errors.UserError(
      f'num_levels={config.num_levels} must be at most {_MOST_LEVELS}, the '
      'number of levels of the chain.'
    )
  names = [f'level_{i}' for i in range(_MOST_LEVELS)]
  model = models.make_model(
    reading.make_config(config.learner, config.stream.vocab_size, names)
  )
  asked = facts.AskConfig(config.stream, config.gaps, config.num_streams)
  scores, metrics = {}, []
  for number in config.num_levels:
    inner = _inner(config, number, config.trained_at, 1.0)
    params, losses = reading.train(
      model,
      inner,
      lambda rng: facts.make_row(
        config.stream,
        rng,
        plant=config.train_plant,
        gap=config.train_gap,
        multiple_of=config.trained_at,
      ),
      config.learner,
      name=f'{number} levels',
    )
    metrics += [
      {'levels': number, 'step': i, 'loss': float(x)}
      for i, x in enumerate(losses)
    ]
    settings = [(s, r) for s in config.slowest for r in config.rates]
    for slowest, rate in settings if number else settings[:1]:
      inner = _inner(config, number, slowest, rate)
      found = facts.recall(
        asked,
        model,
        inner,
        params,
        segment_size=slowest if number == 1 else config.fastest,
        name=f'{number} levels, slowest {slowest}, rate {rate}',
      )
      scores[number, slowest, rate] = found
      if not number:  # without levels there is no clock and no rate
        scores.update({(0, *setting): found for setting in settings})
  _write(config, workdir, scores, metrics)


def _inner(config, number, slowest, rate):
  sizes = update_every(number, config.fastest, slowest)
  learning = tuple(
    dataclasses.replace(
      level, update_every=size, learning_rate=rate * level.learning_rate
    )
    for level, size in zip(config.inner.levels, sizes, strict=True)
  )
  return dataclasses.replace(config.inner, levels=learning)


def _write(config, workdir, scores, metrics):
  chance = 1 / config.stream.num_values
  summary, rows = {'chance': chance}, []
  for (number, slowest, rate), found in sorted(scores.items()):
    rows.append((number, slowest, rate, *map(reading.mean_and_spread, found.T)))
    for gap, score in zip(config.gaps, found.T, strict=True):
      key = f'levels_{number}_slowest_{slowest}_rate_{rate:g}_after_{gap}'
      summary[key] = float(np.mean(score))
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
    pathlib.Path(workdir) / 'frequencies.png',
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
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=[
      '# Levels and their clocks',
      f'Share of {config.stream.num_facts} facts recalled, mean and spread '
      f'over {config.num_streams} streams; a guess gives {chance:.3f}. '
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
  )
