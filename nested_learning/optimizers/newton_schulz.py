"""Orthogonalisation by Newton-Schulz, for stacks of matrices."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

# Odd polynomials a x + b x^3 + c x^5 on the singular values. The cubic one
# converges to 1; the quintic one gets to within 0.7-1.2 in five steps.
COEFFICIENTS = {
  'cubic': (1.5, -0.5, 0.0),
  'quintic': (3.4445, -4.7750, 2.0315),
}

# Steps taken on one Gram matrix before it is made anew: what is nearly zero in
# it grows up to twelvefold per step, and its rounding too. At condition 1e4,
# five quintic steps in float32 are off by 5e-6 with a new matrix every step,
# 6e-6 with one after three, and 3e-4 with the first one throughout.
_STEPS_PER_GRAM = 3


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
  at_once = _STEPS_PER_GRAM if max(m, n) >= 2 * min(m, n) else 1
  for done in range(0, num_steps, at_once):
    y = _take_steps(y, coefficients, min(at_once, num_steps - done))

  if home is not None:
    y = jax.sharding.reshard(y, between)
  y = y[:num_matrices].reshape(*stack, min(m, n), max(m, n))
  y = jnp.matrix_transpose(y) if m > n else y
  return y if home is None else jax.sharding.reshard(y, home)


def _take_steps(y, coefficients, num_steps):
  """Steps of Newton-Schulz from one Gram matrix.

  The factors R of the steps are polynomials of the same matrix and commute, so
  the next Gram matrix is R (Y Y^T) R and all factors can be multiplied before
  the iterate is: products of m x m instead of m x n, worth it if m is small.

  Args:
    y: [l, m, n], m at most n.
    coefficients: (a, b, c).
    num_steps: How many.

  Returns:
    An array like y.
  """
  a, b, c = coefficients
  gram = _matmul(y, jnp.matrix_transpose(y))
  if num_steps == 1:
    return a * y + _matmul(_polynomial(gram, b, c), y)
  factors = None
  for i in range(num_steps):
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    factor = a * identity + _polynomial(gram, b, c)
    factors = factor if factors is None else _matmul(factor, factors)
    if i < num_steps - 1:
      gram = _matmul(_matmul(factor, gram), factor)
  return _matmul(factors, y)


def _polynomial(gram, b, c):
  return b * gram + (c * _matmul(gram, gram) if c else 0)


def _matmul(x, y):
  return jnp.einsum('lij,ljk->lik', x, y)


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
