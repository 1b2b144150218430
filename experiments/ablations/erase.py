"""Maps that tokens write and erase in a memory, and the objective.

Command:
  python launch/sweep.py --config=experiments/ablations/erase.py \
    --workdir=runs/erase --seeds=3

Hardware: two CPU cores, two minutes for each of the 18 runs.
Results: experiments/results/ablations/README.md.

`output_alone` is the default. The other rows also write the map that reads the
key; `as_printed` does so by equation 93 of the paper, with all other settings
of the default. `erase_nowhere` is plain gradient descent.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """Returns the experiment."""
  return small.make_config('erase')


def get_sweep() -> sweeps.Sweep:
  """Returns the sweep over the rules."""
  mixer = 'model.mixer.'
  both = f'{mixer}learns=every_map'
  printed = f'{mixer}objective=l2', f'{mixer}max_inner_lr=0.5'
  return sweeps.Sweep(
    rows=(
      sweeps.Row('output_alone'),
      sweeps.Row('both_erase_output', (both,)),
      sweeps.Row('both_erase_both', (both, f'{mixer}erase=every_map')),
      sweeps.Row('as_printed', (both, f'{mixer}erase=every_map', *printed)),
      sweeps.Row('erase_input', (both, f'{mixer}erase=input', *printed)),
      sweeps.Row('erase_nowhere', (both, f'{mixer}erase=none', *printed)),
    ),
    metrics=small.METRICS,
  )
