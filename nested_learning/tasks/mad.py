"""Selective copying, memorisation and recall of the MAD suite.

`recall.py` has the recall tasks, `compression.py` the compression task.

References:
  Poli et al., Mechanistic Design and Scaling of Hybrid Architectures,
    arXiv:2403.17844, 2024, section 3 and appendix B (the tasks and settings).
"""

import dataclasses

import numpy as np

from nested_learning.tasks import task


@dataclasses.dataclass(frozen=True)
class SelectiveCopyingConfig:
  """Tokens among blanks, which have to be repeated in order at the end.

  A row is the tokens to copy, each with a random number of blanks before it,
  the copy mark V - 1, and as many blanks V - 2 as there are tokens to copy, at
  which these are the targets.
  """

  vocab_size: int = 16
  num_tokens: int = 256  # of a row
  num_copied: int = 16

  def __post_init__(self):
    task.check_at_least(self, 1, 'num_copied')
    task.check_at_least(self, 4, 'vocab_size')
    task.check(
      self,
      'num_tokens',
      self.num_tokens > 2 * self.num_copied + 1,
      f'above {2 * self.num_copied + 1}: the {self.num_copied} tokens to copy, '
      'the copy mark, and the places to copy them to',
    )

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task`."""
    del evaluating
    num_copied = self.num_copied
    copied = rng.integers(self.vocab_size - 2, size=num_copied)
    num_blanks = self.num_tokens - 2 * num_copied - 1
    # Each blank stands before a token of its choice, none after the last.
    before = np.sort(rng.integers(num_copied, size=num_blanks))
    places = np.searchsorted(before, np.arange(num_copied), side='right')
    tokens = np.full(self.num_tokens, self.vocab_size - 2, np.int32)
    tokens[places + np.arange(num_copied)] = copied
    tokens[-num_copied - 1] = self.vocab_size - 1
    targets = np.zeros(self.num_tokens, np.int32)
    targets[-num_copied:] = copied
    mask = np.arange(self.num_tokens) >= self.num_tokens - num_copied
    return task.Row(tokens, targets, mask)

  def stretched(self, factor):
    """More blanks; as many tokens to copy."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@dataclasses.dataclass(frozen=True)
class MemorizationConfig:
  """A fixed table from keys to values, which the parameters have to learn.

  A row is keys, each followed by the insert mark V - 1, at which the key's
  value is the target. The values themselves are never read.
  """

  vocab_size: int = 256
  num_tokens: int = 32  # of a row; even
  map_seed: int = 12345  # of the table

  def __post_init__(self):
    task.check_at_least(self, 3, 'vocab_size')
    task.check(
      self,
      'num_tokens',
      self.num_tokens >= 2 and self.num_tokens % 2 == 0,
      'even and at least 2: a key and the insert mark',
    )

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task`."""
    del evaluating
    num_keys = (self.vocab_size - 1) // 2
    values = np.arange(num_keys, self.vocab_size - 1)
    values = np.random.default_rng(self.map_seed).permutation(values)
    keys = rng.integers(num_keys, size=self.num_tokens // 2)
    tokens = np.full(self.num_tokens, self.vocab_size - 1, np.int32)
    tokens[::2] = keys
    targets = np.zeros(self.num_tokens, np.int32)
    targets[1::2] = values[keys]
    return task.Row(tokens, targets, np.arange(self.num_tokens) % 2 == 1)

  def stretched(self, factor):
    """More keys of the same table."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)
