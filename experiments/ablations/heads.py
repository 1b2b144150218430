"""Number of heads at constant width.

Command:
  python launch/sweep.py --config=experiments/ablations/heads.py \
    --workdir=runs/heads --seeds=3

Hardware: two CPU cores, a few minutes for each of the 12 runs.
Result: not finished yet.

A memory acts within its head. The state of a layer is proportional to
num_heads * head_dim**2: at constant width, more heads make a smaller state. The
paper's equations have one head, and it does not mention more.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """Returns the experiment."""
  return small.make_config('heads')


def get_sweep() -> sweeps.Sweep:
  """Returns the sweep over the number of heads."""
  return sweeps.Sweep(
    rows=tuple(
      sweeps.Row(
        f'heads_{n}',
        (f'model.mixer.num_heads={n}', f'model.mixer.head_dim={64 // n}'),
      )
      for n in (1, 2, 4, 8)
    ),
    metrics=small.METRICS,
  )
