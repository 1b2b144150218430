"""Formal languages: after each symbol, is the string so far one, or what next.

References:
  Bhattamishra et al., arXiv:2009.11264, 2020, section 4 and appendix (the
    languages, the laws of their strings, the labels).
  Irie et al., arXiv:2310.16076, 2023, section 4 (the protocol: strings of 2 to
    50 symbols, then of 51 to 100, every position has to be right).
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import numpy as np

from nested_learning.tasks import task


@dataclasses.dataclass(frozen=True)
class FormalLanguageConfig:
  """Strings of a language with a label at every position.

  A row is a string, padded on the right; its length is between `min_length`
  and `max_length`, by the language's law. Labels have ids of their own, behind
  those of the symbols.

  'parity': strings over 0, 1 with an even number of 1; the label is whether the
  prefix has. '(aa)*', '(abab)*': the label is whether the prefix is in the
  language. 'anbn', 'anbncn': the label is the set of symbols that may follow.
  'shuffle2': two kinds of brackets, each balanced; the label is which kinds are
  open.
  """

  language: str = 'parity'
  min_length: int = 2  # symbols of a string
  max_length: int = 50  # symbols of a string, and tokens of a row
  mean_length: float = 26.0  # of 'parity' before the window; the papers' L

  def __post_init__(self):
    task.check_choice(self, 'language', tuple(LANGUAGES))
    task.check_at_least(self, 1, 'min_length')
    task.check(self, 'mean_length', self.mean_length > 0, 'above 0')
    period = LANGUAGES[self.language].period
    fits = self.max_length // period * period >= self.min_length
    task.check(
      self,
      'max_length',
      self.max_length > self.min_length and fits,
      f'above min_length={self.min_length}, with a multiple of {period} '
      f'between the two, the lengths that strings of {self.language} have',
    )

  @property
  def num_tokens(self) -> int:
    """Tokens of a row: the longest string."""
    return self.max_length

  @property
  def vocab_size(self) -> int:
    """Symbols and labels."""
    language = LANGUAGES[self.language]
    return language.num_symbols + language.num_labels

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task`."""
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
    """Strings longer than factor - 1 and up to factor times the longest."""
    return dataclasses.replace(
      self,
      min_length=(factor - 1) * self.max_length + 1,
      max_length=factor * self.max_length,
    )


def _draw_parity(rng, config):
  """Symbols until a stop of constant probability; odd strings get a 1."""
  low, high = config.min_length, config.max_length
  keep = config.mean_length / (1 + config.mean_length)
  while True:
    # The law of the length, given that it is at least `low`.
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
  """S -> open S close (1/2), S S (1/4) or nothing, cut at the longest."""
  while True:
    string = _expand(rng, config.max_length)
    if len(string) >= config.min_length:
      return np.array(string)


def _expand(rng, max_length):
  """One string of the grammar; parts that become too long become nothing."""
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
  """0: the first symbol or the next; k: only symbol k; at the end, nothing."""
  count = len(string) // (string.max() + 1)
  number = 1 + np.arange(len(string))
  return np.where(number <= count, 0, number // count)


def _label_shuffle(string):
  """Two bits: whether a bracket of the first, of the second kind is open."""
  step = 1 - 2 * (string % 2)
  opened = [np.cumsum(step * (string // 2 == kind)) > 0 for kind in range(2)]
  return opened[0] + 2 * opened[1]


class Language(NamedTuple):
  """How strings of a language are drawn and labelled.

  Attributes:
    num_symbols: Ids of its symbols are below it.
    num_labels: Labels are below it.
    period: Lengths of strings are multiples of it.
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
