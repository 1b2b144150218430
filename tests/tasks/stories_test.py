"""Tests of stories."""

import re

from absl.testing import parameterized
import numpy as np

from nested_learning import tasks
from nested_learning.tasks import words


def _rows(task, count=20):
  for seed in range(count):
    yield task.make_row(np.random.default_rng(seed))


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
    score = lambda output: words.names_only(
      output,
      'garden',
      question='Where was the milk before the kitchen?',
      labels=('garden', 'kitchen', 'office'),
    )
    self.assertEqual(score('Before the kitchen, the Garden. office'), 1.0)
    self.assertEqual(score('the garden, the office'), 0.0)
    self.assertEqual(score('nowhere'), 0.0)
