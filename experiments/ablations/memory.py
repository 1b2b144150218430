"""What a memory is: a matrix, or an MLP of two maps and its hidden width.

Command:
  python launch/sweep.py --config=experiments/ablations/memory.py \
    --workdir=runs/memory --seeds=3

Hardware: two CPU cores, a few minutes for each of the 18 runs.
Result: not run to its end yet.

A matrix is one map deep. The MLP has the hidden width of its head's 32 where
nothing is said, as the paper does.
"""

from experiments.ablations import small
from nested_learning import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('memory')


def get_sweep() -> sweeps.Sweep:
  """The matrix, and the MLP by hidden width."""
  return sweeps.Sweep(
    rows=(
      sweeps.Row('matrix', ('model.mixer.kind=matrix',)),
      *(
        sweeps.Row(f'mlp_{n}', (f'model.mixer.hidden_dim={n}',))
        for n in (8, 16, 32, 64, 128)
      ),
    ),
    metrics=small.METRICS,
  )
