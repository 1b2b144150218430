"""Levels in a chain of constant width, each updated half as often as the last.

Command:
  python launch/sweep.py --config=experiments/ablations/levels.py \
    --workdir=runs/levels --seeds=1 \
    --results=experiments/results/ablations/levels

Hardware: two CPU cores, a minute or two for each of the 5 runs.
Results: experiments/results/ablations/README.md.

One level is a Transformer's MLP. Both levels of the last row update at every
step: its difference from `levels_2` is the effect of clocks alone.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import errors
from nested_learning import training

_MOST = 4


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment; `arg` is the number of levels, 2 by default."""
  choices = [str(n) for n in range(1, _MOST + 1)]
  if arg is not None and arg not in choices:
    raise errors.UserError(f'{arg!r} must be one of {", ".join(choices)}.')
  return small.make_config('levels', num_levels=int(arg or 2))


def get_sweep() -> sweeps.Sweep:
  """Returns the rows: one to four levels, and two on one clock."""
  return sweeps.Sweep(
    rows=(
      *(sweeps.Row(f'levels_{n}', arg=str(n)) for n in range(1, _MOST + 1)),
      sweeps.Row('levels_2_one_clock', ('model.levels.1.train_every=none',)),
    ),
    metrics=small.METRICS,
  )
