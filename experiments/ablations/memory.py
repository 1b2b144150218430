"""What a memory is: a matrix, or an MLP of two maps and its hidden width.

Command:
  python launch/sweep.py --config=experiments/ablations/memory.py \
    --workdir=runs/memory --seeds=3

Hardware: two CPU cores, a few minutes for each of the 18 runs.
Result: not run to its end yet.

A matrix is one map deep. The paper writes a residual MLP of two maps (equation
91) and says no width.
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
      sweeps.Row('mlp_8', ('model.mixer.hidden_dim=8',)),
      sweeps.Row('mlp_16', ('model.mixer.hidden_dim=16',)),
      sweeps.Row('mlp_32'),  # as wide as a head, where nothing is said
      sweeps.Row('mlp_64', ('model.mixer.hidden_dim=64',)),
      sweeps.Row('mlp_128', ('model.mixer.hidden_dim=128',)),
    ),
    metrics=small.METRICS,
  )
