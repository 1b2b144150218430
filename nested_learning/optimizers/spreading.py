"""Spreads work on the matrices of a sharded tree over devices.

Left to itself, the compiler computes all matrices on every device, or moves
data at every product. Here a matrix moves to the device that computes its
result, and the result moves back.
"""

from collections.abc import Callable, Iterable
import math
import re
from typing import Any

import jax
from jax.experimental import shard_alike
import jax.numpy as jnp

from nested_learning.optimizers import axes as axes_lib
from nested_learning.optimizers import placement


def map_matrices(
  function: Callable[[jax.Array], jax.Array],
  tree: Any,
  axes: Any,
  *,
  like: Any,
  mesh: jax.sharding.Mesh | None = None,
) -> Any:
  """Applies a function of matrices, each device to its share of them.

  A stack of matrices is spread over the devices along one of its axes. Single
  matrices are stacked first, if they have the same shape and partition. Without
  explicit axes the partition is unknown, and paths that differ in numbers only,
  such as those of the query kernels of all layers, stand for the same one. A
  matrix without companions is computed on every device.

  Args:
    function: Maps [..., m, n] to an array like it, matrix by matrix.
    tree: Tree of parameters.
    axes: Tree like it of `axes.Axes`.
    like: Tree of arrays of the same shapes, by which the results are laid out:
      best of arguments of the compiled function, whose partitions are known.
    mesh: Devices to spread matrices over. None: the mesh of `jax.set_mesh`.

  Returns:
    A tree like `tree`.
  """

  def apply(x, axes):
    y = function(axes_lib.to_matrices(x, axes))
    return axes_lib.from_matrices(y, axes, x.shape)

  devices = _find_devices(mesh)
  is_auto = mesh is not None or not (
    jax.sharding.get_abstract_mesh().are_all_axes_explicit
  )
  if devices is not None and is_auto:
    # Or the compiler might move the operands of whatever computes the tree.
    tree = shard_alike.shard_alike(like, tree)[1]
  items, treedef = jax.tree_util.tree_flatten_with_path(tree)
  axes = treedef.flatten_up_to(axes)
  if devices is None:
    pairs = zip(items, axes, strict=True)
    return treedef.unflatten(apply(leaf, its) for (_, leaf), its in pairs)
  results = [None] * len(items)
  for members in _group(items, axes):
    leaves = [items[i][1] for i in members]
    its = axes[members[0]]
    if len(leaves) == 1:
      mapped = [_spread(apply, leaves[0], its, mesh)]
    else:
      mapped = _unstack(
        _spread(apply, jnp.stack(leaves), its.stacked(), mesh, is_new=True)
      )
    for i, result in zip(members, mapped, strict=True):
      results[i] = result
  results = treedef.unflatten(results)
  return shard_alike.shard_alike(like, results)[1] if is_auto else results


def _find_devices(mesh):
  """Returns the mesh to spread matrices over; None if there is no choice."""
  context = jax.sharding.get_abstract_mesh()
  devices = context if mesh is None else mesh
  if devices.empty or devices.size == 1:
    return None
  # Inside shard_map, the caller has laid the matrices out.
  is_free = context.are_all_axes_explicit or context.are_all_axes_auto
  return devices if mesh is not None or is_free else None


def _group(items, axes) -> Iterable[list[int]]:
  """Returns the indices of the parameters that are computed together."""
  is_explicit = jax.sharding.get_abstract_mesh().are_all_axes_explicit
  groups = {}
  for i, ((path, leaf), its) in enumerate(zip(items, axes, strict=True)):
    key = i
    if its.count(leaf.shape) == 1:
      name = re.sub(r'\d+', '', jax.tree_util.keystr(path))
      role = placement.spec_of(leaf) if is_explicit else name
      key = leaf.shape, leaf.dtype, its, role
    groups.setdefault(key, []).append(i)
  return groups.values()


def _unstack(x) -> list[jax.Array]:
  return [x[i] for i in range(x.shape[0])]


