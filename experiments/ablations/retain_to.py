"""Decay of a memory to its learned initial memory, or to zero.

Command:
  python launch/sweep.py --config=experiments/ablations/retain_to.py \
    --workdir=runs/retain_to --seeds=3

Hardware: two CPU cores, a minute for each of the 6 runs.
Results: experiments/results/ablations/README.md.

Read literally, the paper's retention decays to zero, which erases the learned
initial memory.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """Returns the experiment."""
  return small.make_config('retain_to')


def get_sweep() -> sweeps.Sweep:
  """Returns the sweep over both limits."""
  return sweeps.Sweep(
    grid=('model.mixer.retain_to=initial,zero',),
    metrics=small.METRICS,
  )
