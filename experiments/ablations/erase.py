"""Maps that tokens write and erase in a memory, and the objective.

Command:
  python launch/sweep.py --config=experiments/ablations/erase.py \
    --workdir=runs/erase --seeds=3

Hardware: two CPU cores, two minutes for each of the 18 runs.
Result, one seed, 200 steps of text (experiments/results/ablations/erase). The
bits that writes save late in a row grow from 0.09 (as printed) to 0.46 (the
default), and bits per byte fall from 2.871 to 2.815. Erasing every map that is
written reduces the saving to 0.17 bits; plain descent reaches 3.39 bits per
byte. The speeds on that page are of runs that shared the machine. On text this
short, writing the map that reads the key as well is no worse (2.803 bits per
byte); on tasks it is:

                        recall, %   parity at    needle at
                                    2x length    8x length
  output_alone             -           100           48
  both_erase_output       99.6          98            5

Recall counts correct queries of experiments/tasks.py:hope,mqar_rewritten_small
after 750 to 1,000 steps. Parity and needles (niah_single_1_small) count rows
without an error, after 300 and 600 to 800 steps, one seed. With the main memory
alone (adaptive=()), output_alone finds 97 % of the needles at 8 times the
length.

`output_alone` is the default. The other rows also write the map that reads the
key; `as_printed` is equation 93 of the paper. `erase_nowhere` is plain gradient
descent.
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
