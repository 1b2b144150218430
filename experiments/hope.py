"""Hope of the zoo, trained as the papers do; `hope_170m.py` to `hope_1p3b.py`.

Half a million tokens per step, 4,096 per row, a vocabulary of 32,000, cosine,
weight decay 0.1: Behrouz et al., Miras, arXiv:2504.13173 (170M to 760M), and
Atlas, arXiv:2505.23735 (1.3B), whose settings Nested Learning follows where it
says nothing.
"""

from nested_learning import data
from nested_learning import models
from nested_learning import sharding
from nested_learning import training

_ROWS = 128
_STEP = 2**19  # tokens


def make_config(
  name: str,
  *,
  learning_rate: float,
  num_tokens: float,
  mesh: sharding.MeshConfig,
) -> training.ExperimentConfig:
  """Makes the experiment of one size.

  Args:
    name: Of the model in the zoo, and of the run.
    learning_rate: At its peak.
    num_tokens: To train on.
    mesh: The devices that it is meant for.

  Returns:
    The experiment. It reads text from the folder `text` and needs a
    SentencePiece model of 32,000 pieces, `tokenizer.model`; --set=data.source=
    and --set=data.tokenizer= name others.
  """
  model = models.zoo.make_config(name, dtype='bfloat16', remat='layer')
  return training.ExperimentConfig(
    name=name,
    model=model,
    data=data.DataConfig(
      source='text',
      tokenizer='tokenizer.model',
      sequence_length=_STEP // _ROWS,
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
