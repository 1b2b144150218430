"""Reads of the memory after a query's own token, or at its chunk's start.

Command:
  python launch/sweep.py --config=experiments/ablations/read.py \
    --workdir=runs/read --seeds=3

Hardware: two CPU cores, a minute for each of the 18 runs.
Results: experiments/results/ablations/README.md.

The paper reads at the chunk's start (equation 90), which hides the tokens of
the current chunk.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """Returns the experiment."""
  return small.make_config('read')


def get_sweep() -> sweeps.Sweep:
  """Returns the sweep over both reads and chunk sizes."""
  return sweeps.Sweep(
    grid=(
      'model.mixer.read=token,chunk',
      'model.mixer.chunk_size=4,16,64',
    ),
    metrics=small.METRICS,
  )
