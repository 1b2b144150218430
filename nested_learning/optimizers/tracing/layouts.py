"""Tracks which axes of a parameter make up each axis of a traced value.

A layout holds, for every axis of the value, its factors from the slowest to the
fastest. A factor is a size and the axes of the parameter that it comes from:
none if it was broadcast, several if a reshape cut across axes.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple


class Factor(NamedTuple):
  """A factor of the size of an axis, and the parameter's axes it is made of."""

  axes: frozenset[int]
  size: int


Layout = tuple[tuple[Factor, ...], ...]

# Operations inside a shard_map that say how copies of a value may differ.
MANUAL_CASTS = frozenset({'preduced', 'pvary', 'reduced_vary_cast_p'})

_NO_AXES = frozenset()


def initial(shape: Sequence[int]) -> Layout:
  """Returns the layout of the parameter itself."""
  return tuple(
    (Factor(frozenset({axis}), size),) for axis, size in enumerate(shape)
  )


def axes_of(layout: Layout, axis: int) -> frozenset[int]:
  """Returns the parameter's axes in one axis of the value."""
  return _NO_AXES.union(*(factor.axes for factor in layout[axis]))


def is_broadcast(layout: Layout) -> bool:
  """Returns whether the value repeats entries of the parameter."""
  return any(
    not factor.axes and factor.size > 1 for axis in layout for factor in axis
  )


def transpose(layout: Layout, permutation: Sequence[int]) -> Layout:
  """Returns the layout of a transposed value."""
  return tuple(layout[axis] for axis in permutation)


def drop(layout: Layout, axes: Sequence[int]) -> Layout:
  """Returns the layout without some axes, of which one index was taken."""
  return tuple(part for axis, part in enumerate(layout) if axis not in axes)


def resize(layout: Layout, shape: Sequence[int]) -> Layout:
  """Returns the layout of a value that was cut or padded to a shape."""
  sizes = (math.prod(factor.size for factor in axis) for axis in layout)
  return tuple(
    layout[axis] if old == new else (Factor(axes_of(layout, axis), new),)
    for axis, (old, new) in enumerate(zip(sizes, shape, strict=True))
  )


def broadcast(
  layout: Layout, shape: Sequence[int], dimensions: Sequence[int]
) -> Layout:
  """Returns the layout of a value that was broadcast as XLA does it."""
  parts = [(Factor(_NO_AXES, size),) for size in shape]
  for axis, target in enumerate(dimensions):
    if math.prod(factor.size for factor in layout[axis]) == shape[target]:
      parts[target] = layout[axis]
  return tuple(parts)


