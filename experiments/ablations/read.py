"""Reads of the memory after a query's own token, or at its chunk's start.

Command:
  python launch/sweep.py --config=experiments/ablations/read.py \
    --workdir=runs/read --seeds=3

Hardware: two CPU cores, a minute for each of the 18 runs.
Result, one seed, 200 steps of text (experiments/results/ablations/read). Read
after the query's token, writes save 0.37 to 0.46 bits of a byte late in a row
for every chunk (2.809, 2.809 and 2.815 bits per byte in chunks of 4, 16 and
64). Read at the chunk's start, they save 0.12, 0.03 and 0.004 bits (2.848,
2.885 and 2.893 bits per byte).

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
