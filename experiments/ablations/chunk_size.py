"""Tokens between two anchors of the memories, from 4 to a whole row.

Command:
  python launch/sweep.py --config=experiments/ablations/chunk_size.py \
    --workdir=runs/chunk_size --seeds=3

Hardware: two CPU cores, a few minutes for each of the 24 runs.
Result: not finished yet.

Chunks of the main memory are crossed with those of the other memories (keys,
values, rates). The paper's token recurrence has chunks of 1; the paper gives no
chunk size for its runs.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """Returns the experiment."""
  return small.make_config('chunk_size')


def get_sweep() -> sweeps.Sweep:
  """Returns the sweep over both chunk sizes."""
  return sweeps.Sweep(
    grid=(
      'model.mixer.chunk_size=4,16,64,256',
      'model.mixer.chunk_size_others=16,64',
    ),
    metrics=small.METRICS,
  )
