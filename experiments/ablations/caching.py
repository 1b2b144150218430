"""Memories of earlier segments, read beside the one that learns.

Command:
  python launch/sweep.py --config=experiments/ablations/caching.py \
    --workdir=runs/caching --seeds=1 \
    --results=experiments/results/ablations/caching

Hardware: two CPU cores, a minute or two for each of the 5 runs.
Result: experiments/results/ablations/caching/README.md. Bits per byte, one seed
(those of `components.py` spread by 0.016): none 2.815, one segment kept 2.865,
four 2.880; of 32 tokens, none 2.821, four 2.874. On rows this short it loses.

Memory Caching (arXiv:2602.24281) reports for Titans of 1.3B parameters with
segments of 256 tokens 58.33 in place of 56.82 on average over its tasks. Rows
of these runs have 256 tokens: a segment is one chunk of 64, or two of 32.
"""

from experiments.ablations import small
from launch import sweeps
from nested_learning import training


def get_config() -> training.ExperimentConfig:
  """The experiment."""
  return small.make_config('caching')


def get_sweep() -> sweeps.Sweep:
  """Segments that are kept, by number and by chunks of 32 or 64 tokens."""
  kept = 'model.mixer.cached_segments'
  chunks = 'model.mixer.segment_chunks'
  size = 'model.mixer.chunk_size'
  return sweeps.Sweep(
    rows=(
      sweeps.Row('none'),
      sweeps.Row('kept_1', (f'{kept}=1', f'{chunks}=1')),
      sweeps.Row('kept_4', (f'{kept}=4', f'{chunks}=1')),
      sweeps.Row('none_32', (f'{size}=32',)),
      sweeps.Row('kept_4_32', (f'{kept}=4', f'{chunks}=2', f'{size}=32')),
    ),
    metrics=small.METRICS,
  )
