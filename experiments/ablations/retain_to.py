"""What a memory decays to: what it was learned to start from, or zero.

Command:
  python launch/sweep.py --config=experiments/ablations/retain_to.py \
    --workdir=runs/retain_to --seeds=3

Hardware: two CPU cores, a few minutes for each of the 6 runs.
Result: not run to its end yet.

Read literally, the paper's retention decays to zero, and with it all that was
learned about the start.
"""

from experiments.ablations import small
from nested_learning import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('retain_to')


def get_sweep() -> sweeps.Sweep:
  """Both references of the retention."""
  return sweeps.Sweep(
    grid=('model.mixer.retain_to=initial,zero',),
    metrics=small.METRICS,
  )
