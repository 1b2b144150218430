"""Tokens between two anchors of the memories, from 4 to a whole row.

Command:
  python launch/sweep.py --config=experiments/ablations/chunk_size.py \
    --workdir=runs/chunk_size --seeds=3

Hardware: two CPU cores, a few minutes for each of the 24 runs.
Result: not run to its end yet.

The main memory's chunks times those of the others (keys, values, rates). The
paper's token recurrence is 1, and it prints no chunk size for any of its runs.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('chunk_size')


def get_sweep() -> sweeps.Sweep:
  """Chunks of the main memory by chunks of the others."""
  return sweeps.Sweep(
    grid=(
      'model.mixer.chunk_size=4,16,64,256',
      'model.mixer.chunk_size_others=16,64',
    ),
    metrics=small.METRICS,
  )
