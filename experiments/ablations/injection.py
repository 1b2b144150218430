"""Steps that are capped by what retention lets go of, as VisionHOPE's are.

Command:
  python launch/sweep.py --config=experiments/ablations/injection.py \
    --workdir=runs/injection --seeds=3

Hardware: two CPU cores, a few minutes for each of the 21 runs.
Result: not run to its end yet.

Its rows on images (ImageNet-1K accuracy of a model of its smallest size): soft
and spectral 82.3, hard 81.8, without a cap not a number.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('injection')


def get_sweep() -> sweeps.Sweep:
  """Caps by how they cap, and by how much is added for what is let go of."""
  injection = 'model.mixer.injection'
  cap = 'model.mixer.cap'
  return sweeps.Sweep(
    rows=(
      sweeps.Row('none'),
      sweeps.Row('soft_0.01', (f'{injection}=0.01',)),
      sweeps.Row('soft_0.1', (f'{injection}=0.1',)),
      sweeps.Row('soft_1', (f'{injection}=1.0',)),
      sweeps.Row('hard_0.01', (f'{injection}=0.01', f'{cap}=hard')),
      sweeps.Row('hard_0.1', (f'{injection}=0.1', f'{cap}=hard')),
      sweeps.Row('spectral_0.01', (f'{injection}=0.01', f'{cap}=spectral')),
    ),
    metrics=small.METRICS,
  )
