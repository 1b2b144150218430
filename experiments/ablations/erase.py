"""Where Delta Gradient Descent erases: every map, the first alone, or nowhere.

Command:
  python launch/sweep.py --config=experiments/ablations/erase.py \
    --workdir=runs/erase --seeds=3

Hardware: two CPU cores, a few minutes for each of the 9 runs.
Result: not run to its end yet.

Nowhere is plain gradient descent. In a matrix memory every map is the first.
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
    grid=('model.mixer.erase=every_map,input,none',),
    metrics=small.METRICS,
  )
