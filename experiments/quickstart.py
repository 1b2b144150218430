"""A small Hope language model on the source files of Python's standard library.

Command:
  make demo
  python launch/run.py --config=experiments/quickstart.py \
    --workdir=runs/quickstart

Hardware: two CPU cores, a minute and a half to five minutes of training.
Results: experiments/results/quickstart/README.md.

Keys, values, learning rates and retention are projections, and a memory is
written towards values: experiments/results/ablations/README.md says why.

`--config=experiments/quickstart.py:transformer` trains Transformer++ of the
same size on the same data: 2.116 bits per byte. A batch has four rows, for up
to four devices; --set=data.batch_size=8 is for eight.
"""

from nested_learning import data
from nested_learning import errors
from nested_learning import inference
from nested_learning import models
from nested_learning import training
from nested_learning.layers import attention
from nested_learning.layers import memory_mixer

_ROWS = 4
_TOKENS = 512


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment; `arg` is 'hope' (default) or 'transformer'."""
  if arg in (None, 'hope'):
    mixer = memory_mixer.MemoryMixerConfig(
      num_heads=4, head_dim=32, hidden_dim=64, adaptive=(), target='value'
    )
    levels = tuple(models.LevelConfig(x, mlp_dim=208) for x in ('fast', 'slow'))
  elif arg == 'transformer':
    mixer = attention.AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32)
    levels = (models.LevelConfig('mlp', mlp_dim=552),)
  else:
    raise errors.UserError(f"{arg!r} must be 'hope' or 'transformer'.")
  return training.ExperimentConfig(
    name='quickstart',
    model=models.ModelConfig(
      vocab_size=257,  # bytes, and the mark between documents
      num_layers=2,
      embed_dim=128,
      mixer=mixer,
      levels=levels,
      max_length=_TOKENS,
    ),
    data=data.DataConfig(
      source='stdlib', sequence_length=_TOKENS, batch_size=_ROWS
    ),
    train=training.TrainConfig(
      num_steps=600,
      learning_rate=4e-3,
      evaluate_every=250,
      checkpoint_every=250,
    ),
    generate=inference.GenerateConfig(prompt='def ', num_tokens=400),
  )
