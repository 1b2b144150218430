"""Needles in a haystack of tokens, with the structure of RULER's.

    ... hay ... N key A value ... hay ...    Q key A value

N, A and Q are marks. Small models can learn it, and rows of any length test
whether a memory keeps what it has read.

References:
  Hsieh et al., RULER, arXiv:2404.06654, 2024, section 3 and appendix B.
"""

import dataclasses
from typing import Literal

import numpy as np

from nested_learning import errors
from nested_learning.tasks import task

Haystack = Literal['noise', 'essay', 'needles']
_KEY_IDS, _VALUE_IDS, _HAY_IDS = 64, 10, 64
_NOISE_LENGTH = 25  # tokens of the sentences that a noise haystack repeats


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
  """Values of keys, hidden in a haystack, asked for at the end.

  The haystack is one fixed run of tokens that repeats ('noise'), random tokens
  ('essay'), or needles of other keys ('needles'). The question names
  `num_queries` of the `num_keys` keys; the answer is all their values, the
  values of a key in the order of the row.

  Needles are anywhere before the gap. In longer rows than those of training, a
  needle may follow more hay than any needle in training did, so that a wrong
  answer may mean that the needle was not written, not that it was forgotten.
  """

  num_tokens: int = 128  # of a row
  haystack: Haystack = 'noise'
  num_keys: int = 1
  num_values: int = 1  # needles of a key
  num_queries: int = 1  # keys that are asked for
  key_tokens: int = 1  # of a key
  value_tokens: int = 4  # of a value
  gap: int = 32  # tokens without needle before the question

  def __post_init__(self):
    errors.check_choices(self)
    task.check_at_least(
      self, 1, 'num_keys', 'num_values', 'num_queries', 'key_tokens'
    )
    task.check_at_least(self, 1, 'value_tokens')
    task.check_at_least(self, 0, 'gap')
    errors.check_field(
      self,
      'num_queries',
      self.num_queries <= self.num_keys,
      f'at most num_keys={self.num_keys}',
    )
    others = self.haystack == 'needles'  # one key more, for the haystack
    num_keys = _KEY_IDS**self.key_tokens
    errors.check_field(
      self,
      'num_keys',
      self.num_keys + others <= num_keys,
      f'at most the {num_keys - others} keys of key_tokens={self.key_tokens}',
    )
    needles = self.num_keys * self.num_values * self._needle_length
    errors.check_field(
      self,
      'num_tokens',
      self._room >= needles + self._free,
      f'at least {self.num_tokens - self._room + needles + self._free}: '
      f'{needles} tokens of needles, {self._free} without any for '
      f'gap={self.gap}, the question and its answer',
    )

  @property
  def vocab_size(self) -> int:
    """Number of ids: three marks, then keys, values and hay."""
    return 3 + _KEY_IDS + _VALUE_IDS + _HAY_IDS

  @property
  def _needle_length(self) -> int:
    return 2 + self.key_tokens + self.value_tokens

  @property
  def _room(self) -> int:
    """Tokens before the question, counting the one that follows the row."""
    answer = self.num_queries * self.num_values * self.value_tokens
    return self.num_tokens + 1 - 2 - self.num_queries * self.key_tokens - answer

  @property
  def _free(self) -> int:
    """Tokens of hay before the question: the gap, rounded up to needles."""
    if self.haystack == 'needles':
      return -(-self.gap // self._needle_length) * self._needle_length
    return self.gap

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    keys = self._draw_keys(rng)
    values = self._draw_values(rng, (self.num_keys, self.num_values))
    needles = [
      _needle(key, value)
      for key, of_key in zip(keys, values, strict=True)
      for value in of_key
    ]
    # Random places, but the values of one key stay in their order.
    places = rng.permutation(
      np.repeat(np.arange(self.num_keys), self.num_values)
    )
    needles = np.stack(needles)[np.argsort(np.argsort(places, kind='stable'))]
    asked = rng.choice(self.num_keys, self.num_queries, replace=False)
    answer = values[asked].ravel()
    hide = (
      self._hide_among_needles if self.haystack == 'needles' else self._hide
    )
    sequence = np.concatenate(
      [hide(rng, keys, needles), [2], keys[asked].ravel(), [1], answer]
    )
    counts = np.arange(self.num_tokens + 1) > self.num_tokens - len(answer)
    return task.shifted(sequence, counts)

  def stretched(self, factor):
    """Returns the task with more hay and the same needles."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)

  def _draw_keys(self, rng):
    """Draws different keys, int [num_keys, key_tokens]."""
    shape = self.num_keys, self.key_tokens
    while True:
      keys = 3 + rng.integers(_KEY_IDS, size=shape)
      if self.key_tokens == 1:
        keys = 3 + rng.permutation(_KEY_IDS)[: self.num_keys, None]
      if len(np.unique(keys, axis=0)) == self.num_keys:
        return keys

  def _draw_values(self, rng, shape):
    values = rng.integers(_VALUE_IDS, size=(*shape, self.value_tokens))
    return 3 + _KEY_IDS + values

  def _draw_hay(self, rng, num_tokens):
    if self.haystack == 'noise':
      sentences = np.random.default_rng(0)
      hay = sentences.integers(_HAY_IDS, size=_NOISE_LENGTH)
      hay = np.resize(hay, num_tokens)
    else:
      hay = rng.integers(_HAY_IDS, size=num_tokens)
    return 3 + _KEY_IDS + _VALUE_IDS + hay

  def _hide(self, rng, keys, needles):
    """Puts the needles at random places in hay; int [room]."""
    del keys
    hay = self._draw_hay(rng, self._room - needles.size)
    places = rng.integers(len(hay) - self._free + 1, size=len(needles))
    places = np.repeat(np.sort(places), self._needle_length)
    return np.insert(hay, places, needles.ravel())

  def _hide_among_needles(self, rng, keys, needles):
    """Puts the needles among those of other keys, after hay; int [room]."""
    length = self._needle_length
    num_units = self._room // length
    shape = num_units, self.key_tokens
    others = 3 + rng.integers(_KEY_IDS, size=shape)
    while (taken := (others[:, None] == keys).all(-1).any(1)).any():
      shape = int(taken.sum()), self.key_tokens
      others[taken] = 3 + rng.integers(_KEY_IDS, size=shape)
    values = self._draw_values(rng, (num_units,))
    units = np.stack(
      [_needle(*pair) for pair in zip(others, values, strict=True)]
    )
    num_places = num_units - self._free // length
    places = np.sort(rng.choice(num_places, len(needles), replace=False))
    units[places] = needles
    hay = self._draw_hay(rng, self._room - units.size)
    return np.concatenate([hay, units.ravel()])


def _needle(key, value):
  return np.concatenate([[0], key, [1], value])
