"""What a memory is: a matrix, or an MLP of two maps and its hidden width.

Command:
  python launch/sweep.py --config=experiments/ablations/memory.py \
    --workdir=runs/memory --seeds=1 \
    --results=experiments/results/ablations/memory

Hardware: two CPU cores, a minute or two for each of the 6 runs.
Result: experiments/results/ablations/memory/README.md. Bits per byte, one seed:
matrix 2.880, hidden width 8 2.911, 16 2.862, 32 (as wide as a head, the
default) 2.815, 64 2.776, 128 2.753: above 8, wider is better. The tokens per
second on that page were taken beside other work.

A matrix is one map deep. The paper writes a residual MLP of two maps (equation
91) and says no width.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('memory')


def get_sweep() -> sweeps.Sweep:
  """The matrix, and the MLP by hidden width."""
  return sweeps.Sweep(
    rows=(
      sweeps.Row('matrix', ('model.mixer.kind=matrix',)),
      sweeps.Row('mlp_8', ('model.mixer.hidden_dim=8',)),
      sweeps.Row('mlp_16', ('model.mixer.hidden_dim=16',)),
      sweeps.Row('mlp_32'),  # as wide as a head, where nothing is said
      sweeps.Row('mlp_64', ('model.mixer.hidden_dim=64',)),
      sweeps.Row('mlp_128', ('model.mixer.hidden_dim=128',)),
    ),
    metrics=small.METRICS,
  )
