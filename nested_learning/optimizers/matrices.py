"""Reads off a model which of its parameters are matrices, and along which axes.

The loss is traced once, by shapes alone, and every parameter is followed to its
products with data. Contracted axes are the inputs of a linear map, the others
its outputs; axes that are scanned, indexed or batched count maps side by side.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
from optax import contrib

from nested_learning import markdown
from nested_learning.optimizers import tracing


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
  """Says whether a parameter is a matrix, and along which of its axes.

  Attributes:
    path: Its path in the tree of parameters.
    shape: Its shape.
    rule: 'matrix', or the reason why it is none.
    dimension_numbers: The axes of the matrix; None if it is none.
  """

  path: str
  shape: tuple[int, ...]
  rule: str
  dimension_numbers: contrib.MuonDimensionNumbers | None

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """Shape [batch, reduction, output] without a batch of 1; () if none."""
    if self.dimension_numbers is None:
      return ()
    axes = (
      self.dimension_numbers.reduction_axis,
      self.dimension_numbers.output_axis,
    )
    rows, columns = (math.prod(self.shape[k] for k in group) for group in axes)
    batch = math.prod(self.shape) // (rows * columns)
    return (batch, rows, columns)[batch == 1 :]


def dimension_numbers(loss_fn: Callable[..., Any], params: Any, *args) -> Any:
  """Finds the parameters that are matrices, and their axes.

    numbers = dimension_numbers(loss_fn, params, batch)
    tx = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers)

  Args:
    loss_fn: Function of (params, *args), or of (module, *args) for an NNX
      module; its outputs may be anything.
    params: Tree of parameters or of `jax.ShapeDtypeStruct`, or an NNX module.
    *args: Further arguments of loss_fn: arrays or shapes.

  Returns:
    A tree like params, or like `nnx.state(module, nnx.Param)`, of
    `optax.contrib.MuonDimensionNumbers` with tuples of axes, and None for
    parameters that are no matrices.

  Raises:
    ValueError: If a parameter is used as two different maps, or none is a map.
  """
  structure, infos = _inspect(loss_fn, params, *args)
  if not any(info.dimension_numbers for info in infos):
    raise ValueError(
      'dimension_numbers: loss_fn has no product of a parameter with data that '
      'is a matrix; train its parameters with optax.adamw.'
    )
  return structure.unflatten([info.dimension_numbers for info in infos])


def parameter_report(
  loss_fn: Callable[..., Any], params: Any, *args
) -> 'ParameterReport':
  """Lists for every parameter whether and as which matrix it is trained.

  Args:
    loss_fn: As for `dimension_numbers`.
    params: As for `dimension_numbers`.
    *args: As for `dimension_numbers`.

  Returns:
    The `ParameterInfo` of every parameter; printed, it is a table.

  Raises:
    ValueError: If a parameter is used as two different maps.
  """
  return ParameterReport(_inspect(loss_fn, params, *args)[1])


class ParameterReport(tuple[ParameterInfo, ...]):
  """A tuple of `ParameterInfo` that prints as a table."""

  def __str__(self) -> str:
    return markdown.table(
      ('parameter', 'shape', 'rule', 'matrix'),
      [
        (
          info.path,
          str(list(info.shape)),
          info.rule,
          str(list(info.matrix_shape)) if info.matrix_shape else '',
        )
        for info in self
      ],
    )


def _inspect(loss_fn, params, *args):
  pure, params, rest = tracing.as_pure(loss_fn, params)
  jaxpr = jax.make_jaxpr(pure)(params, *rest, *args).jaxpr
  paths, structure = jax.tree.flatten_with_path(params)
  maps = tracing.find(jaxpr, [leaf for _, leaf in paths])
  infos = [
    _describe(
      tracing.name_of(path),
      tuple(leaf.shape),
      maps.uses.get(i, ()),
      maps.ends.get(i, ()),
    )
    for i, (path, leaf) in enumerate(paths)
  ]
  return structure, infos


def _describe(path, shape, uses, ends) -> ParameterInfo:
  """Decides what a parameter is from everything that a loss does with it."""
  none = lambda reason: ParameterInfo(path, shape, reason, None)
  if 0 in shape:
    return none('empty')
  if 'gather' in ends:
    return none('table')
  # Products with other parameters may be penalties; those with data decide.
  uses = [use for use in uses if not use.weak] or uses
  weak = all(use.weak for use in uses)
  candidates, reasons = [], []
  for use in uses:
    numbers, reason = _matrix_of(shape, use.roles)
    if numbers is None:
      reasons.append(reason)
    elif not any(_is_same(numbers, other) for other in candidates):
      candidates.append(numbers)
  for reason in ('grouped', 'mixed'):
    if reason in reasons:
      return none(reason)
  if len(candidates) > 1:
    raise ValueError(
      f'dimension_numbers: the parameter {path} of shape {list(shape)} is used '
      f'as two different maps, {_show(candidates[0])} and '
      f'{_show(candidates[1])}: give the dimension_numbers by hand, with the '
      'one to orthogonalise, or None.'
    )
  if candidates:
    (numbers,) = candidates
    rows, columns = numbers
    if weak and min(columns) < min(rows):
      numbers = contrib.MuonDimensionNumbers(columns, rows)
    return ParameterInfo(path, shape, 'matrix', numbers)
  if reasons:
    return none(reasons[0])
  if not ends:
    return none('unused')
  if ends <= {'add', 'sub', 'add_any'}:
    return none('bias')
  if ends <= {'mul', 'div'}:
    return none('scale')
  return none(f'only in {", ".join(sorted(ends))}')


def _matrix_of(
  shape: Sequence[int], roles: Mapping[int, set[str]]
) -> tuple[contrib.MuonDimensionNumbers | None, str]:
  """Returns the dimension numbers of one use, or the reason for none."""
  single = {}
  for axis, found in roles.items():
    if len(found) > 1:
      return None, 'grouped' if 'batch' in found else 'mixed'
    (single[axis],) = found
  rows = [k for k, role in single.items() if role == 'reduction']
  columns = [k for k, role in single.items() if role == 'output']
  if not rows or not columns:
    return None, 'vector' if not columns or not rows else ''
  # Maps side by side of the same data (experts, vmapped layers): their axis
  # stands in front of the map's own.
  behind = [k for k in columns if k > min(rows)]
  if behind:
    columns = behind
  # An axis of size 1 that no product saw is part of its neighbour.
  known = {**dict.fromkeys(rows, rows), **dict.fromkeys(columns, columns)}
  for axis in reversed(range(len(shape))):
    if axis not in single and shape[axis] == 1 and axis + 1 in known:
      group = known[axis] = known[axis + 1]
      group.append(axis)
  numbers = contrib.MuonDimensionNumbers(
    tuple(sorted(rows)), tuple(sorted(columns))
  )
  return numbers, ''


def _is_same(first, second) -> bool:
  """Returns whether two maps are equal up to the transpose."""
  return first == second or first == (second[1], second[0])


def _show(numbers) -> str:
  rows, columns = (list(axes) for axes in numbers)
  return f'axes {rows} -> {columns}'
