"""Hope at the papers' sizes; `hope_170m.py` to `hope_1p3b.py` name them.

Sizes, learning rates and lengths after Behrouz et al., Miras, arXiv:2504.13173
(170M to 760M), and Atlas, arXiv:2505.23735 (1.3B), whose tables Nested Learning
follows where it says nothing: half a million tokens per step, 4,096 per row,
a vocabulary of 32,000, cosine, weight decay 0.1.
"""

from nested_learning import data
from nested_learning import layers
from nested_learning import models
from nested_learning import sharding
from nested_learning import training

_ROWS = 128
_TOKENS = 4096
_STEP = _ROWS * _TOKENS  # 2^19 tokens


def make_config(
  name: str,
  *,
  num_layers: int,
  embed_dim: int,
  num_heads: int,
  mlp_dim: int,
  learning_rate: float,
  num_tokens: float,
  mesh: sharding.MeshConfig,
) -> training.ExperimentConfig:
  """Makes the experiment of one size.

  Args:
    name: Of the run.
    num_layers: Blocks.
    embed_dim: Width of the model; the heads together are as wide.
    num_heads: Heads of self-modifying Titans.
    mlp_dim: Hidden width of each of the three levels; the papers give none, so
      it is what makes the model as large as its name.
    learning_rate: At its peak.
    num_tokens: To train on.
    mesh: The devices that it is meant for.

  Returns:
    The experiment. It reads text from the folder `text` and needs a
    SentencePiece model of 32,000 pieces, `tokenizer.model`; --set=data.source=
    and --set=data.tokenizer= name others.
  """
  return training.ExperimentConfig(
    name=name,
    model=models.ModelConfig(
      vocab_size=32_000,
      num_layers=num_layers,
      embed_dim=embed_dim,
      mixer=layers.SelfModifyingTitansConfig(
        num_heads=num_heads, head_dim=embed_dim // num_heads
      ),
      levels=(
        models.LevelConfig('fast', mlp_dim),
        models.LevelConfig('middle', mlp_dim, chunk_size=4 * _STEP),
        models.LevelConfig('slow', mlp_dim, chunk_size=16 * _STEP),
      ),
      max_length=_TOKENS,
      dtype='bfloat16',
      remat='layer',
    ),
    data=data.DataConfig(
      source='text',
      tokenizer='tokenizer.model',
      sequence_length=_TOKENS,
      batch_size=_ROWS,
    ),
    train=training.TrainConfig(
      num_steps=round(num_tokens / _STEP),
      learning_rate=learning_rate,
      warmup_steps=1000,
      evaluate_every=1000,
      checkpoint_every=1000,
    ),
    mesh=mesh,
  )
