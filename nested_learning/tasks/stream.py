"""Batches of a task as a pure function of the step."""

import dataclasses
import json
import sys

import grain
import numpy as np

from nested_learning import configs
from nested_learning import errors
from nested_learning.data import pipeline
from nested_learning.tasks import registry
from nested_learning.tasks import task as task_lib

_SPLITS = {'train': 0, 'validation': 1}


@dataclasses.dataclass(frozen=True)
class TaskDataConfig:
  """A task to train on instead of text."""

  task: registry.TaskConfig
  batch_size: int = 32  # rows per step, over all processes
  num_examples: int | None = None  # training rows per pass; None: no repeats
  longer: tuple[int, ...] = ()  # lengths to evaluate too, as factors
  seed: int = 0  # of the rows

  def __post_init__(self):
    task_lib.check_at_least(self, 1, 'batch_size')
    if self.num_examples is not None:
      task_lib.check_at_least(self, 1, 'num_examples')
    errors.check_field(
      self,
      'longer',
      all(factor >= 2 for factor in self.longer),
      'factors of the length, 2 or more',
    )
    errors.check_field(
      self, 'seed', 0 <= self.seed < 2**32, 'at least 0 and below 2**32'
    )
    for factor in self.longer:
      self.task.stretched(factor)  # refuses lengths that are not possible

  @property
  def sequence_length(self) -> int:
    """Tokens per row in training."""
    return self.task.num_tokens

  @property
  def has_validation(self) -> bool:
    """True: rows that training does not see can always be made."""
    return True

  @property
  def carries_state(self) -> bool:
    """False: every row begins a stream of its own."""
    return False


def make_row(
  config: TaskDataConfig, index: int, *, split: str = 'train', factor: int = 1
) -> task_lib.Row:
  """Makes one row; the rows of the two splits are different draws.

  Args:
    config: The task and the seed.
    index: Number of the row.
    split: 'train' or 'validation'.
    factor: Length of the row, as a multiple of the training length.

  Returns:
    The row.
  """
  rng = np.random.default_rng((config.seed, _SPLITS[split], index))
  task = config.task if factor == 1 else config.task.stretched(factor)
  return task.make_row(rng, evaluating=split == 'validation')


def make_iterator(
  config: TaskDataConfig,
  *,
  split: str = 'train',
  factor: int = 1,
  process_index: int = 0,
  process_count: int = 1,
) -> pipeline.Batches:
  """Makes an iterator over one process's rows of every global batch.

  Row r at a step is row step * batch_size + r of the split; with num_examples,
  of an endless sequence of shuffled passes over the examples.

  Args:
    config: The task.
    split: 'train' or 'validation'.
    factor: Length of the rows, as a multiple of the training length.
    process_index: Number of this process's slice of each batch.
    process_count: Number of slices.

  Returns:
    An iterator without end of dicts: `tokens`, `targets`, `mask` as in
    `task.Row` with rows in front, and `reset` bool [b, t], True at the first
    token. It has `get_state` and `set_state`.

  Raises:
    errors.UserError: The processes do not divide the rows.
  """
  if split not in _SPLITS:
    raise ValueError(f"{split=} must be 'train' or 'validation'.")
  num_rows, remainder = divmod(config.batch_size, process_count)
  if remainder:
    raise errors.UserError(
      f'data.batch_size={config.batch_size} is not a multiple of the '
      f'{process_count} processes. Choose a multiple.'
    )
  mine = process_index * num_rows + np.arange(num_rows)
  order = None
  if split == 'train' and config.num_examples is not None:
    order = grain.MapDataset.range(config.num_examples)
    order = order.shuffle(seed=config.seed).repeat(None)

  def make_batch(step):
    indices = (step * config.batch_size + mine).tolist()
    if order is not None:
      indices = [order[index] for index in indices]
    rows = [
      make_row(config, index, split=split, factor=factor) for index in indices
    ]
    batch = {
      name: np.stack([getattr(row, name) for row in rows])
      for name in ('tokens', 'targets', 'mask')
    }
    batch['reset'] = np.zeros(batch['mask'].shape, bool)
    batch['reset'][:, 0] = True
    return batch

  identity = json.loads(configs.to_json(config))
  del identity['longer']
  identity |= {'split': split, 'factor': factor}
  return pipeline.Batches(make_batch, sys.maxsize, stream=_flat(identity))


def _flat(values: dict, prefix: str = '') -> dict:
  """Flattens settings to dotted names, so that errors can name them."""
  flat = {}
  for name, value in values.items():
    if isinstance(value, dict):
      flat |= _flat(value, f'{prefix}{name}.')
    else:
      flat[f'{prefix}{name}'] = value
  return flat