def reshape(layout: Layout, shape: Sequence[int]) -> Layout:
  """Returns the layout of a reshaped value without empty axes."""
  # Axes of size 1 may stand anywhere, so a reshape forgets them.
  factors = [factor for axis in layout for factor in axis if factor.size > 1]
  factors.reverse()
  parts = []
  for size in shape:
    part = []
    while size > 1:
      factor = factors.pop()
      if size % factor.size == 0:
        part.append(factor)
        size //= factor.size
      elif factor.size % size == 0:
        part.append(Factor(factor.axes, size))
        factors.append(Factor(factor.axes, factor.size // size))
        size = 1
      else:  # The new axis cuts across two old ones.
        following = factors.pop()
        axes = factor.axes | following.axes
        factors.append(Factor(axes, factor.size * following.size))
    parts.append(tuple(part))
  return tuple(parts)


def follow(eqn, layout: Layout) -> list[Layout] | None:
  """Returns the layouts of the outputs of an operation on one value.

  Args:
    eqn: An equation of a jaxpr.
    layout: Layout of its first input.

  Returns:
    A layout per output; None if the operation does not move entries as a whole.
  """
  shape, params = eqn.outvars[0].aval.shape, eqn.params
  match eqn.primitive.name:
    case 'transpose':
      return [transpose(layout, params['permutation'])]
    case 'squeeze':
      return [drop(layout, params['dimensions'])]
    case 'reshape':
      if params['dimensions'] is not None:  # as in a vmapped convolution
        layout = transpose(layout, params['dimensions'])
      return [reshape(layout, shape)]
    case 'broadcast_in_dim':
      return [broadcast(layout, shape, params['broadcast_dimensions'])]
    # Gathers the shards of a parameter, inside a shard_map.
    case 'all_gather' | 'all_gather_invariant' if params['tiled']:
      return [resize(layout, shape)]
    case 'slice' | 'dynamic_slice' | 'pad' | 'rev' | 'split':
      return [resize(layout, var.aval.shape) for var in eqn.outvars]
    case 'gather':
      looked_up = look_up(eqn, layout)
      return None if looked_up is None else [looked_up]
    case 'unstack':
      return [drop(layout, (params['axis'],))] * len(eqn.outvars)
    case (
      'convert_element_type'
      | 'copy'
      | 'copy_p'
      | 'reduce_precision'
      | 'reshard'
      | 'sharding_constraint'
    ):
      return [layout]
    case name if name in MANUAL_CASTS:
      return [layout]
  return None


def join(eqn, layouts: Sequence[Layout]) -> list[Layout]:
  """Returns the layouts of parameters in a value that they are joined to.

  Args:
    eqn: A concatenation or a stack.
    layouts: Layouts of its inputs.

  Returns:
    A layout of the output per input.
  """
  shape = eqn.outvars[0].aval.shape
  if eqn.primitive.name == 'concatenate':
    return [resize(layout, shape) for layout in layouts]
  axis = eqn.params['axis']
  stacked = (Factor(_NO_AXES, shape[axis]),)
  return [(*part[:axis], stacked, *part[axis:]) for part in layouts]


def look_up(eqn, layout: Layout) -> Layout | None:
  """Returns the layout of matrices looked up in a stack; None for rows."""
  numbers = eqn.params['dimension_numbers']
  sizes = eqn.params['slice_sizes']
  if sum(size > 1 for size in sizes) < 2 or numbers.operand_batching_dims:
    return None
  kept = resize(layout, sizes)
  kept = drop(kept, numbers.collapsed_slice_dims)
  parts = [(Factor(_NO_AXES, n),) for n in eqn.outvars[0].aval.shape]
  for axis, part in zip(numbers.offset_dims, kept, strict=True):
    parts[axis] = part
  return tuple(parts)


def roles(eqn, side: int, layout: Layout) -> dict[int, set[str]] | None:
  """Returns what a product does with the axes of one of its inputs.

  Args:
    eqn: A matrix product or a convolution.
    side: Which input is the parameter.
    layout: Its layout.

  Returns:
    By axis of the parameter, the roles among 'reduction', 'output' and 'batch'
    (maps side by side); None if the input is the data of a convolution.
  """
  params = eqn.params
  match eqn.primitive.name:
    case 'dot_general':
      contracted, batch = (pair[side] for pair in params['dimension_numbers'])
    case 'ragged_dot_general':
      numbers = params['ragged_dot_dimension_numbers']
      contracted, batch = (x[side] for x in numbers.dot_dimension_numbers)
      if side == 1:
        batch = (*batch, *numbers.rhs_group_dimensions)
    case _:
      if side == 0 or params['batch_group_count'] > 1:
        return None
      output, *contracted = params['dimension_numbers'].rhs_spec
      groups = params['feature_group_count']
      # The groups change slowest along the outputs: a new axis in front.
      shape = [math.prod(f.size for f in axis) for axis in layout]
      flat = (*shape[:output], groups, shape[output] // groups)
      if groups > 1:
        split = reshape((layout[output],), flat[output:])
        layout = (*layout[:output], *split, *layout[output + 1 :])
        contracted = [axis + (axis > output) for axis in contracted]
        batch = (output,)
      else:
        batch = ()
  found = {}
  for axis in range(len(layout)):
    if axis in contracted:
      role = 'reduction'
    else:
      role = 'batch' if axis in batch else 'output'
    for own in axes_of(layout, axis):
      found.setdefault(own, set()).add(role)
  return found
