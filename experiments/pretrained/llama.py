"""The shape of Llama 3 8B, with memories beside attention.

Command:
  python launch/run.py --config=experiments/pretrained/llama.py:8b \
    --mode=compile --topology=v5p:4x4x4 --workdir=runs/llama_8b_compiled

Hardware: 64 devices with 32 GB or more.
Result: never run. experiments/compiled/README.md has its rows, if compiled.

It is the model that launch/import.py makes of the config.json of Llama 3 8B,
with a memory in every fourth layer, so that four layers are compiled. All
parameters are trained, from random ones. To train the memories alone, give an
import of the weights: --set=base=runs/llama/pretrained
--set=train.trainable=memory.
"""

import dataclasses

from nested_learning import data
from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from nested_learning import pretrained
from nested_learning import sharding
from nested_learning import training

_LENGTH = 8192  # tokens of a row
_ROWS = 64  # of a batch
_EVERY = 4  # layers from one memory to the next
# As the config.json of the model has it.
_CONFIG = {
  'model_type': 'llama',
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14_336,
  'max_position_embeddings': 8192,
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500_000.0,
  'tie_word_embeddings': False,
  'vocab_size': 128_256,
}


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment; `arg` is the size, 8b."""
  if arg != '8b':
    raise errors.UserError(f'llama.py:{arg or ""} must name a size, 8b.')
  model = pretrained.to_model_config(_CONFIG, max_length=_LENGTH)
  memory = layers.MemoryMixerConfig(num_heads=32, head_dim=64)
  placement = models.PlacementConfig(
    memory, tuple(range(_EVERY - 1, model.num_layers, _EVERY))
  )
  return training.ExperimentConfig(
    name='llama_8b',
    model=dataclasses.replace(
      model, placement=placement, dtype='bfloat16', remat='layer'
    ),
    data=data.DataConfig(
      source='text',
      tokenizer='tokenizer.json',
      sequence_length=_LENGTH,
      batch_size=_ROWS,
    ),
    train=training.TrainConfig(num_steps=10_000, learning_rate=2e-5),
    mesh=sharding.MeshConfig(fsdp=32),
  )
