"""Needles in tokens and in text, and stories, against what they mean."""

import dataclasses
import re

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from nested_learning import errors
from nested_learning import tasks
from nested_learning.tasks import scoring
from nested_learning.tasks import words

_SMALL = [name for name in tasks.TASKS if re.fullmatch('niah.*_small', name)]
_TEXT = [name.removesuffix('_small') for name in _SMALL]


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


class TextNeedlesTest(parameterized.TestCase):
  @parameterized.parameters(*_TEXT)
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
    self.assertEqual(scoring.string_match_all('12 and AB', ('12', 'ab')), 1.0)
    self.assertEqual(scoring.string_match_all('12', ('12', 'ab')), 0.5)


class StoriesTest(parameterized.TestCase):
  @parameterized.product(
    question=('qa1', 'qa2', 'qa3'), vocabulary=('words', 'bytes')
  )
  def test_facts_answer_the_question(self, question, vocabulary):
    num_tokens = 512 if vocabulary == 'words' else 2048
    task = tasks.StoryConfig(
      question, num_tokens, num_facts=14, vocabulary=vocabulary
    )
    tokenizer = task.make_tokenizer()
    for row in _rows(task):
      tokens = row.tokens[: 1 + np.flatnonzero(row.mask)[0]]
      text = tokenizer.decode(tokens)
      text = text.replace(' .', '.').replace(' ?', '?')
      text = text[: text.rindex('?') + 1]
      self.assertEndsWith(text, row.question)
      facts = re.findall(
        r'(?:Mary|John|Sandra|Daniel) [a-z ]+? (?:the) \w+(?: there)?\.', text
      )
      self.assertLen(facts, 14)
      at, holder, been = {}, {}, {}
      for fact in facts:
        name, thing = fact.split()[0], fact.rstrip('.').split()
        if fact.endswith('there.'):
          thing = thing[-2]
          if re.search(r'took|grabbed|picked up|got', fact):
            holder[thing] = name
            been.setdefault(thing, [at[name]])
          else:
            self.assertEqual(holder.pop(thing), name)
          self.assertEqual(been[thing][-1], at[name])
          continue
        at[name] = thing[-1]
        for held in [t for t, who in holder.items() if who == name]:
          been[held].append(at[name])
      words_asked = row.question.rstrip('?').split()
      if question == 'qa1':
        expected = at[words_asked[-1]]
      elif question == 'qa2':
        expected = been[words_asked[-1]][-1]
      else:
        places = been[words_asked[3]]
        expected = places[places.index(words_asked[-1]) - 1]
      self.assertEqual(row.references, (expected,))
      answer = tokenizer.decode(row.targets[row.mask]).strip()
      self.assertEqual(answer, expected)
      self.assertEqual(task.score(f'the {answer}. kitchen', row), 1.0)
      self.assertEqual(task.score('bathroom, office or garden', row), 0.0)
      behind = text[text.index(facts[-1]) + len(facts[-1]) :]
      behind = behind.removesuffix(row.question)
      self.assertGreaterEqual(len(tokenizer.encode(behind)) + 1, task.gap)

  def test_labels_of_the_question_do_not_count(self):
    score = lambda output: scoring.names_only(
      output,
      'garden',
      question='Where was the milk before the kitchen?',
      labels=('garden', 'kitchen', 'office'),
    )
    self.assertEqual(score('Before the kitchen, the Garden. office'), 1.0)
    self.assertEqual(score('the garden, the office'), 0.0)
    self.assertEqual(score('nowhere'), 0.0)


if __name__ == '__main__':
  absltest.main()