def _spread(function, x, axes, mesh, is_new=False) -> jax.Array:
  """Applies a function of a stack of matrices, spread over devices.

  Args:
    function: Maps (array, axes) to an array of the same shape.
    x: The stack.
    axes: Its `axes.Axes`.
    mesh: See `map_matrices`.
    is_new: Whether the stack has been made of single matrices.

  Returns:
    An array like x; with explicit axes, in its partition.
  """
  devices = _find_devices(mesh)
  is_explicit = mesh is None and devices.are_all_axes_explicit
  home = placement.spec_of(x) if is_explicit else None
  axis = _choose_axis(x.shape, axes, devices.size)
  specs = _list_specs(x.shape, axis, home, devices)
  padding = [(0, 0)] * x.ndim
  if axis is not None:
    num_parts = math.prod(devices.shape[n] for n in _names(specs[-1][axis]))
    padding[axis] = 0, -x.shape[axis] % num_parts
  must_pad = axis is not None and padding[axis][1] > 0
  if not (is_explicit or is_new or must_pad):
    # The stack may be spread along its axis already.
    specs[0] = jax.P(*[jax.P.UNCONSTRAINED] * x.ndim)

  def lay(x, spec):
    if is_explicit:
      return jax.sharding.reshard(x, spec)
    sharding = spec if mesh is None else jax.NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(x, sharding)

  y = lay(x, specs[0])
  if must_pad:  # Laid out again, since padding could move data otherwise.
    y = lay(jnp.pad(y, padding), specs[0])
  for spec in specs[1:]:
    y = lay(y, spec)
  y = function(y, axes)
  for spec in reversed(specs):
    y = lay(y, spec)
  if must_pad:
    y = jax.lax.slice_in_dim(y, 0, x.shape[axis], axis=axis)
  return y


def _choose_axis(shape, axes, num_devices) -> int | None:
  """Returns the axis along which a stack is spread; None for one matrix."""
  if axes.count(shape) == 1:
    return None
  # Rather one that needs no padding; of several, the last: experts come after
  # layers, and are the more likely to be sharded.
  rank = lambda axis: (shape[axis] % num_devices == 0, axis, shape[axis])
  return max(axes.stack, key=rank)


def _list_specs(shape, axis, home, devices) -> list[jax.P]:
  """Lists the partitions that a stack takes on its way.

  Axes of the mesh are moved one by one, which the compiler turns into one
  all-to-all each; several at once it would replicate. The last ones move first:
  they are the minor ones where several shard one dimension.

  Args:
    shape: Shape of the stack.
    axis: The axis that is spread; None for one matrix.
    home: Partition of the stack; None if it is unknown.
    devices: The mesh.

  Returns:
    Partitions, from that of the stack to the one to compute in.
  """
  entries = [jax.P.UNCONSTRAINED] * len(shape) if home is None else list(home)
  if axis is None:
    return [jax.P(*entries), jax.P(*[None] * len(shape))]
  held = [] if home is None else _names(home[axis])
  moving = [
    name
    for name in reversed(devices.axis_names)
    if devices.shape[name] > 1 and name not in held
  ]
  if held and shape[axis] % devices.size:
    moving = []  # A sharded axis cannot be padded: stay on fewer devices.
  specs = []
  for count in range(len(moving) + 1):
    taken = [*held, *moving[:count]]
    is_last = count == len(moving)
    spec = [None if is_last else _remove(entry, taken) for entry in entries]
    spec[axis] = tuple(taken) or None
    specs.append(jax.P(*spec))
  if home is not None:
    specs[0:0] = [home]
  return specs


def _names(entry) -> list[str]:
  """Returns the axes of the mesh in one entry of a partition."""
  if entry is None:
    return []
  return list(entry) if isinstance(entry, tuple) else [entry]


def _remove(entry, taken):
  """Returns an entry of a partition without some axes of the mesh."""
  if entry is jax.P.UNCONSTRAINED:
    return entry
  return tuple(name for name in _names(entry) if name not in taken) or None
