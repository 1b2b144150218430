"""Lays out values over devices that an optimiser makes from sharded parameters.

With explicit axes in the mesh of `jax.set_mesh`, JAX refuses a product along a
sharded dimension unless told where its result belongs. With any other mesh,
and without one, these functions leave that to the compiler.
"""

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


def _has_explicit_axes():
  mesh = jax.sharding.get_abstract_mesh()
  return jax.sharding.AxisType.Explicit in mesh.axis_types


def _names(entry):
  return set(entry if isinstance(entry, tuple) else (entry,)) - {None}
