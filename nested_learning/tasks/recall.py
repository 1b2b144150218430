"""In-context recall of the MAD suite: plain, among noise, and of motifs.

In training the loss is that of a language model, on every token; in evaluation
the values of keys that the row has shown before count.

References:
  Poli et al., Mechanistic Design and Scaling of Hybrid Architectures,
    arXiv:2403.17844, 2024, section 3 and appendix B (the tasks and settings).
"""

import dataclasses

import numpy as np

from nested_learning.tasks import task


@dataclasses.dataclass(frozen=True)
class RecallConfig:
  """Pairs of key and value, the same value for a key all through a row.

  Keys are drawn with replacement, and the last pair repeats a key of the row.
  Ids are keys, values, then noise; a noisy pair is two noise tokens.
  """

  vocab_size: int = 16  # half of what is not noise are keys
  num_tokens: int = 128  # of a row; even
  num_noise_ids: int = 0  # 16 in the noisy task; part of vocab_size
  noise: float = 0.0  # share of noisy pairs; 0.2 in the noisy task

  def __post_init__(self):
    task.check_at_least(self, 0, 'num_noise_ids')
    task.check(self, 'noise', 0 <= self.noise < 1, 'at least 0 and below 1')
    task.check(
      self,
      'num_noise_ids',
      bool(self.num_noise_ids) or not self.noise,
      f'at least 1, since noise={self.noise} is not 0',
    )
    task.check(
      self,
      'vocab_size',
      self.vocab_size - self.num_noise_ids >= 2,
      f'at least {2 + self.num_noise_ids}: a key, a value and '
      f'num_noise_ids={self.num_noise_ids}',
    )
    task.check(
      self,
      'num_tokens',
      self.num_tokens >= 4 and self.num_tokens % 2 == 0,
      'even and at least 4: one pair and the pair that repeats its key',
    )

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task`."""
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
    # The token after the last value is not there: its prediction never counts.
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
    """More pairs of the same keys."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@dataclasses.dataclass(frozen=True)
class FuzzyRecallConfig:
  """In-context recall where keys and values are motifs of several tokens.

  A motif is 1 to `motif_size` different tokens. In evaluation all keys have
  `motif_size` tokens. Rows are padded on the left with V - 1.
  """

  vocab_size: int = 16
  num_tokens: int = 128  # of a row
  motif_size: int = 3  # tokens of a key or value, at most

  def __post_init__(self):
    task.check_at_least(self, 1, 'motif_size')
    num_keys = (self.vocab_size - 1) // 2
    task.check(
      self,
      'motif_size',
      self.motif_size <= num_keys,
      f'at most the {num_keys} keys that vocab_size={self.vocab_size} has',
    )
    needed = 6 * self.motif_size
    task.check(
      self,
      'num_tokens',
      self.num_tokens >= needed,
      f'at least {needed}, three pairs of the longest motifs',
    )

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task`."""
    num_ids, size = self.vocab_size - 1, self.motif_size
    num_keys = num_ids // 2

    def draw(begin, end, smallest):
      length = rng.integers(smallest, size + 1)
      return tuple(rng.permutation(np.arange(begin, end))[:length].tolist())

    draw_key = lambda: draw(0, num_keys, size if evaluating else 1)
    draw_value = lambda: draw(num_keys, num_ids, 1)
    asked, answer = draw_key(), draw_value()
    room = self.num_tokens - len(asked + answer) - 2 * size
    # The first pair from here on is the asked one; there is always room for it.
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
    """More pairs of the same keys."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)
