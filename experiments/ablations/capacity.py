"""Memories that grow with their document, as in Proteus.

Command:
  python launch/sweep.py --config=experiments/ablations/capacity.py \
    --workdir=runs/capacity --seeds=3

Hardware: two CPU cores, a few minutes for each of the 12 runs.
Result: not run to its end yet.

Proteus (arXiv:2608.16844) has 16 blocks over 8,192 tokens and finds 32 too
many; for Titans of 1.3B parameters it reports 58.00 in place of 56.95 on
average over its tasks. Rows of these runs have 256 tokens; chunks of 16 let a
memory grow 16 times in a row.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('capacity')


def get_sweep() -> sweeps.Sweep:
  """Blocks of a memory, with chunks short enough to add them one by one."""
  chunk = 'model.mixer.chunk_size=16'
  blocks = 'model.mixer.capacity_blocks'
  tokens = 'model.mixer.capacity_tokens=256'
  return sweeps.Sweep(
    rows=(
      sweeps.Row('hope'),
      sweeps.Row('blocks_1', (chunk,)),
      sweeps.Row('blocks_4', (chunk, f'{blocks}=4', tokens)),
      sweeps.Row('blocks_16', (chunk, f'{blocks}=16', tokens)),
    ),
    metrics=small.METRICS,
  )
