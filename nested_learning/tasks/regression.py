"""In-context linear regression: a function to learn from the row's own points.

References:
  Garg et al., What Can Transformers Learn In-Context?, arXiv:2208.01066, 2022,
    section 3 (the functions, the row).
"""

import dataclasses

import numpy as np

from nested_learning.tasks import task


@dataclasses.dataclass(frozen=True)
class RegressionConfig:
  """Points x_1, y_1, x_2, y_2, ... with y = w x, w and x normal.

  A row has two tokens of `num_dims` numbers for a point: x, and y in the first
  of them. At x, y is the target. w is drawn anew for every row.
  """

  num_dims: int = 20  # of x
  num_points: int = 41
  noise: float = 0.0  # standard deviation of what is added to y

  def __post_init__(self):
    task.check_at_least(self, 1, 'num_dims', 'num_points')
    task.check(self, 'noise', self.noise >= 0, 'at least 0')

  @property
  def num_tokens(self) -> int:
    """Two for each point."""
    return 2 * self.num_points

  @property
  def vocab_size(self) -> int:
    """There are no ids."""
    return 0

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task`."""
    del evaluating
    weights = rng.standard_normal(self.num_dims)
    x = rng.standard_normal((self.num_points, self.num_dims))
    y = x @ weights + self.noise * rng.standard_normal(self.num_points)
    tokens = np.zeros((self.num_tokens, self.num_dims), np.float32)
    tokens[0::2] = x
    tokens[1::2, 0] = y
    targets = np.zeros(self.num_tokens, np.float32)
    targets[0::2] = y
    return task.Row(tokens, targets, np.arange(self.num_tokens) % 2 == 0)

  def stretched(self, factor):
    """More points."""
    return dataclasses.replace(self, num_points=factor * self.num_points)
