"""Texts with classes, cut into tasks that come one after the other."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

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


class ContinualScores(NamedTuple):
  r"""Measures of one sequence of tasks.

  Attributes:
    final: Mean score on all tasks after the last,
      :math:`\\frac{1}{T} \\sum_j R_{Tj}`.
    average: Mean over tasks i of the mean score on tasks up to i.
    forgetting: Mean over all tasks but the last of the best score before the
      last task, less the final one; Chaudhry et al., eq. 3.
    backward: Mean over all tasks but the last of the final score less that
      right after the task was learned.
    forward: Mean over all tasks but the first of the score just before the task
      is learned, less that before anything was; NaN where this is not given.
  """

  final: float
  average: float
  forgetting: float
  backward: float
  forward: float


def continual_scores(scores: Any, untrained: Any = None) -> ContinualScores:
  """Measures what is kept of tasks that were learned one after the other.

  With one task there is nothing to forget or to transfer: the last three are 0.

  Args:
    scores: [task learned, task asked]; what lies above the diagonal counts for
      forward transfer alone.
    untrained: [task], before anything was learned; None where not measured.

  Returns:
    The measures.

  Raises:
    errors.UserError: The shapes do not fit.
  """
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 2 or not scores.size or scores.shape[0] != scores.shape[1]:
    raise errors.UserError(
      f'scores have shape {scores.shape}; give a square matrix, one row for '
      'each task that was learned and one column for each that was asked.'
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
