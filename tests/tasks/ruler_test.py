"""Tests of needles in text."""

import dataclasses
import re

from absl.testing import parameterized
import numpy as np

from nested_learning import errors
from nested_learning import tasks
from nested_learning.tasks import words

_NAMES = [
  name
  for name, task in tasks.TASKS.items()
  if isinstance(task, tasks.RulerConfig)
]


def _rows(task, count=20):
  for seed in range(count):
    yield task.make_row(np.random.default_rng(seed))


class TextNeedlesTest(parameterized.TestCase):
  @parameterized.parameters(*_NAMES)
  def test_prompts_ask_for_what_they_hide(self, name):
    task = dataclasses.replace(tasks.TASKS[name], num_tokens=2048)
    kind = task.value_type
    for row in _rows(task, 6):
      text = bytes(row.tokens[1:][row.tokens[1:] < 256].tolist()).decode()
      text, _, _ = text.partition(row.question)
      self.assertStartsWith(
        text, 'A special' if len(row.references) == 1 else 'Some special magic'
      )
      found = re.findall(
        rf'One of the special magic {kind} for (\S+) is: (\S+)\.', text
      )
      names = re.search(r'for (.+?) mentioned', row.question).group(1)
      asked = re.split(r', and |, ', names)
      values = [v for key in asked for k, v in found if k == key]
      self.assertCountEqual(values, row.references)
      self.assertLen(values, task.num_queries * task.num_values)
      end = max(text.index(value) + len(value) for value in values)
      self.assertGreaterEqual(len(text) - end, task.gap)
      answer = row.targets[row.mask]
      self.assertEqual(answer[-1], 256)
      self.assertEqual(
        bytes(answer[:-1].tolist()).decode(),
        ' ' + ', '.join(row.references) + '.',
      )
      self.assertEqual(task.score(', '.join(row.references).upper(), row), 1.0)
      # As long as the row allows: one more unit of hay would not fit.
      padding = (row.tokens == 256).sum()
      self.assertLess(padding, 1000 if task.haystack == 'essay' else 200)

  def test_the_exact_prompt(self):
    task = tasks.make_config('niah_single_1', num_tokens=700)
    (row,) = _rows(task, 1)
    text = bytes(row.tokens[1:][row.tokens[1:] < 256].tolist()).decode()
    noise = (
      'The grass is green. The sky is blue. The sun is yellow. Here we go. '
      'There and back again.'
    )
    self.assertStartsWith(
      text,
      'A special magic number is hidden within the following text. Make sure '
      'to memorize it. I will quiz you about the number afterwards.\n',
    )
    lines = text.split('\n')
    key = re.search(r'numbers for (\S+) is', text).group(1)
    self.assertEqual(
      lines[-1].removesuffix(f' {row.references[0]}.'),
      f'What is the special magic number for {key} mentioned in the provided '
      f'text? The special magic number for {key} mentioned in the provided '
      'text is',
    )
    self.assertEqual(
      set(lines[1:-1]) - {noise},
      {f'One of the special magic numbers for {key} is: {row.references[0]}.'},
    )

  def test_needs_room(self):
    task = tasks.make_config('niah_single_1', num_tokens=300)
    with self.assertRaisesRegex(errors.UserError, 'num_tokens=300 has no room'):
      task.make_row(np.random.default_rng(0))

  def test_haystacks_are_the_users_text(self):
    file = self.create_tempfile('essay.txt', 'One thing. ' * 40 + 'Two things!')
    task = tasks.make_config(
      'niah_single_2', num_tokens=1000, source=file.full_path
    )
    (row,) = _rows(task, 1)
    text = bytes(row.tokens[row.tokens < 256].tolist()).decode()
    self.assertIn('One thing. One thing.', text)
    empty = self.create_tempfile('empty.txt', 'Nothing')
    with self.assertRaisesRegex(errors.UserError, 'has no sentences'):
      words.load_sentences(empty.full_path)

  def test_string_match_counts_references(self):
    self.assertEqual(words.string_match_all('12 and AB', ('12', 'ab')), 1.0)
    self.assertEqual(words.string_match_all('12', ('12', 'ab')), 0.5)
