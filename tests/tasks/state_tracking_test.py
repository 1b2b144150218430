"""Tests of formal languages and word problems."""

import itertools
import re

from absl.testing import parameterized
import numpy as np

from nested_learning import tasks
from nested_learning.tasks import state_tracking

_BINS = ((2, 50), (51, 100), (151, 200))


def _strings(language, low, high, count=60):
  """Yields strings with the labels of their prefixes, counted from 0."""
  task = tasks.FormalLanguageConfig(language, low, high)
  letters = '()[]' if language == 'shuffle2' else 'abc'
  letters = '01' if language == 'parity' else letters
  num_symbols = {'(aa)*': 1, 'anbncn': 3, 'shuffle2': 4}.get(language, 2)
  for seed in range(count):
    row = task.make_row(np.random.default_rng(seed))
    length = int(row.mask.sum())
    assert row.mask[:length].all()
    assert low <= length <= high
    text = ''.join(letters[token] for token in row.tokens[:length])
    yield text, (row.targets[:length] - num_symbols).tolist()


class FormalLanguagesTest(parameterized.TestCase):
  @parameterized.product(window=_BINS)
  def test_parity(self, window):
    for text, labels in _strings('parity', *window):
      self.assertEqual(text.count('1') % 2, 0)
      for i, label in enumerate(labels):
        self.assertEqual(label, text[: i + 1].count('1') % 2 == 0)

  @parameterized.product(
    window=_BINS, word=(('(aa)*', 'aa'), ('(abab)*', 'abab'))
  )
  def test_periods(self, window, word):
    language, period = word
    for text, labels in _strings(language, *window):
      self.assertEqual(text, period * (len(text) // len(period)))
      for i, label in enumerate(labels):
        whole = re.fullmatch(f'({period})*', text[: i + 1])
        self.assertEqual(label, whole is not None)

  @parameterized.product(window=_BINS, letters=('ab', 'abc'))
  def test_counters(self, window, letters):
    language = ''.join(f'{letter}n' for letter in letters)
    for text, labels in _strings(language, *window):
      count = len(text) // len(letters)
      self.assertEqual(text, ''.join(count * letter for letter in letters))
      for i, label in enumerate(labels):
        read = [text[: i + 1].count(letter) for letter in letters]
        if read[1] == 0:
          follows = 0  # a or b
        elif read[-1] == count:
          follows = len(letters)  # the end
        else:  # what there are fewer of than of a
          follows = [number < count for number in read].index(True)
        self.assertEqual(label, follows)

  @parameterized.product(window=_BINS)
  def test_shuffle(self, window):
    for text, labels in _strings('shuffle2', *window, count=20):
      for kind in ('()', '[]'):
        depth = np.cumsum([(c == kind[0]) * 1 - (c == kind[1]) for c in text])
        self.assertEqual(depth[-1], 0)
        self.assertGreaterEqual(min(depth), 0)
      for i, label in enumerate(labels):
        opened = [
          text[: i + 1].count(a) > text[: i + 1].count(b)
          for a, b in ('()', '[]')
        ]
        self.assertEqual(label, opened[0] + 2 * opened[1])

  def test_lengths_of_parity_follow_their_law(self):
    lengths = [len(text) for text, _ in _strings('parity', 2, 50, 3000)]
    # Half of the strings are odd: they get a symbol, or do not fit.
    share = np.zeros(52)
    for length in range(2, 51):
      drawn = (26 / 27) ** (length - 2) * (1 if length == 50 else 1 / 27)
      share[[length, length + 1]] += drawn / 2
    expected = share[:51] @ np.arange(51) / share[:51].sum()
    self.assertAlmostEqual(np.mean(lengths), expected, delta=0.8)

  def test_stretching_gives_the_next_bin(self):
    task = tasks.make_config('parity').stretched(2)
    self.assertEqual((task.min_length, task.max_length), (51, 100))


class WordProblemTest(parameterized.TestCase):
  @parameterized.parameters(
    ('Z2', 2), ('Z60', 60), ('S3', 6), ('S5', 120), ('A5', 60), ('A4xZ5', 60)
  )
  def test_is_a_group(self, name, order):
    table = state_tracking.multiplication_table(name)
    self.assertEqual(table.shape, (order, order))
    np.testing.assert_array_equal(table[0], np.arange(order))
    np.testing.assert_array_equal(table[:, 0], np.arange(order))
    for line in (*table, *table.T):
      self.assertLen(set(line), order)
    left = table[table[:, :, None], np.arange(order)]
    right = table[np.arange(order)[:, None, None], table]
    np.testing.assert_array_equal(left, right)

  def test_only_cyclic_groups_commute(self):
    for name in state_tracking.GROUPS:
      table = state_tracking.multiplication_table(name)
      self.assertEqual((table == table.T).all(), name[0] == 'Z')

  def test_targets_are_products(self):
    task = tasks.WordProblemConfig('A5', 12)
    table = state_tracking.multiplication_table('A5')
    for seed in range(5):
      row = task.make_row(np.random.default_rng(seed))
      products = itertools.accumulate(row.tokens, lambda a, b: table[a, b])
      self.assertEqual((row.targets - 60).tolist(), list(products))
