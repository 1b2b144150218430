"""Trains any model of the zoo on any generated task, in minutes.

Command:
  python launch/run.py --config=experiments/tasks.py:hope,mqar_small \
    --workdir=runs/mqar

The argument is a family of `models.zoo` and a name of `tasks.TASKS`. Models
have two layers of width 64, and MLPs of a width at which all have the same
number of parameters within 3 per cent. Chunks of memories have 16 tokens,
because rows are short and a memory learns to cross the border of a chunk only
if there is one.
Every setting can be changed:
--set=data.task.num_pairs=8 --set=data.longer=2,8.

Hardware: two CPU cores, one to five minutes. experiments/bench_small.py
compares families, each at its best learning rate.
"""

import dataclasses
import difflib

from experiments.ablations import hope
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import layers
from nested_learning import models
from nested_learning import tasks
from nested_learning import training

_FAMILY, _TASK = 'hope', 'mqar_small'
_CHUNK = 16  # tokens that a memory reads between anchors
_NUM_PARAMS = 124_000  # beside those of the embedding
_STEP = 2**13  # tokens, at most 32 rows and at least 4


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """Returns the experiment.

  Args:
    arg: 'family,task', by default 'hope,mqar_small'.
  """
  family, _, name = (arg or _FAMILY).partition(',')
  name = name or _TASK
  task = tasks.make_config(name)
  compresses = isinstance(task, tasks.CompressionConfig)
  return training.ExperimentConfig(
    name=f'{family}_{name}',
    model=model_config(family, task),
    data=tasks.TaskDataConfig(
      task,
      batch_size=min(max(_STEP // task.num_tokens, 4), 32),
      longer=() if compresses else (2,),
    ),
    train=training.TrainConfig(
      num_steps=1500,
      learning_rate=5e-3,
      weight_decay=0.01,
      evaluate_every=250,
      checkpoint_every=250,
    ),
    evaluation=evaluation.EvaluationConfig(num_batches=16),
  )


def model_config(family: str, task: tasks.TaskConfig) -> models.ModelConfig:
  """Returns a small model of a family with room for a task.

  Args:
    family: A family of the zoo.
    task: The task.

  Returns:
    A config of two layers of width 64, with two heads and about 124,000
    parameters beside those of the embedding.

  Raises:
    errors.UserError: There is no such family.
  """
  if family not in models.zoo.FAMILIES:
    nearest = difflib.get_close_matches(
      family, models.zoo.FAMILIES, n=3, cutoff=0
    )
    raise errors.UserError(
      f'no family {family!r} in the zoo; the nearest are {", ".join(nearest)}.'
    )
  size = models.zoo.Size(
    num_layers=2,
    embed_dim=64,
    num_heads=2,
    mlp_dim=96,
    vocab_size=max(task.vocab_size, 1),
    max_length=task.num_tokens,
    window=32,
  )
  model = models.zoo.make_sized(family, size)
  mixer = model.mixer
  if isinstance(mixer, layers.MemoryMixerConfig):
    mixer = dataclasses.replace(
      mixer, chunk_size=_CHUNK, chunk_size_others=_CHUNK
    )
  model = dataclasses.replace(model, mixer=mixer)
  names = tuple(level.name for level in model.levels)
  embedding = size.vocab_size * size.embed_dim
  return hope.fit(model, names, _NUM_PARAMS + embedding)
