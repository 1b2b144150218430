"""How the axes of a checkpoint's tensor turn into those of our parameter.

A turn is written like 'h d e -> e h d': axes of their tensor, then of ours;
'(h d) e -> e h d' where theirs has one axis for two of ours. It reshapes and
transposes, so that it loses no bit in either direction.
"""

from collections.abc import Mapping
import functools
import math
import re

import numpy as np


class Turn:
  """A turn of axes.

  Attributes:
    theirs: Axes of their tensor, each a tuple of letters.
    ours: Letters of our parameter's axes.
  """

  def __init__(self, text: str):
    left, right = text.split('->')
    groups = re.findall(r'\(([^)]*)\)|(\w+)', left)
    self.theirs = tuple(tuple((a or b).split()) for a, b in groups)
    self.ours = tuple(right.split())
    flat = sum(self.theirs, ())
    if sorted(flat) != sorted(self.ours):
      raise ValueError(f'{text!r} has other axes on its two sides.')
    self._order = tuple(flat.index(axis) for axis in self.ours)
    self._back = tuple(self.ours.index(axis) for axis in flat)

  def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of their tensor, from the size of every axis."""
    return tuple(
      math.prod(sizes[axis] for axis in group) for group in self.theirs
    )

  def to_ours(self, x: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    """Turns their tensor into ours, a view where NumPy can."""
    flat = sum(self.theirs, ())
    return x.reshape([sizes[axis] for axis in flat]).transpose(self._order)

  def to_theirs(self, x: np.ndarray) -> np.ndarray:
    """Turns our parameter into their tensor."""
    sizes = dict(zip(self.ours, x.shape, strict=True))
    return x.transpose(self._back).reshape(self.shape(sizes))


@functools.cache
def parse(text: str) -> Turn:
  """Returns the turn of a text; see `Turn`."""
  return Turn(text)
