"""Reads parameters as stacks of matrices, by optax's dimension numbers.

A parameter [embed, heads, head_dim] whose first axis is contracted with data is
the matrix [embed, heads * head_dim]; axes that are neither contracted nor make
outputs are a stack of matrices.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning.optimizers import trees

DimensionNumbers = optax.contrib.MuonDimensionNumbers


class Axes(NamedTuple):
  """Axes of a parameter, not negative.

  Attributes:
    stack: Axes of the stack of matrices, ascending.
    reduction: Axes contracted with data.
    output: Axes that make outputs.
  """

  stack: tuple[int, ...]
  reduction: tuple[int, ...]
  output: tuple[int, ...]

  @property
  def matrix(self) -> tuple[int, ...]:
    """The axes of one matrix."""
    return self.reduction + self.output

  def sides(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and columns of one matrix: fan_in and fan_out."""
    size = lambda axes: math.prod(shape[axis] for axis in axes)
    return size(self.reduction), size(self.output)

  def count(self, shape: tuple[int, ...]) -> int:
    """Returns the number of matrices."""
    return math.prod(shape[axis] for axis in self.stack)

  def stacked(self) -> 'Axes':
    """Returns the axes of parameters like this, stacked along a new axis 0."""
    stack, *sides = [tuple(axis + 1 for axis in axes) for axes in self]
    return Axes((0, *stack), *sides)


def last_two(rank: int) -> Axes:
  """Returns the axes of a parameter whose last two axes are a matrix."""
  return Axes(tuple(range(rank - 2)), (rank - 2,), (rank - 1,))


def find(
  dimension_numbers: Any | Callable[[Any], Any] | None, params: Any
) -> Any:
  """Returns the axes of every parameter.

  Entries are found by path, so that `params` may be a part of the tree that
  the dimension numbers were made for, as inside `optax.masked`.

  Args:
    dimension_numbers: Tree of `optax.contrib.MuonDimensionNumbers` or None, a
      prefix of the tree of parameters; a function from the parameters to one;
      or None, which stands for the last two axes of every parameter.
    params: Tree of arrays.

  Returns:
    A tree like params of `Axes`, with None where the dimension numbers are
    None.

  Raises:
    ValueError: If a parameter has no dimension numbers, or they do not fit its
      shape, or they are of another type.
  """
  if dimension_numbers is None:
    dimension_numbers = DimensionNumbers(-2, -1)
  elif callable(dimension_numbers):
    dimension_numbers = dimension_numbers(params)
  entries = {}
  for path, numbers in jax.tree_util.tree_leaves_with_path(
    dimension_numbers, is_leaf=_is_entry
  ):
    if not _is_entry(numbers):
      raise ValueError(
        f'dimension_numbers has {numbers!r} at {trees.path_name(path)}: give '
        'an optax.contrib.MuonDimensionNumbers, or None for what is no matrix.'
      )
    entries[_names(path)] = numbers

  def find_axes(path, leaf):
    names = _names(path)
    for length in range(len(names), -1, -1):
      if names[:length] in entries:
        return _normalize(entries[names[:length]], path, leaf)
    known = [''.join(f'[{name!r}]' for name in entry) for entry in entries]
    shown = ', '.join(known[:4]) + (', ...' if len(known) > 4 else '')
    raise ValueError(
      f'dimension_numbers has no entry for parameter {trees.path_name(path)}; '
      f'it has {shown or "none"}: make it from the tree that is trained.'
    )

  return jax.tree_util.tree_map_with_path(find_axes, params)


def default_numbers(params: Any) -> Any:
  """Returns dimension numbers of parameters that are surely linear maps.

  Args:
    params: Tree of arrays.

  Returns:
    A tree like params: `optax.contrib.MuonDimensionNumbers` for parameters of
    rank 2 called 'kernel', as Flax calls them, None for all others.
  """

  def numbers(path, leaf):
    is_kernel = leaf.ndim == 2 and _names(path)[-1:] == ('kernel',)
    return DimensionNumbers(0, 1) if is_kernel else None

  return jax.tree_util.tree_map_with_path(numbers, params)


def to_matrices(x: jax.Array, axes: Axes) -> jax.Array:
  """Transposes and reshapes a parameter to [*stack, fan_in, fan_out]."""
  stack = [x.shape[axis] for axis in axes.stack]
  return jnp.transpose(x, axes.stack + axes.matrix).reshape(
    *stack, *axes.sides(x.shape)
  )


def from_matrices(
  y: jax.Array, axes: Axes, shape: tuple[int, ...]
) -> jax.Array:
  """Returns the inverse of `to_matrices` for a parameter of this shape."""
  order = axes.stack + axes.matrix
  y = y.reshape([shape[axis] for axis in order])
  return jnp.transpose(y, sorted(range(len(order)), key=order.__getitem__))


def _names(path):
  """Returns the names in a path, the same with and without NNX variables."""
  if path and path[-1] == jax.tree_util.GetAttrKey('value'):
    path = path[:-1]
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _is_entry(node):
  return node is None or isinstance(node, DimensionNumbers)


def _normalize(numbers, path, leaf):
  """Returns the `Axes` of a parameter; checks its dimension numbers."""
  if numbers is None:
    return None
  rank = leaf.ndim
  sides = [
    (side,) if isinstance(side, int) else tuple(side) for side in numbers
  ]
  used = [axis % rank if rank else axis for side in sides for axis in side]
  fits = all(-rank <= axis < rank for side in sides for axis in side)
  if not fits or not all(sides) or len(set(used)) < len(used):
    raise ValueError(
      f'Dimension numbers {sides} do not fit parameter {trees.path_name(path)} '
      f'of shape {leaf.shape}: give reduction and output axes, at least one '
      f'each, all different and from {-rank} to {rank - 1}.'
    )
  reduction, output = (tuple(a % rank for a in side) for side in sides)
  stack = (axis for axis in range(rank) if axis not in reduction + output)
  return Axes(tuple(stack), reduction, output)
