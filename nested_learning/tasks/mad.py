"""Tasks of the MAD suite: recall, copying, memorisation, compression.

In training the loss of the recall tasks is that of a language model, on every
token; in evaluation only values count whose keys the row has shown before.

References:
  Poli et al., Mechanistic Design and Scaling of Hybrid Architectures,
    arXiv:2403.17844, 2024, section 3 and appendix B (the tasks and settings).
"""

import dataclasses

import numpy as np

from nested_learning import errors
from nested_learning.tasks import task


@dataclasses.dataclass(frozen=True)
class RecallConfig:
  """Recall: pairs of a key and its value, which is the same all through a row.

  Keys are drawn with replacement, and the last pair repeats a key of the row.
  Ids are keys, values, then noise; a noisy pair is two noise tokens.
  """

  vocab_size: int = 16  # keys are half of the ids that are not noise
  num_tokens: int = 128  # of a row; even
  num_noise_ids: int = 0  # part of vocab_size; MAD: 16 in the noisy task
  noise: float = 0.0  # share of noisy pairs; MAD: 0.2 in the noisy task

  def __post_init__(self):
    task.check_at_least(self, 0, 'num_noise_ids')
    errors.check_field(
      self, 'noise', 0 <= self.noise < 1, 'at least 0 and below 1'
    )
    errors.check_field(
      self,
      'num_noise_ids',
      bool(self.num_noise_ids) or not self.noise,
      f'at least 1, since noise={self.noise} is not 0',
    )
    errors.check_field(
      self,
      'vocab_size',
      self.vocab_size - self.num_noise_ids >= 2,
      f'at least {2 + self.num_noise_ids}: a key, a value and '
      f'num_noise_ids={self.num_noise_ids}',
    )
    errors.check_field(
      self,
      'num_tokens',
      self.num_tokens >= 4 and self.num_tokens % 2 == 0,
      'even and at least 4: one pair and the pair that repeats its key',
    )

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    num_ids = self.vocab_size - self.num_noise_ids
    num_keys, num_pairs = num_ids // 2, self.num_tokens // 2
    values = rng.integers(num_keys, num_ids, size=num_keys)
    keys = rng.integers(num_keys, size=num_pairs)
    noisy = rng.random(num_pairs) < self.noise
    noisy[[rng.integers(num_pairs - 1), -1]] = False  # a pair to ask for
    keys[-1] = rng.choice(np.unique(keys[:-1][~noisy[:-1]]))

    pairs = np.stack([keys, values[keys]], axis=1)
    if self.num_noise_ids:
      pairs[noisy] = rng.integers(
        num_ids, self.vocab_size, size=(int(noisy.sum()), 2)
      )
    # No token follows the last value, so the prediction of one never counts.
    sequence = np.append(pairs.ravel(), 0)
    counts = np.ones(self.num_tokens + 1, bool)
    if evaluating:
      clean = np.flatnonzero(~noisy)
      first = clean[np.unique(keys[clean], return_index=True)[1]]
      counts[:] = False
      counts[2 * clean + 1] = True
      counts[2 * first + 1] = False
    counts[-1] = False
    return task.shifted(sequence, counts)

  def stretched(self, factor):
    """Returns the task with more pairs of the same keys."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@dataclasses.dataclass(frozen=True)
class FuzzyRecallConfig:
  """Fuzzy recall: keys and values are motifs of several tokens.

  A motif is 1 to `motif_size` different tokens. In evaluation all keys have
  `motif_size` tokens. Rows are padded on the left with V - 1.
  """

  vocab_size: int = 16
  num_tokens: int = 128  # of a row
  motif_size: int = 3  # most tokens of a key or value

  def __post_init__(self):
    task.check_at_least(self, 1, 'motif_size')
    num_keys = (self.vocab_size - 1) // 2
    errors.check_field(
      self,
      'motif_size',
      self.motif_size <= num_keys,
      f'at most the {num_keys} keys that vocab_size={self.vocab_size} has',
    )
    needed = 6 * self.motif_size
    errors.check_field(
      self,
      'num_tokens',
      self.num_tokens >= needed,
      f'at least {needed}, three pairs of the longest motifs',
    )

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    num_ids, size = self.vocab_size - 1, self.motif_size
    num_keys = num_ids // 2

    def draw(begin, end, smallest):
      length = rng.integers(smallest, size + 1)
      return tuple(rng.permutation(np.arange(begin, end))[:length].tolist())

    draw_key = lambda: draw(0, num_keys, size if evaluating else 1)
    draw_value = lambda: draw(num_keys, num_ids, 1)
    asked, answer = draw_key(), draw_value()
    room = self.num_tokens - len(asked + answer) - 2 * size
    # The first pair from here on is the asked one; `begin` leaves room for it.
    begin = rng.integers(room - 2 * size + 1)
    shown = {}
    sequence, counts = [], []
    while len(sequence) < room:
      if len(sequence) >= begin and asked not in shown:
        key, value = asked, answer
      else:
        key = draw_key()
        value = answer if key == asked else shown.get(key) or draw_value()
      sequence += key + value
      counts += [not evaluating] * len(key)
      counts += [not evaluating or key in shown] * len(value)
      shown[key] = value
    sequence += asked + answer
    counts += [not evaluating] * len(asked) + [True] * len(answer)
    missing = self.num_tokens + 1 - len(sequence)
    return task.shifted(
      np.array([self.vocab_size - 1] * missing + sequence),
      np.array([not evaluating] * missing + counts),
    )

  def stretched(self, factor):
    """Returns the task with more pairs of the same keys."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@dataclasses.dataclass(frozen=True)
