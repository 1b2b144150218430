r"""Texts with classes, cut into tasks in sequence, and their scores.

All measures come from one matrix: :math:`R_{ij}` is the score on task j after
task i was learned, for T tasks, and :math:`b_j` the score on task j before any.

References:
  Lopez-Paz and Ranzato, arXiv:1706.08840, 2017 (backward, forward transfer).
  Chaudhry et al., arXiv:1801.10112, 2018 (forgetting).
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from experiments.continual import classifier
from experiments.continual import intents
from nested_learning import errors


@dataclasses.dataclass(frozen=True)
class Tasks:
  """A corpus cut into tasks, with an order of classes for each seed.

  Attributes:
    words: Vocabulary of the tokens.
    texts: Texts of training and of test.
    train: Examples with classes, int [text, EXAMPLE].
    test: The same for the test.
    task_of: Task of each class, int [seed, class].
  """

  words: classifier.Words
  texts: tuple[list[str], list[str]]
  train: np.ndarray
  test: np.ndarray
  task_of: np.ndarray

  @property
  def num_seeds(self) -> int:
    """Number of orders of classes."""
    return len(self.task_of)

  @property
  def num_tasks(self) -> int:
    """Number of tasks."""
    return self.task_of.max() + 1

  def part(self, seed: int, task: int) -> np.ndarray:
    """Returns the indices of a task's texts in `train`."""
    return np.flatnonzero(self.task_of[seed, self.train[:, -1]] == task)

  def seen(self, task: int) -> np.ndarray:
    """Returns which tokens are classes seen by the end of a task, [seed, v]."""
    rest = self.words.vocab_size - self.words.num_classes
    return np.pad(self.task_of <= task, ((0, 0), (0, rest)))

  def score(self, answer: Callable[[np.ndarray], Any], task: int) -> np.ndarray:
    """Returns the accuracy on each task after learning one, [seed, task].

    Args:
      answer: Returns answers [seed, test], given which tokens are candidates
        [seed, v].
      task: The last task learned; -1 for none. Candidates for tasks learned so
        far are the classes seen so far, and for later tasks all classes.
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
    num_classes: Number of classes; drawn at random if the corpus has more.
    num_tasks: Number of tasks, with equally many classes.
    num_words: Number of places that words are hashed to.
    num_seeds: Number of orders of classes.
    train_per_class: Maximum number of training texts of a class.
    test_per_class: Maximum number of test texts of a class.

  Returns:
    `Tasks`.

  Raises:
    errors.UserError: The corpus has fewer classes, or num_tasks does not divide
      them.
  """
  if num_classes > len(corpus.names):
    raise errors.UserError(
      f'num_classes={num_classes}, but the corpus has {len(corpus.names)}; '
      'lower it.'
    )
  if num_classes % num_tasks:
    raise errors.UserError(
      f'num_classes={num_classes} is no multiple of num_tasks={num_tasks}; '
      'change one of them.'
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


class ContinualScores(NamedTuple):
  r"""Measures of one sequence of tasks.

  Attributes:
    final: Mean score on all tasks after the last,
      :math:`\\frac{1}{T} \\sum_j R_{Tj}`.
    average: Mean over tasks i of the mean score on tasks up to i.
    forgetting: Best score before the last task minus the final score, averaged
      over all tasks but the last; Chaudhry et al., eq. 3.
    backward: Final score minus the score right after the task was learned,
      averaged over all tasks but the last.
    forward: Score just before the task is learned minus the score before any
      task, averaged over all tasks but the first; NaN if `untrained` is None.
  """

  final: float
  average: float
  forgetting: float
  backward: float
  forward: float


def continual_scores(scores: Any, untrained: Any = None) -> ContinualScores:
  """Computes accuracy, forgetting and transfer of tasks in sequence.

  With one task, forgetting and both kinds of transfer are 0.

  Args:
    scores: Scores [task learned, task asked]. Entries above the diagonal count
      only for forward transfer.
    untrained: Scores [task] before any task; None if not measured.

  Returns:
    The measures.

  Raises:
    errors.UserError: The shapes do not fit.
  """
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 2 or not scores.size or scores.shape[0] != scores.shape[1]:
    raise errors.UserError(
      f'scores have shape {scores.shape}; give a square matrix, with a row per '
      'task learned and a column per task asked.'
    )
  num_tasks = len(scores)
  up_to = [np.mean(row[: i + 1]) for i, row in enumerate(scores)]
  measures = {
    'final': np.mean(scores[-1]),
    'average': np.mean(up_to),
    'forgetting': 0.0,
    'backward': 0.0,
    'forward': 0.0 if num_tasks == 1 else np.nan,
  }
  if num_tasks > 1:
    last = scores[-1, :-1]
    measures['forgetting'] = np.mean(np.max(scores[:-1, :-1], axis=0) - last)
    measures['backward'] = np.mean(last - np.diag(scores)[:-1])
  if untrained is not None:
    untrained = np.asarray(untrained, np.float64)
    if untrained.shape != (num_tasks,):
      raise errors.UserError(
        f'untrained has shape {untrained.shape}; give one score for each of '
        f'{num_tasks} tasks.'
      )
    if num_tasks > 1:
      before = np.diag(scores, 1) - untrained[1:]
      measures['forward'] = np.mean(before)
  return ContinualScores(**{k: float(v) for k, v in measures.items()})
