"""Orthogonalises matrices by Newton-Schulz: matrix products alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Odd polynomials a x + b x^3 + c x^5 on the singular values. The cubic one
# converges to 1; the quintic one gets to within 0.7-1.2 in five steps.
COEFFICIENTS = {
  'cubic': (1.5, -0.5, 0.0),
  'quintic': (3.4445, -4.7750, 2.0315),
}

# Steps taken on one Gram matrix before it is computed anew. Entries near zero
# grow up to twelvefold per step, and their rounding errors with them. At
# condition 1e4, five quintic steps in float32 are off by 5e-6 with a new matrix
# every step, by 6e-6 with one after three, and by 3e-4 with a single one.
_STEPS_PER_GRAM = 3


def orthogonalize(
  x: jax.Array,
  *,
  coefficients: str | Sequence[float] = 'quintic',
  num_steps: jax.typing.ArrayLike = 5,
  epsilon: jax.typing.ArrayLike = 1e-6,
) -> jax.Array:
  r"""Brings the singular values of every matrix near 1.

  .. math::
    X_0 = X / \sqrt{\|X\|_F^2 + \epsilon^2}, \qquad
    X_{i+1} = a X_i + b (X_i X_i^\top) X_i + c (X_i X_i^\top)^2 X_i .

  NL derives a step of this kind from the regression |P(g)^T P(g) - I|^2: from
  O = g and a rate of 1/4, eq. 44 is the cubic step. Its further steps hold on
  to g (the term O - g) and stop at matrices that are not orthogonal, so the
  iteration here is re-anchored at every step.

  Args:
    x: [..., m, n]; leading axes are a stack of matrices.
    coefficients: 'cubic', 'quintic', or (a, b, c).
    num_steps: Number of steps; NL writes T. A traced number is allowed, but
      cannot be differentiated through.
    epsilon: Norm below which a matrix counts as zero. Zero stays zero, with
      finite gradients.

  Returns:
    An array like x, laid out over devices like x.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 43-44.
    Jordan et al., Muon, https://kellerjordan.github.io/posts/muon, 2024.
  """
  if isinstance(coefficients, str):
    coefficients = COEFFICIENTS[coefficients]
  if isinstance(num_steps, jax.core.Tracer):  # `optax.inject_hyperparams`
    return _orthogonalize(x, epsilon, coefficients, num_steps)
  # Compiled as a function, it is traced once for all matrices of a shape.
  return _compiled(x, epsilon, tuple(map(float, coefficients)), int(num_steps))


def _orthogonalize(x, epsilon, coefficients, num_steps):
  # Gram matrices are taken on the shorter side.
  is_tall = x.shape[-2] > x.shape[-1]
  y = jnp.matrix_transpose(x) if is_tall else x
  # In 16 bits the squares would overflow, or vanish.
  wide = y if jnp.finfo(y.dtype).bits > 16 else y.astype(jnp.float32)
  square = jnp.sum(jnp.square(wide), axis=(-2, -1), keepdims=True)
  # epsilon**2 may vanish in float32, and zero must stay zero.
  floor = jnp.finfo(wide.dtype).tiny
  square = square + jnp.asarray(epsilon).astype(wide.dtype) ** 2
  y = (wide * jax.lax.rsqrt(jnp.maximum(square, floor))).astype(x.dtype)
  y = _iterate(y, coefficients, num_steps)
  return jnp.matrix_transpose(y) if is_tall else y


_compiled = jax.jit(_orthogonalize, static_argnums=(2, 3))


def _iterate(y, coefficients, num_steps):
  """Takes all steps, several on one Gram matrix where that costs less."""
  if isinstance(num_steps, jax.core.Tracer):
    step = lambda _, y: _take_steps(y, coefficients, 1)
    return jax.lax.fori_loop(0, num_steps, step, y)
  m, n = y.shape[-2:]
  # Products of factors [m, m] cost less than steps on [m, n] if m is small.
  at_once = _STEPS_PER_GRAM if n >= 2 * m else 1
  for done in range(0, num_steps, at_once):
    y = _take_steps(y, coefficients, min(at_once, num_steps - done))
  return y


def _take_steps(y, coefficients, num_steps):
  """Takes steps of Newton-Schulz from one Gram matrix.

  The factors R of the steps are polynomials of the same matrix and commute.
  So the next Gram matrix is R (Y Y^T) R, and all factors can be multiplied
  before the iterate is.

  Args:
    y: [..., m, n], m at most n.
    coefficients: (a, b, c).
    num_steps: Number of steps.

  Returns:
    An array like y.
  """
  a, b, c = coefficients
  gram = _matmul(y, jnp.matrix_transpose(y))  # [..., m, m]
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
  return jnp.einsum('...ij,...jk->...ik', x, y)
