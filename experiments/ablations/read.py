"""What a query reads: the memory as of its own token, or of its chunk's start.

Command:
  python launch/sweep.py --config=experiments/ablations/read.py \
    --workdir=runs/read --seeds=3

Hardware: two CPU cores, a few minutes for each of the 18 runs.
Result: not run to its end yet.

The paper prints the second (equation 90), which does not see the last tokens;
how many depends on the chunk.
"""

from experiments.ablations import small
from nested_learning import sweeps
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
