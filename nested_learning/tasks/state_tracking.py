"""Tasks that need a state: formal languages and products in a group.

References:
  Bhattamishra et al., arXiv:2009.11264, 2020, section 4 and appendix (the
    languages, the laws of their strings, the labels).
  Irie et al., arXiv:2310.16076, 2023, section 4 (the protocol: strings of 2 to
    50 symbols, then of 51 to 100, every position has to be right).
  Merrill et al., The Illusion of State in State-Space Models,
    arXiv:2404.08819, 2024, section 5 (the groups, the labels).
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
from typing import Literal, NamedTuple

import numpy as np

from nested_learning import errors
from nested_learning.tasks import task

# The papers' L: mean length of strings of 'parity', before strings outside of
# the window are dropped.
_MEAN_LENGTH = 26


@dataclasses.dataclass(frozen=True)
class FormalLanguageConfig:
  """Strings of a formal language with a label at every position.

  A row is a string, padded on the right; its length is between `min_length`
  and `max_length`, by the language's law. Labels have ids of their own, behind
  those of the symbols.

  'parity': strings over 0, 1 with an even number of 1; the label is whether the
  prefix has. '(aa)*', '(abab)*': the label is whether the prefix is in the
  language. 'anbn', 'anbncn': the label is the set of symbols that may follow.
  'shuffle2': two kinds of brackets, each balanced; the label is which kinds are
  open.
  """

  language: Literal[
    'parity', '(aa)*', '(abab)*', 'anbn', 'anbncn', 'shuffle2'
  ] = 'parity'
  min_length: int = 2  # symbols of a string
  max_length: int = 50  # symbols of a string, and tokens of a row

  def __post_init__(self):
    errors.check_choices(self)
    task.check_at_least(self, 1, 'min_length')
    period = LANGUAGES[self.language].period
    fits = self.max_length // period * period >= self.min_length
    errors.check_field(
      self,
      'max_length',
      self.max_length > self.min_length and fits,
      f'above min_length={self.min_length}, with a multiple of {period} '
      f'between the two, the lengths that strings of {self.language} have',
    )

  @property
  def num_tokens(self) -> int:
    """Length of a row, that of the longest string."""
    return self.max_length

  @property
  def vocab_size(self) -> int:
    """Number of symbols and labels."""
    language = LANGUAGES[self.language]
    return language.num_symbols + language.num_labels

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    language = LANGUAGES[self.language]
    string = np.asarray(language.draw(rng, self), np.int32)
    labels = language.num_symbols + language.label(string)
    padding = (0, self.max_length - len(string))
    mask = np.arange(self.max_length) < len(string)
    return task.Row(
      np.pad(string, padding), np.pad(labels, padding).astype(np.int32), mask
    )

  def stretched(self, factor):
    """Returns the task with lengths in (factor - 1, factor] * max_length."""
    return dataclasses.replace(
      self,
      min_length=(factor - 1) * self.max_length + 1,
      max_length=factor * self.max_length,
    )


def _draw_parity(rng, config):
  """Draws symbols until a stop of constant probability; odd ones get a 1."""
  low, high = config.min_length, config.max_length
  keep = _MEAN_LENGTH / (1 + _MEAN_LENGTH)
  while True:
    # The geometric law, given that the length is at least `low`.
    length = min(low + rng.geometric(1 - keep) - 1, high)
    string = rng.integers(2, size=length)
    if string.sum() % 2:
      string = np.append(string, 1)
    if len(string) <= high:
      return string


def _draw_periods(period):
  def draw(rng, config):
    while True:
      length = rng.integers(config.min_length, config.max_length + 1)
      length -= length % period
      if length >= config.min_length:
        return np.arange(length) % 2 if period == 4 else np.zeros(length, int)

  return draw


def _draw_counters(num_symbols):
  def draw(rng, config):
    smallest = -(-config.min_length // num_symbols)
    largest = config.max_length // num_symbols
    return np.repeat(
      np.arange(num_symbols), rng.integers(smallest, largest + 1)
    )

  return draw


def _draw_shuffle(rng, config):
  """Draws S -> open S close (1/2), S S (1/4) or empty (1/4)."""
  while True:
    string = _expand(rng, config.max_length)
    if len(string) >= config.min_length:
      return np.array(string)


def _expand(rng, max_length):
  """Draws a string of the grammar; parts that are too long become empty."""
  todo, done = [('expand', 0)], []
  while todo:
    what, number = todo.pop()
    if what == 'expand':
      chance = rng.random() if number < max_length else 1.0
      if chance < 0.5:
        todo += [('wrap', int(rng.integers(2))), ('expand', number + 2)]
      elif chance < 0.75:
        todo += [('join', 0), ('expand', number), ('expand', number)]
      else:
        done.append([])
      continue
    part = done.pop()
    if what == 'wrap':
      part = [2 * number, *part, 2 * number + 1]
    else:
      part = done.pop() + part
    done.append(part if len(part) <= max_length else [])
  return done.pop()


def _label_counters(string):
  """Labels: 0, the first symbol or the next; k, only symbol k, or the end."""
  count = len(string) // (string.max() + 1)
  number = 1 + np.arange(len(string))
  return np.where(number <= count, 0, number // count)


def _label_shuffle(string):
  """Labels of two bits: whether a bracket of either kind is open."""
  step = 1 - 2 * (string % 2)
  opened = [np.cumsum(step * (string // 2 == kind)) > 0 for kind in range(2)]
  return opened[0] + 2 * opened[1]


class Language(NamedTuple):
  """Draws and labels strings of a language.

  Attributes:
    num_symbols: Number of symbols.
    num_labels: Number of labels.
    period: Divides the length of every string.
    draw: `draw(rng, config)` -> int [n].
    label: int [n] -> int [n].
  """

  num_symbols: int
  num_labels: int
  period: int
  draw: Callable
  label: Callable[[np.ndarray], np.ndarray]


LANGUAGES = {
  'parity': Language(
    2, 2, 1, _draw_parity, lambda s: (np.cumsum(s) % 2 == 0).astype(int)
  ),
  '(aa)*': Language(1, 2, 2, _draw_periods(2), lambda s: np.arange(len(s)) % 2),
  '(abab)*': Language(
    2,
    2,
    4,
    _draw_periods(4),
    lambda s: (np.arange(len(s)) % 4 == 3).astype(int),
  ),
  'anbn': Language(2, 3, 2, _draw_counters(2), _label_counters),
  'anbncn': Language(3, 4, 3, _draw_counters(3), _label_counters),
  'shuffle2': Language(4, 4, 2, _draw_shuffle, _label_shuffle),
}


@dataclasses.dataclass(frozen=True)
class WordProblemConfig:
  """Word problem: random elements of a group; the target is x_1 x_2 ... x_i.

  Elements are ids from 0, the identity; the ids of targets follow them. S5 and
  A5 are not solvable, so a target needs as many sequential steps as there are
  elements.
  """

  group: Literal['Z2', 'Z60', 'S3', 'S5', 'A5', 'A4xZ5'] = 'S5'
  num_tokens: int = 16  # elements of a row

  def __post_init__(self):
    errors.check_choices(self)
    task.check_at_least(self, 1, 'num_tokens')

  @property
  def vocab_size(self) -> int:
    """Twice the number of elements."""
    return 2 * len(multiplication_table(self.group))

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task.make_row`."""
    del evaluating
    table = multiplication_table(self.group)
    elements = rng.integers(len(table), size=self.num_tokens)
    products = list(itertools.accumulate(elements, lambda a, b: table[a, b]))
    return task.Row(
      elements.astype(np.int32),
      (len(table) + np.array(products)).astype(np.int32),
      np.ones(self.num_tokens, bool),
    )

  def stretched(self, factor):
    """Returns the task with longer words."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@functools.cache
def multiplication_table(name: str) -> np.ndarray:
  """Returns the products of a group.

  Args:
    name: One of `GROUPS`.

  Returns:
    int [n, n], the element a b at [a, b]; element 0 is the identity.
  """
  return GROUPS[name]()


def _symmetric(size: int, *, even: bool = False) -> np.ndarray:
  """Returns the table of permutations in lexical order; a b applies b first."""
  elements = list(itertools.permutations(range(size)))
  if even:
    elements = [p for p in elements if not _num_inversions(p) % 2]
  number = {p: i for i, p in enumerate(elements)}
  return np.array(
    [[number[tuple(a[i] for i in b)] for b in elements] for a in elements]
  )


def _num_inversions(permutation) -> int:
  return sum(a > b for a, b in itertools.combinations(permutation, 2))


def _cyclic(size: int) -> np.ndarray:
  return np.add.outer(np.arange(size), np.arange(size)) % size


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns the direct product; element (i, j) is i * len(b) + j."""
  size = len(a) * len(b)
  both = a[:, None, :, None] * len(b) + b[None, :, None, :]
  return both.reshape(size, size)


GROUPS: dict[str, Callable[[], np.ndarray]] = {
  'Z2': lambda: _cyclic(2),
  'Z60': lambda: _cyclic(60),
  'S3': lambda: _symmetric(3),
  'S5': lambda: _symmetric(5),
  'A5': lambda: _symmetric(5, even=True),
  'A4xZ5': lambda: _product(_symmetric(4, even=True), _cyclic(5)),
}
