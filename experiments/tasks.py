"""Any model of the zoo on any generated task, small enough for minutes.

Command:
  python launch/run.py --config=experiments/tasks.py:hope,mqar_small \
    --workdir=runs/mqar

The argument is a family of `models.zoo` and a name of `tasks.TASKS`. Models
have two layers, 64 wide, all of whose levels take every step. Any setting can
be another: --set=data.task.num_rewrites=8 --set=data.longer=2,8.

Hardware: two CPU cores, one to three minutes. Rows all right, one seed:
  transformer,anbn with --set=train.num_steps=600: 100 % of strings of 2 to 50
    symbols, 37 % of 51 to 100.
  transformer,mqar_small with 4 pairs in rows of 32 tokens and 2,500 steps of 64
    rows (data.task.num_pairs=4, data.task.num_tokens=32,
    data.task.vocab_size=64, data.batch_size=64): 100 %, and 99.6 % on rows of
    64; after 1,000 steps 71 %.
  transformer,mqar_small as it is, with 16 pairs: none after its 1,500 steps,
    9 % of single answers. Attention without a convolution takes longer.
"""

import dataclasses
import difflib

from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from nested_learning import tasks
from nested_learning import training

_FAMILY, _TASK = 'hope', 'mqar_small'
_STEP = 2**13  # tokens, at most 32 rows and at least 4


def get_config(arg: str | None = None) -> training.ExperimentConfig:
  """The experiment; `arg` is 'family,task', by default 'hope,mqar_small'."""
  family, _, name = (arg or _FAMILY).partition(',')
  name = name or _TASK
  task = tasks.make_config(name)
  compresses = isinstance(task, tasks.CompressionConfig)
  return training.ExperimentConfig(
    name=f'{family}_{name}',
    model=make_model(family, task),
    data=tasks.TaskDataConfig(
      task,
      batch_size=min(max(_STEP // task.num_tokens, 4), 32),
      longer=() if compresses else (2,),
    ),
    train=training.TrainConfig(
      num_steps=1500,
      learning_rate=3e-3,
      weight_decay=0.01,
      evaluate_every=250,
      checkpoint_every=250,
    ),
    evaluation=evaluation.EvaluationConfig(num_batches=16),
  )


def make_model(family: str, task: tasks.TaskConfig) -> models.ModelConfig:
  """A small model of a family with room for a task.

  Args:
    family: Of the zoo.
    task: What it learns.

  Returns:
    The config: two layers 64 wide, of two heads.

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
  every_step = lambda level: dataclasses.replace(level, chunk_size=None)
  levels = tuple(every_step(level) for level in model.levels)
  return dataclasses.replace(model, levels=levels)
