"""What tokens write and erase in a memory, and on what objective.

Command:
  python launch/sweep.py --config=experiments/ablations/erase.py \
    --workdir=runs/erase --seeds=3

Hardware: two CPU cores, two minutes for each of the 18 runs.
Result, one seed, 200 steps of text (experiments/results/ablations/erase): what
writes do for the bytes late in a row grows from 0.09 bits (as printed) to 0.46
(as here), and bits per byte fall from 2.871 to 2.815. Erasing at every map that
is written takes two thirds of it away (0.17); plain descent is at 3.39. Rates
of that page are of runs that shared the machine. On text so short writing the
map that reads the key, too, is as good (2.803); on tasks it is not:

                        recall, %   parity at    needle at
                                    2x length    8x length
  output_alone             -           100           48
  both_erase_output       99.6          98            5

Recall is of the queries of experiments/tasks.py:hope,mqar_rewritten_small after
750 to 1,000 steps; parity and needles (niah_single_1_small) are of rows all
right, after 300 and 600 to 800 steps, one seed. Other memories than the main
one kept out (adaptive=()), the needles of output_alone are 97 % at 8 times the
length.

`output_alone` is what the package does. The others write the map that reads the
key, too; `as_printed` is equation 93 of the paper. Erasing nowhere is plain
gradient descent.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('erase')


def get_sweep() -> sweeps.Sweep:
  """The rules."""
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
