"""Where Delta Gradient Descent erases, and on what objective.

Command:
  python launch/sweep.py --config=experiments/ablations/erase.py \
    --workdir=runs/erase --seeds=3

Hardware: two CPU cores, a few minutes for each of the 24 runs.
Result: not run to its end yet.

Erasing nowhere is plain gradient descent. In a matrix memory the map that reads
the key is the map that makes the output.
"""

from experiments.ablations import small
from nested_learning import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('erase')


def get_sweep() -> sweeps.Sweep:
  """The placements."""
  return sweeps.Sweep(
    grid=(
      'model.mixer.erase=output,every_map,input,none',
      'model.mixer.objective=dot,l2',
    ),
    metrics=small.METRICS,
  )
