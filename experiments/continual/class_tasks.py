"""Texts with classes, cut into tasks that come one after the other."""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from experiments.continual import classifier
from experiments.continual import intents
from nested_learning import errors


@dataclasses.dataclass(frozen=True)
class Tasks:
  """A corpus cut into tasks, in one order of classes for each seed.

  Attributes:
    words: What tokens are.
    texts: Of training and test, one string each.
    train: [text, EXAMPLE], with classes.
    test: The same.
    task_of: [seed, class], when it comes.
  """

  words: classifier.Words
  texts: tuple[list[str], list[str]]
  train: np.ndarray
  test: np.ndarray
  task_of: np.ndarray

  @property
  def num_seeds(self) -> int:
    """Orders of classes."""
    return len(self.task_of)

  @property
  def num_tasks(self) -> int:
    """Tasks that classes come in."""
    return self.task_of.max() + 1

  def part(self, seed: int, task: int) -> np.ndarray:
    """Places of the texts of a task in `train`."""
    return np.flatnonzero(self.task_of[seed, self.train[:, -1]] == task)

  def seen(self, task: int) -> np.ndarray:
    """Which tokens are classes that have come by a task, [seed, v]."""
    rest = self.words.vocab_size - self.words.num_classes
    return np.pad(self.task_of <= task, ((0, 0), (0, rest)))

  def score(self, answer: Callable[[np.ndarray], Any], task: int) -> np.ndarray:
    """Share of right answers in each task after one, [seed, task].

    Args:
      answer: From which tokens may be answered [seed, v] to answers
        [seed, test].
      task: The last that came; -1 is none. Candidates for what came are the
        classes that came, and for what did not, all classes.
    """
    labels, num_tasks = self.test[:, -1], self.num_tasks
    tasks = self.task_of[:, labels]
    right = np.asarray(answer(self.seen(num_tasks - 1))) == labels
    if 0 <= task < num_tasks - 1:
      seen = np.asarray(answer(self.seen(task))) == labels
      right = np.where(tasks <= task, seen, right)
    return np.stack(
      [
        np.sum(right & (tasks == t), axis=1) / np.sum(tasks == t, axis=1)
        for t in range(num_tasks)
      ],
      axis=1,
    )


def make_tasks(
  corpus: intents.Corpus,
  *,
  num_classes: int,
  num_tasks: int,
  num_words: int,
  num_seeds: int,
  train_per_class: int,
  test_per_class: int,
) -> Tasks:
  """Cuts a corpus into tasks.

  Args:
    corpus: The corpus.
    num_classes: Classes that are taken, at random where it has more.
    num_tasks: Tasks, of as many classes each.
    num_words: Places that words are hashed to.
    num_seeds: Orders of classes.
    train_per_class: Texts to learn from, at most.
    test_per_class: Texts to be asked, at most.

  Returns:
    `Tasks`.

  Raises:
    errors.UserError: The corpus has fewer classes, or tasks would be unequal.
  """
  if num_classes > len(corpus.names):
    raise errors.UserError(
      f'num_classes={num_classes}, but the corpus has {len(corpus.names)}; '
      'lower it.'
    )
  if num_classes % num_tasks:
    raise errors.UserError(
      f'num_classes={num_classes} is no multiple of num_tasks={num_tasks}; '
      'change one.'
    )
  rng = np.random.default_rng(0)
  chosen = np.arange(len(corpus.names))
  if num_classes < len(chosen):
    chosen = np.sort(rng.choice(len(chosen), num_classes, replace=False))
  words = classifier.Words(num_classes, num_words)

  def take(texts, labels, count):
    places = [
      rng.permutation(np.flatnonzero(labels == name))[:count] for name in chosen
    ]
    tokens = words.encode([texts[i] for i in np.concatenate(places)])
    tokens[:, -1] = np.repeat(np.arange(len(chosen)), [*map(len, places)])
    return [texts[i] for i in np.concatenate(places)], tokens

  train_texts, train = take(corpus.train, corpus.train_labels, train_per_class)
  test_texts, test = take(corpus.test, corpus.test_labels, test_per_class)
  orders = [
    np.random.default_rng((2, seed)).permutation(num_classes)
    // (num_classes // num_tasks)
    for seed in range(num_seeds)
  ]
  return Tasks(words, (train_texts, test_texts), train, test, np.stack(orders))
