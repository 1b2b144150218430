"""Where values lie that an optimiser makes from sharded parameters."""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """`x @ y` for stacks of matrices, which says where its result lies.

  With explicit axes in the mesh of `jax.set_mesh`, a product along a sharded
  dimension is refused unless told where its result belongs: here, the rows
  where those of x are and the columns where those of y are, or on every device
  if that is taken. With any other mesh, and with none, nothing need be said.

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
  """How a value is spread over devices, one entry per dimension.

  Args:
    x: A traced value, of which only explicit axes are known, or one at hand.

  Returns:
    The partition.
  """
  sharding = jax.typeof(x).sharding
  if not isinstance(x, jax.core.Tracer):
    sharding = getattr(x, 'sharding', sharding)
  spec = getattr(sharding, 'spec', jax.P())
  return jax.P(*spec, *[None] * (jnp.ndim(x) - len(spec)))


def put(x: jax.Array, spec: jax.P, *, like: jax.Array) -> jax.Array:
  """Puts a value on the devices of another one.

  Args:
    x: What to put.
    spec: Its partition.
    like: What lies where x should.

  Returns:
    The value x; unmoved where the sharding of `like` is not known.
  """
  if _has_explicit_axes():
    return jax.sharding.reshard(x, spec)
  sharding = getattr(like, 'sharding', None)
  at_hand = not isinstance(like, jax.core.Tracer)
  if at_hand and isinstance(sharding, jax.NamedSharding):
    return jax.device_put(x, jax.NamedSharding(sharding.mesh, spec))
  return x


def _has_explicit_axes():
  mesh = jax.sharding.get_abstract_mesh()
  return jax.sharding.AxisType.Explicit in mesh.axis_types


def _names(entry):
  return set(entry if isinstance(entry, tuple) else (entry,)) - {None}
