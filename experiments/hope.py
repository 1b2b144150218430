"""Hope in the sizes of the papers, and two beyond them.

Command, for the size 170m, 340m, 760m, 1p3b, 7b or 70b:
  python launch/run.py --config=experiments/hope.py:170m \
    --workdir=runs/hope_170m --set=data.source=TEXT \
    --set=data.tokenizer=TOKENIZER.model
  python launch/run.py --config=experiments/hope.py:170m --mode=describe
  python launch/run.py --config=experiments/hope.py:1p3b --mode=compile \
    --topology=v5e:8x16 --workdir=runs/hope_1p3b_compiled

`transformer_170m` and `gated_deltanet_170m`, and so on, are Transformer++ and
Gated DeltaNet of the same width and depth.

Hardware: 64 devices up to 760M, 128 for 1.3B and 7B, 1,024 for 70B, or any
number whose mesh.data x mesh.fsdp divides the rows of a batch.
Result: not trained yet. The table of experiments/compiled/README.md is of an
earlier version, with rows of 4,096 tokens and levels that do not learn in them.

A step has half a million tokens, a row 8,192 (4,096 at 70B), the vocabulary
32,000 tokens; the schedule is a cosine, weight decay 0.1. These are the
settings of Behrouz et al., Miras, arXiv:2504.13173 (170M to 760M), and Atlas,
arXiv:2505.23735 (1.3B), which Nested Learning follows where it states nothing,
but for the longer rows. No paper has 7B and 70B: width, depth and heads
continue those of the smaller sizes, with 20 tokens per parameter.

Hope's levels take every step of the training, and they learn inside every row,
each on its clock: --set=inner.levels.0.update_every=1024 changes one of them,
--set=inner.levels=() turns this off.
"""

from typing import NamedTuple

from nested_learning import data
from nested_learning import errors
from nested_learning import models
from nested_learning import sharding
from nested_learning import training

_STEP = 2**19  # tokens
_FAMILIES = 'hope', 'transformer', 'gated_deltanet'


class _Size(NamedTuple):
  learning_rate: float  # at its peak
  num_tokens: float
  mesh: sharding.MeshConfig
  rows: int = 64  # of a batch


_SIZES = {
  '170m': _Size(3e-3, 15e9, sharding.MeshConfig(fsdp=8)),
  '340m': _Size(1.5e-3, 15e9, sharding.MeshConfig(fsdp=8)),
  '760m': _Size(1.25e-3, 30e9, sharding.MeshConfig(fsdp=8)),
  '1p3b': _Size(7e-4, 100e9, sharding.MeshConfig(fsdp=8, model=2)),
  '7b': _Size(3e-4, 140e9, sharding.MeshConfig(fsdp=32, model=2)),
  '70b': _Size(1.5e-4, 1.4e12, sharding.MeshConfig(fsdp=128, model=8), 128),
}


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment of one size.

  It reads text from the folder `text` and needs a SentencePiece model of 32,000
  pieces, `tokenizer.model`; --set=data.source= and --set=data.tokenizer= name
  others.

  Args:
    arg: The size of Hope; or 'transformer_' or 'gated_deltanet_', and a size.
  """
  family, _, name = ('_' + (arg or '')).rpartition('_')
  family = family.removeprefix('_') or 'hope'
  if name not in _SIZES or family not in _FAMILIES:
    raise errors.UserError(
      f'hope.py:{arg or ""} must name a size, one of {", ".join(_SIZES)}, or '
      'transformer_ or gated_deltanet_ and a size.'
    )
  size = _SIZES[name]
  length = _STEP // size.rows
  name = f'{family}_{name}'
  return training.ExperimentConfig(
    name=name,
    model=models.zoo.make_config(
      name, dtype='bfloat16', remat='layer', max_length=length
    ),
    inner=models.zoo.make_inner(name),
    data=data.DataConfig(
      source='text',
      tokenizer='tokenizer.model',
      sequence_length=length,
      batch_size=size.rows,
    ),
    train=training.TrainConfig(
      num_steps=round(size.num_tokens / _STEP),
      learning_rate=size.learning_rate,
      warmup_steps=1000,
      evaluate_every=1000,
      checkpoint_every=1000,
    ),
    mesh=size.mesh,
  )
