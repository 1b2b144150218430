"""Word problems: the product of the elements of a group so far.

References:
  Merrill et al., The Illusion of State in State-Space Models,
    arXiv:2404.08819, 2024, section 5 (the groups, the labels).
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools

import numpy as np

from nested_learning.tasks import task


@dataclasses.dataclass(frozen=True)
class WordProblemConfig:
  """Random elements of a group; after x_i the target is x_1 x_2 ... x_i.

  Elements are ids from 0, the identity; targets have ids of their own behind
  them. In S5 and A5, which are not solvable, a target needs as many steps one
  after the other as there are elements.
  """

  group: str = 'S5'  # or 'S3', 'A5', 'Z2', 'Z60', 'A4xZ5'
  num_tokens: int = 16  # elements of a row

  def __post_init__(self):
    task.check_choice(self, 'group', tuple(GROUPS))
    task.check_at_least(self, 1, 'num_tokens')

  @property
  def vocab_size(self) -> int:
    """Elements, and elements as targets."""
    return 2 * len(multiplication_table(self.group))

  def make_row(self, rng, *, evaluating=False):
    """See `task.Task`."""
    del evaluating
    table = multiplication_table(self.group)
    elements = rng.integers(len(table), size=self.num_tokens)
    products = list(itertools.accumulate(elements, lambda a, b: table[a, b]))
    return task.Row(
      elements.astype(np.int32),
      (len(table) + np.array(products)).astype(np.int32),
      np.ones(self.num_tokens, bool),
    )

  def stretched(self, factor):
    """Longer words."""
    return dataclasses.replace(self, num_tokens=factor * self.num_tokens)


@functools.cache
def multiplication_table(name: str) -> np.ndarray:
  """The products of a group.

  Args:
    name: One of `GROUPS`.

  Returns:
    int [n, n], the element a b at [a, b]; element 0 is the identity.
  """
  return GROUPS[name]()


def _symmetric(size: int, *, even: bool = False) -> np.ndarray:
  """Permutations in lexical order; a b is first b, then a."""
  elements = list(itertools.permutations(range(size)))
  if even:
    elements = [p for p in elements if not _num_inversions(p) % 2]
  number = {p: i for i, p in enumerate(elements)}
  return np.array(
    [[number[tuple(a[i] for i in b)] for b in elements] for a in elements]
  )


def _num_inversions(permutation) -> int:
  return sum(a > b for a, b in itertools.combinations(permutation, 2))


def _cyclic(size: int) -> np.ndarray:
  return np.add.outer(np.arange(size), np.arange(size)) % size


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """The direct product; element (i, j) is i * len(b) + j."""
  size = len(a) * len(b)
  both = a[:, None, :, None] * len(b) + b[None, :, None, :]
  return both.reshape(size, size)


GROUPS: dict[str, Callable[[], np.ndarray]] = {
  'Z2': lambda: _cyclic(2),
  'Z60': lambda: _cyclic(60),
  'S3': lambda: _symmetric(3),
  'S5': lambda: _symmetric(5),
  'A5': lambda: _symmetric(5, even=True),
  'A4xZ5': lambda: _product(_symmetric(4, even=True), _cyclic(5)),
}
