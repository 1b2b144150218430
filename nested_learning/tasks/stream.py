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
  """A task to learn instead of a text."""

  task: registry.TaskConfig
  batch_size: int = 32  # rows per step, over all processes
  num_examples: int | None = None  # to train on, again and again; None: no end
  longer: tuple[int, ...] = ()  # evaluate on rows so many times as long, too
  seed: int = 0  # of the rows

  def __post_init__(self):
    for name in ('batch_size', 'num_examples'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise errors.UserError(f'data.{name}={value} must be at least 1.')
    if any(factor < 2 for factor in self.longer):
      raise errors.UserError(
        f'data.longer={self.longer} must be factors of the length, 2 or more.'
      )
    if not 0 <= self.seed < 2**32:
      raise errors.UserError(
        f'data.seed={self.seed} must be at least 0 and below 2**32.'
      )
    for factor in self.longer:
      self.task.stretched(factor)  # refuses what cannot be

  @property
  def sequence_length(self) -> int:
    """Tokens per row in training."""
    return self.task.num_tokens

  @property
  def has_validation(self) -> bool:
    """Rows that training does not see can always be made."""
    return True

  @property
  def carries_state(self) -> bool:
    """Every row begins a stream of its own."""
    return False


def make_row(
  config: TaskDataConfig, index: int, *, split: str = 'train', factor: int = 1
) -> task_lib.Row:
  """One row; no row of a split is one of the other's.

  Args:
    config: The task and the seed.
    index: Which row.
    split: 'train' or 'validation'.
    factor: Of the training length.

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

  Row r at a step is row step * batch_size + r of the split. With num_examples
  it is that of an endless sequence of shuffled passes over the examples.

  Args:
    config: The task.
    split: 'train' or 'validation'.
    factor: Of the training length.
    process_index: Which consecutive slice of each batch to make.
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
  """Settings by dotted name, so that an error can name the one that differs."""
  flat = {}
  for name, value in values.items():
    if isinstance(value, dict):
      flat |= _flat(value, f'{prefix}{name}.')
    else:
      flat[f'{prefix}{name}'] = value
  return flat
