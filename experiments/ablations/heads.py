"""The same width in one head or in eight.

Command:
  python launch/sweep.py --config=experiments/ablations/heads.py \
    --workdir=runs/heads --seeds=3

Hardware: two CPU cores, a few minutes for each of the 12 runs.
Result: not run to its end yet.

A memory acts within its head: the state of a layer is in proportion to
num_heads * head_dim**2, so that more heads are a smaller state. The paper's
equations have one head, and it says nothing of more.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('heads')


def get_sweep() -> sweeps.Sweep:
  """Heads at constant width."""
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
