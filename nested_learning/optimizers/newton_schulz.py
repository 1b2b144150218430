"""Orthogonalisation by Newton-Schulz, for stacks of matrices."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from nested_learning import newton_schulz

COEFFICIENTS = newton_schulz.COEFFICIENTS


def orthogonalize(
  x: jax.Array,
  *,
  coefficients: str | Sequence[float] = 'quintic',
  num_steps: int = 5,
  epsilon: float = 1e-8,
  mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  r"""Brings the singular values of every matrix near 1.

  .. math::
    X_0 = X / (\|X\|_F + \epsilon), \qquad
    X_{i+1} = a X_i + b (X_i X_i^\top) X_i + c (X_i X_i^\top)^2 X_i .

  NL derives a step of this kind from the regression |P(g)^T P(g) - I|^2: from
  O = g and a rate of 1/4, eq. 44 is the cubic step. Its further steps hold on
  to g (the term O - g) and stop at matrices that are not orthogonal, so the
  iteration here is re-anchored at every step.

  Args:
    x: [..., m, n]; leading axes are a stack of matrices.
    coefficients: 'cubic', 'quintic', or (a, b, c).
    num_steps: Number of steps; NL writes T.
    epsilon: Keeps a zero matrix zero.
    mesh: Devices to spread a stack over. None: those of `jax.set_mesh`, if any.
      Without this, every device would orthogonalise the whole stack.

  Returns:
    An array like x.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 43-44.
    Jordan et al., Muon, https://kellerjordan.github.io/posts/muon, 2024.
  """
  if isinstance(coefficients, str):
    coefficients = COEFFICIENTS[coefficients]
  *stack, m, n = x.shape
  if not x.size:
    return x
  # With sharding in types nothing moves unless told to: there, and back. A
  # stack that must be padded or reshaped is made whole first.
  context = jax.sharding.get_abstract_mesh()
  home, between = None, jax.P()
  if mesh is None and not context.empty and context.are_all_axes_explicit:
    home = jax.typeof(x).sharding.spec
    if len(stack) == 1 and stack[0] % context.size == 0:
      between = jax.P(context.axis_names)
    x = jax.sharding.reshard(x, between)

  y = jnp.matrix_transpose(x) if m > n else x
  y, num_matrices = _spread(y.reshape(-1, min(m, n), max(m, n)), mesh)
  y = y / (jnp.linalg.norm(y, axis=(-2, -1), keepdims=True) + epsilon)
  y = newton_schulz.iterate(y, coefficients, num_steps)

  if home is not None:
    y = jax.sharding.reshard(y, between)
  y = y[:num_matrices].reshape(*stack, min(m, n), max(m, n))
  y = jnp.matrix_transpose(y) if m > n else y
  return y if home is None else jax.sharding.reshard(y, home)


def _spread(stack, mesh):
  """Pads a stack to the number of devices and lays it out over them."""
  num_matrices = stack.shape[0]
  context = jax.sharding.get_abstract_mesh()
  devices = context if mesh is None else mesh
  num_devices = math.prod(devices.shape.values())
  if num_matrices == 1 or num_devices == 1:
    return stack, num_matrices
  spec = jax.P(devices.axis_names)
  padding = -num_matrices % num_devices
  padded = jnp.pad(stack, ((0, padding), (0, 0), (0, 0)))
  if mesh is not None:
    sharding = jax.NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(padded, sharding), num_matrices
  if context.are_all_axes_explicit:
    return jax.sharding.reshard(padded, spec), num_matrices
  if context.are_all_axes_auto:
    return jax.lax.with_sharding_constraint(padded, spec), num_matrices
  return stack, num_matrices  # Inside shard_map: the caller has laid it out.
