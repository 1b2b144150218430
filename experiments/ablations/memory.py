"""Networks of a memory: a matrix, or a two-layer MLP of several widths.

Command:
  python launch/sweep.py --config=experiments/ablations/memory.py \
    --workdir=runs/memory --seeds=1 \
    --results=experiments/results/ablations/memory

Hardware: two CPU cores, a minute or two for each of the 6 runs.
Results: experiments/results/ablations/README.md.

The paper has a residual MLP of two maps (equation 91) and gives no width.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """Returns the experiment."""
  return small.make_config('memory')


def get_sweep() -> sweeps.Sweep:
  """Returns the sweep over the matrix and the MLP's widths."""
  return sweeps.Sweep(
    rows=(
      sweeps.Row('matrix', ('model.mixer.kind=matrix',)),
      sweeps.Row('mlp_8', ('model.mixer.hidden_dim=8',)),
      sweeps.Row('mlp_16', ('model.mixer.hidden_dim=16',)),
      sweeps.Row('mlp_32'),  # the default, head_dim
      sweeps.Row('mlp_64', ('model.mixer.hidden_dim=64',)),
      sweeps.Row('mlp_128', ('model.mixer.hidden_dim=128',)),
    ),
    metrics=small.METRICS,
  )
