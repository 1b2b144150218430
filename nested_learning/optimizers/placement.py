"""Lays out values over devices that an optimiser makes from sharded parameters.

With explicit axes in the mesh of `jax.set_mesh`, JAX refuses a product along a
sharded dimension unless told where its result belongs. With any other mesh,
and without one, these functions leave that to the compiler.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes `x @ y` for stacks of matrices, which may be sharded.

  The rows of the result lie where the rows of x do, and its columns where the
  columns of y do, or on every device if those axes of the mesh are taken.

  Args:
    x: [..., i, j]
    y: [..., j, k]

  Returns:
    [..., i, k]
  """
  equation = '...ij,...jk->...ik'
  if not _has_explicit_axes():
    return jnp.einsum(equation, x, y)
  *x_stack, rows, _ = spec_of(x)
  *y_stack, _, columns = spec_of(y)
  stack = [a or b for a, b in zip(x_stack, y_stack, strict=True)]
  if _names(columns) & set().union(*map(_names, [*stack, rows])):
    columns = None
  return jnp.einsum(equation, x, y, out_sharding=jax.P(*stack, rows, columns))


def map_stack(
  function: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Applies a function of matrices, each device to its share of a stack.

  Without this, every device would compute the results of the whole stack.

  Args:
    function: Maps [s, m, n] to an array like it, matrix by matrix.
    x: [..., m, n]; leading axes are a stack of matrices.
    mesh: Devices to spread the stack over. None: the mesh of `jax.set_mesh`.

  Returns:
    An array like x.
  """
  *stack, m, n = x.shape
  if not x.size:
    return x
  # With explicit axes nothing moves unless told to: there, and back. A stack
  # that must be padded or reshaped is replicated first.
  context = jax.sharding.get_abstract_mesh()
  home, between = None, jax.P()
  if mesh is None and not context.empty and context.are_all_axes_explicit:
    home = jax.typeof(x).sharding.spec
    if len(stack) == 1 and stack[0] % context.size == 0:
      between = jax.P(context.axis_names)
    x = jax.sharding.reshard(x, between)
  y = function(_spread(x.reshape(-1, m, n), mesh))
  if home is not None:
    y = jax.sharding.reshard(y, between)
  y = y[: math.prod(stack)].reshape(x.shape)
  return y if home is None else jax.sharding.reshard(y, home)


def spec_of(x: jax.Array) -> jax.P:
  """Returns the partition of a value, one entry per dimension.

  Args:
    x: An array, or a traced value, whose explicit axes alone are known.

  Returns:
    The partition.
  """
  sharding = jax.typeof(x).sharding
  if not isinstance(x, jax.core.Tracer):
    sharding = getattr(x, 'sharding', sharding)
  spec = getattr(sharding, 'spec', jax.P())
  return jax.P(*spec, *[None] * (jnp.ndim(x) - len(spec)))


def put(x: jax.Array, spec: jax.P, *, like: jax.Array) -> jax.Array:
  """Moves a value to the devices of another one.

  Args:
    x: The value to move.
    spec: The partition it gets.
    like: A value on the devices that x is moved to.

  Returns:
    The value x; not moved if the sharding of `like` is not known.
  """
  if _has_explicit_axes():
    return jax.sharding.reshard(x, spec)
  sharding = getattr(like, 'sharding', None)
  is_concrete = not isinstance(like, jax.core.Tracer)
  if is_concrete and isinstance(sharding, jax.NamedSharding):
    return jax.device_put(x, jax.NamedSharding(sharding.mesh, spec))
  return x


def _spread(stack, mesh):
  """Pads a stack to the number of devices and lays it out over them."""
  num_matrices = stack.shape[0]
  context = jax.sharding.get_abstract_mesh()
  devices = context if mesh is None else mesh
  num_devices = math.prod(devices.shape.values())
  if num_matrices == 1 or num_devices == 1:
    return stack
  spec = jax.P(devices.axis_names)
  padding = -num_matrices % num_devices
  padded = jnp.pad(stack, ((0, padding), (0, 0), (0, 0)))
  if mesh is not None:
    sharding = jax.NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(padded, sharding)
  if context.are_all_axes_explicit:
    return jax.sharding.reshard(padded, spec)
  if context.are_all_axes_auto:
    return jax.lax.with_sharding_constraint(padded, spec)
  return stack  # Inside shard_map, the caller has laid it out.


def _has_explicit_axes():
  mesh = jax.sharding.get_abstract_mesh()
  return jax.sharding.AxisType.Explicit in mesh.axis_types


def _names(entry):
  return set(entry if isinstance(entry, tuple) else (entry,)) - {None}
