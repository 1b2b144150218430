"""Reads off a model which of its parameters are matrices, and along which axes.

The loss is traced once, by shapes alone, and every parameter is followed to its
products with data. Contracted axes are the inputs of a linear map, the others
its outputs; axes that are scanned, indexed or batched count maps side by side.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
from optax import contrib

from nested_learning import markdown
from nested_learning.optimizers.tracing import interpreter
from nested_learning.optimizers.tracing import usage

_TWO_MAPS = 'two maps'
# Kinds of parameters without products, by the operations that they enter.
_KINDS = {
  'input': set(usage.PRODUCTS),
  'scale': {'div', 'mul'},
  'bias': {'add', 'add_any', 'sub'},
  'concatenated with data': {'concatenate'},
}


@dataclasses.dataclass(frozen=True)
class ParameterInfo:
  """Says what a parameter is, and which axes make it a matrix.

  Attributes:
    path: Its path in the tree of parameters.
    shape: Its shape.
    kind: 'matrix', or why it is none: 'table' (looked up by rows), 'bias',
      'scale', 'vector' (no axis of inputs, or none of outputs), 'depthwise',
      'groups' (maps side by side within one axis), 'mixed axes' (inputs and
      outputs within one axis), 'two maps' (used with different axes), 'input'
      (multiplied by weights, as data is), 'empty', 'unused', or other
      operations that it enters.
    dimension_numbers: The axes of the matrix; None if it is none.
    dgd: 'map' if `dgd_for_model` captures its inputs, else 'fallback', with the
      operations after which a matrix cannot be followed.
  """

  path: str
  shape: tuple[int, ...]
  kind: str
  dimension_numbers: contrib.MuonDimensionNumbers | None
  dgd: str

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
  for info in infos:
    if info.kind.startswith(_TWO_MAPS):
      raise ValueError(
        f'dimension_numbers: the parameter {info.path} of shape '
        f'{list(info.shape)} is used as {info.kind}: give dimension_numbers by '
        'hand, with one of the two, or None to leave it to Adam.'
      )
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
  """
  return ParameterReport(_inspect(loss_fn, params, *args)[1])


class ParameterReport(tuple[ParameterInfo, ...]):
  """A tuple of `ParameterInfo` that prints as a table."""

  def __str__(self) -> str:
    return markdown.table(
      ('parameter', 'shape', 'kind', 'matrix', 'm3', 'dgd'),
      [
        (
          info.path,
          str(list(info.shape)),
          info.kind,
          str(list(info.matrix_shape)) if info.matrix_shape else '',
          'matrix' if info.dimension_numbers else 'adam',
          info.dgd,
        )
        for info in self
      ],
    )


def _inspect(loss_fn, params, *args):
  """Returns the tree structure of the parameters and what each of them is."""
  pure, params, rest = interpreter.as_pure(loss_fn, params)
  jaxpr = jax.make_jaxpr(pure)(params, *rest, *args).jaxpr
  is_variable = lambda node: isinstance(node, nnx.Variable)
  paths = jax.tree.leaves_with_path(params, is_leaf=is_variable)
  infos = [
    _describe(jax.tree_util.keystr(path), var.aval.shape, used)
    for (path, _), var, used in zip(
      paths, jaxpr.invars, usage.find(jaxpr, len(paths)), strict=False
    )
  ]
  # Without the variables of NNX, it fits parameters with and without them.
  return jax.tree.structure(params, is_leaf=is_variable), infos


def _describe(path, shape, used: usage.Usage) -> ParameterInfo:
  """Decides what a parameter is from everything that a loss does with it."""
  lost = ', '.join(used.lost_matrix(len(shape)))
  fallback = f'fallback, lost in {lost}' if lost else 'fallback'
  dgd = 'map' if used.depths else fallback
  info = functools.partial(ParameterInfo, path, shape, dgd=dgd)
  if 0 in shape:
    return info('empty', None)
  if 'gather' in used.ends | used.constants:
    return info('table', None)
  # Products with other parameters may be penalties; those with data decide.
  products = [p for p in used.products if p.has_data] or used.products
  if not products:
    return info(_kind(used), None)
  found = [_matrix_of(product) for product in products]
  for kind in ('groups', 'mixed axes', 'depthwise'):
    if kind in found:
      return info(kind, None)
  found = [numbers for numbers in found if numbers != 'vector']
  if not found:
    return info('vector', None)
  for numbers in found:
    if _unordered(numbers, shape) != _unordered(found[0], shape):
      shown = f'{_show(found[0])} and {_show(numbers)}'
      return info(f'{_TWO_MAPS}, {shown}', None)
  # Tied weights are used in both directions: the more frequent one decides.
  numbers = max(found, key=lambda n: (found.count(n), n[1] > n[0]))
  if not products[0].has_data and numbers[1] < numbers[0]:
    # The factors of a product of weights have no direction of their own.
    numbers = contrib.MuonDimensionNumbers(*reversed(numbers))
  return info('matrix', numbers)


def _kind(used: usage.Usage) -> str:
  """Names what a parameter without products is."""
  ends = used.ends or used.constants
  for kind, names in _KINDS.items():
    if ends & names:
      return kind
  return f'only in {", ".join(sorted(ends))}' if ends else 'unused'


def _matrix_of(product: usage.Product) -> contrib.MuonDimensionNumbers | str:
  """Returns the dimension numbers of one product, or why there are none."""
  roles = product.roles
  if any(len(found) > 1 for found in roles.values()):
    is_grouped = any('batch' in found for found in roles.values())
    return 'groups' if is_grouped else 'mixed axes'
  rows, columns = (
    tuple(sorted(axis for axis, found in roles.items() if role in found))
    for role in ('reduction', 'output')
  )
  if not rows or not columns:
    is_grouped = {'batch'} in roles.values()
    is_convolution = product.operation == 'conv_general_dilated'
    return 'depthwise' if is_convolution and is_grouped else 'vector'
  # Maps side by side of the same data (experts, vmapped layers): their axis
  # stands in front of the map's own.
  behind = tuple(axis for axis in columns if axis > rows[0])
  return contrib.MuonDimensionNumbers(rows, behind or columns)


def _unordered(numbers, shape):
  """Returns the two groups of axes; a map and its transpose have the same."""
  return {frozenset(k for k in axes if shape[k] > 1) for axes in numbers}


def _show(numbers) -> str:
  rows, columns = (list(axes) for axes in numbers)
  return f'axes {rows} -> {columns}'
