"""Tests of needles in tokens."""

import dataclasses
import re

from absl.testing import parameterized
import numpy as np

from nested_learning import tasks

_SMALL = [name for name in tasks.TASKS if re.fullmatch('niah.*_small', name)]


def _rows(task, count=20):
  for seed in range(count):
    yield task.make_row(np.random.default_rng(seed))


class TokenNeedlesTest(parameterized.TestCase):
  @parameterized.parameters(*_SMALL)
  def test_answers_are_the_values_of_the_keys_in_their_order(self, name):
    task = dataclasses.replace(tasks.TASKS[name], num_tokens=300)
    key_length, value_length = task.key_tokens, task.value_tokens
    for row in _rows(task):
      sequence = [*row.tokens, row.targets[-1]]
      question = sequence.index(2)
      found = {}
      last = 0
      for place, token in enumerate(sequence[:question]):
        if token == 0:  # the mark of a needle
          begin = place + 1 + key_length
          key = tuple(sequence[place + 1 : begin])
          self.assertEqual(sequence[begin], 1)
          value = sequence[begin + 1 : begin + 1 + value_length]
          found.setdefault(key, []).append((value, begin + value_length))
      asked = sequence[
        question + 1 : question + 1 + task.num_queries * key_length
      ]
      answer = []
      for i in range(task.num_queries):
        key = tuple(asked[i * key_length : (i + 1) * key_length])
        self.assertLen(found[key], task.num_values)
        for value, end in found[key]:
          answer += value
          last = max(last, end)
      self.assertEqual(answer, row.targets[row.mask].tolist())
      self.assertTrue(row.mask[-len(answer) :].all())
      self.assertGreaterEqual(question - last - 1, task.gap)

  def test_a_noise_haystack_repeats_itself(self):
    task = tasks.make_config('niah_single_1_small', num_tokens=300)
    hays = [r.tokens[r.tokens >= 3 + 64 + 10] for r in _rows(task)]
    for hay in hays:
      np.testing.assert_array_equal(hay[25:], hay[:-25])
      np.testing.assert_array_equal(hay, hays[0])

  def test_needles_are_anywhere_before_the_gap(self):
    task = tasks.make_config('niah_single_2_small', num_tokens=300)
    places = [r.tokens.tolist().index(0) for r in _rows(task, 300)]
    self.assertLess(min(places), 10)
    self.assertBetween(max(places), 240, 300 - task.gap - 7 - 6)
