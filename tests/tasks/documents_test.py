"""Tests of documents with attributes."""

import re

from absl.testing import parameterized
import numpy as np

from nested_learning import tasks


def _rows(task, count=20):
  for seed in range(count):
    yield task.make_row(np.random.default_rng(seed))


def _text(task, row):
  """Returns the text before the answer."""
  tokens = row.tokens[1 : 1 + np.flatnonzero(row.mask)[0]]
  return task.make_tokenizer().decode(tokens)


class DocumentsTest(parameterized.TestCase):
  @parameterized.product(num_readings=(1, 2), max_attributes=(4, 8))
  def test_one_line_answers_in_words(self, num_readings, max_attributes):
    task = tasks.make_config(
      'documents_small',
      num_readings=num_readings,
      max_attributes=max_attributes,
    )
    counts = set()
    for row in _rows(task, 40):
      text, asked = re.fullmatch(r'(.*) (\w+ :)', _text(task, row)).groups()
      half = len(text) // 2
      if num_readings == 2:
        self.assertEqual(text[:half], text[half + 1 :])
        text = text[:half]
      found = re.findall(r'([A-Z]\w+ :) ((?:[a-v]\w* ?)+)', text)
      found = [
        (name, re.sub(r'\bw\d+.*', '', said).strip()) for name, said in found
      ]
      counts.add(len(found))
      self.assertLen(dict(found), len(found))
      self.assertEqual(row.references, (dict(found)[asked],))
      self.assertEqual(row.question.replace(':', ' :'), asked)
      answer = task.make_tokenizer().decode(row.targets[row.mask])
      self.assertEqual(answer, row.references[0])
      self.assertEqual(row.targets[row.mask][-1], 0)
      self.assertEqual(task.score(f'It is {answer.upper()}!', row), 1.0)
      self.assertEqual(task.score('', row), 0.0)
      self.assertLessEqual(row.mask.sum(), task.answer_tokens)
    self.assertEqual(counts, set(range(4, max_attributes + 1)))

  def test_one_line_answers_in_bytes(self):
    task = tasks.make_config('documents', num_tokens=2048)
    for row in _rows(task):
      text = _text(task, row)
      *lines, asked = text.split('\n')
      found = [line.split(': ') for line in lines if ':' in line]
      self.assertBetween(len(found), 8, 40)
      self.assertGreater(len(lines), len(found))
      self.assertLen(dict(found), len(found))
      self.assertEqual(asked, row.question)
      self.assertEqual(row.references, (dict(found)[asked[:-1]],))
      answer = row.targets[row.mask]
      self.assertEqual(
        bytes(answer[:-1].tolist()).decode(), f' {row.references[0]}'
      )
      self.assertLessEqual(len(answer), task.answer_tokens)
      # As long as the row allows.
      self.assertEqual((row.tokens == 256).sum(), 1)

  def test_lines_stand_anywhere(self):
    task = tasks.make_config('documents_small', min_attributes=8)
    colon = task.make_tokenizer().encode(':')[0]
    places = [np.flatnonzero(r.tokens == colon)[:-1] for r in _rows(task, 200)]
    self.assertEqual(min(map(min, places)), 2)
    self.assertGreater(max(map(max, places)), 110)
