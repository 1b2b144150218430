"""Lays out values over devices that an optimiser makes from sharded parameters.

With explicit axes in the mesh of `jax.set_mesh`, JAX refuses a product along a
sharded dimension unless told where its result belongs. With any other mesh,
and without one, these functions leave that to the compiler.
"""

import string

import jax
import jax.numpy as jnp


def einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes `jnp.einsum` of two arrays, which may be sharded.

  A dimension of the result lies where it does in x or y, or on every device if
  those axes of the mesh are taken by a dimension before it.

  Args:
    equation: As for `jnp.einsum`, with one letter for every dimension.
    x: First operand.
    y: Second operand.

  Returns:
    The result.
  """
  if not _has_explicit_axes():
    return jnp.einsum(equation, x, y)
  operands, result = equation.split('->')
  entries, taken, spec = {}, set(), []
  for letters, operand in zip(operands.split(','), (x, y), strict=True):
    for letter, entry in zip(letters, spec_of(operand), strict=True):
      entries[letter] = entries.get(letter) or entry
  for letter in result:
    names = _names(entries[letter])
    spec.append(None if names & taken else entries[letter])
    taken |= names
  return jnp.einsum(equation, x, y, out_sharding=jax.P(*spec))


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes `x @ y` for stacks of matrices, which may be sharded.

  Args:
    x: [..., i, j]
    y: [..., j, k]

  Returns:
    [..., i, k]
  """
  stack = string.ascii_lowercase[: x.ndim - 2]
  return einsum(f'{stack}XY,{stack}YZ->{stack}XZ', x, y)


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


def gather(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Copies some dimensions of a value to every device.

  A dimension that is not the first of those merged by a reshape must not be
  sharded.

  Args:
    x: The value.
    axes: The dimensions.

  Returns:
    The value x; not moved without explicit axes.
  """
  if not _has_explicit_axes():
    return x
  spec = [None if i in axes else entry for i, entry in enumerate(spec_of(x))]
  return jax.sharding.reshard(x, jax.P(*spec))


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
