r"""What a learner of tasks in sequence keeps, by the usual measures.

All come from one matrix: :math:`R_{ij}` is the score on task j after task i was
learned, for T tasks; :math:`b_j` the score on task j before anything was.

References:
  Lopez-Paz and Ranzato, arXiv:1706.08840, 2017 (backward, forward transfer).
  Chaudhry et al., arXiv:1801.10112, 2018 (forgetting).
"""

from typing import Any, NamedTuple

import numpy as np

from nested_learning import errors


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