class SelectiveCopyingConfig:
  """Selective copying: tokens among blanks, to be repeated at the end.

  A row is the tokens to copy, each after a random number of blanks, the copy
  mark V - 1, and as many blanks V - 2 as there are tokens to copy. The targets
  at these last blanks are the tokens, in order.
  """

  vocab_size: int = 16
  num_tokens: int = 256  # of a row
  num_copied: int = 16

  def __post_init__(self):
    task.check_at_least(self, 1, 'num_copied')
    task.check_at_least(self, 4, 'vocab_size')
    errors.check_field(
      self,
      'num_tokens',
      self.num_tokens > 2 * self.num_copied + 1,
      f'above {2 * self.num_copied + 1}: the {self.num_copied} tokens to copy, '
      'the copy mark, and the places to copy them to',
    )

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
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
    """Returns the task with more blanks and as many tokens to copy."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


_TABLE_SEED = 12345  # of the table to memorise, the same for all rows


@dataclasses.dataclass(frozen=True)
class MemorizationConfig:
  """Memorisation: a fixed table of keys and values, learned by the parameters.

  A row is keys, each followed by the insert mark V - 1. The target at a mark is
  the key's value. Values are never among the inputs.
  """

  vocab_size: int = 256
  num_tokens: int = 32  # of a row; even

  def __post_init__(self):
    task.check_at_least(self, 3, 'vocab_size')
    errors.check_field(
      self,
      'num_tokens',
      self.num_tokens >= 2 and self.num_tokens % 2 == 0,
      'even and at least 2: a key and the insert mark',
    )

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    num_keys = (self.vocab_size - 1) // 2
    values = np.arange(num_keys, self.vocab_size - 1)
    values = np.random.default_rng(_TABLE_SEED).permutation(values)
    keys = rng.integers(num_keys, size=self.num_tokens // 2)
    tokens = np.full(self.num_tokens, self.vocab_size - 1, np.int32)
    tokens[::2] = keys
    targets = np.zeros(self.num_tokens, np.int32)
    targets[1::2] = values[keys]
    return task.Row(tokens, targets, np.arange(self.num_tokens) % 2 == 1)

  def stretched(self, factor):
    """Returns the task with more keys of the same table."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@dataclasses.dataclass(frozen=True)
class CompressionConfig:
  """Compression: random tokens and the mark V - 1, to be reconstructed.

  The targets are the row itself. Every position is predicted from the output
  at the last one, by `models.CompressionHead`.
  """

  vocab_size: int = 16
  num_tokens: int = 32  # of a row

  def __post_init__(self):
    task.check_at_least(self, 2, 'vocab_size', 'num_tokens')

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    tokens = rng.integers(self.vocab_size - 1, size=self.num_tokens)
    tokens[-1] = self.vocab_size - 1
    tokens = tokens.astype(np.int32)
    return task.Row(tokens, tokens, np.ones(self.num_tokens, bool))

  def stretched(self, factor):
    """Raises `errors.UserError`: the head has one output per position."""
    raise errors.UserError(
      f'a model that reconstructs {self.num_tokens} tokens has no output for '
      f'{factor} times as many; set data.longer=() and train at each length.'
    )
