"""What a query reads: the memory as of its own token, or of its chunk's start.

Command:
  python launch/sweep.py --config=experiments/ablations/read.py \
    --workdir=runs/read --seeds=3

Hardware: two CPU cores, a minute for each of the 18 runs.
Result, one seed, 200 steps of text (experiments/results/ablations/read): read
as of its own token a memory is worth 0.37 to 0.46 bits of a byte late in a row,
whatever the chunk (2.809, 2.809 and 2.815 bits per byte in chunks of 4, 16 and
64); read as of the chunk's start 0.12, 0.03 and 0.004 (2.848, 2.885, 2.893).

The paper prints the second (equation 90), which does not see the last tokens;
how many depends on the chunk.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('read')


def get_sweep() -> sweeps.Sweep:
  """Both reads, by chunk size."""
  return sweeps.Sweep(
    grid=(
      'model.mixer.read=token,chunk',
      'model.mixer.chunk_size=4,16,64',
    ),
    metrics=small.METRICS,
  )
