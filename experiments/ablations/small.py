"""The small Hope that ablations change.

It is the quickstart's language model with half the width, rows half as long and
a third of the tokens.
"""

from nested_learning import data
from nested_learning import evaluation
from nested_learning import inference
from nested_learning import models
from nested_learning import training
from nested_learning.layers import memory_mixer

METRICS = (
  'bits_per_byte',
  'bits_per_byte_writes_off',
  'late_gain_bits_per_token',
  'tokens_per_second',
)
_ROWS = 8
_TOKENS = 256
_MLP_DIM = 192  # of all levels together


def make_config(name: str, *, num_levels: int = 2) -> training.ExperimentConfig:
  """Makes the experiment.

  Args:
    name: Name of the experiment.
    num_levels: Number of levels of the chain, which together have a constant
      width. Each updates half as often as the one before it, the first at every
      step.

  Returns:
    The config.
  """
  return training.ExperimentConfig(
    name=name,
    model=models.ModelConfig(
      vocab_size=257,  # bytes, and the mark between documents
      num_layers=2,
      embed_dim=64,
      mixer=memory_mixer.MemoryMixerConfig(num_heads=2, head_dim=32),
      levels=tuple(
        models.LevelConfig(
          f'level_{i}',
          mlp_dim=_MLP_DIM // num_levels,
          train_every=2**i * _ROWS * _TOKENS if i else None,
        )
        for i in range(num_levels)
      ),
      max_length=_TOKENS,
    ),
    data=data.DataConfig(
      source='stdlib', sequence_length=_TOKENS, batch_size=_ROWS
    ),
    train=training.TrainConfig(
      num_steps=200,
      learning_rate=4e-3,
      evaluate_every=200,
      checkpoint_every=100,
    ),
    evaluation=evaluation.EvaluationConfig(num_batches=16),
    generate=inference.GenerateConfig(prompt='def ', num_tokens=100),
  )
