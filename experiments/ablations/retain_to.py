"""What a memory decays to: what it was learned to start from, or zero.

Command:
  python launch/sweep.py --config=experiments/ablations/retain_to.py \
    --workdir=runs/retain_to --seeds=3

Hardware: two CPU cores, a minute for each of the 6 runs.
Result, one seed, 200 steps of text (experiments/results/ablations/retain_to):
2.815 bits per byte with the learned start, 2.884 with zero; writes are worth
0.46 and 0.25 bits of a byte late in a row. Rates of that page are of runs that
shared the machine.

Read literally, the paper's retention decays to zero, and with it all that was
learned about the start.
"""

from experiments.ablations import small
from launch import sweeps
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
