"""The iteration of Newton-Schulz: singular values go to 1, by matmuls alone."""

from collections.abc import Sequence

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


def iterate(
  y: jax.Array, coefficients: Sequence[float], num_steps: int
) -> jax.Array:
  r"""Takes steps of Newton-Schulz from matrices of singular values up to 1.

  .. math::
    Y \leftarrow a Y + b (Y Y^\top) Y + c (Y Y^\top)^2 Y .

  Args:
    y: [..., m, n], m at most n.
    coefficients: (a, b, c).
    num_steps: How many.

  Returns:
    An array like y.

  References:
    Jordan et al., Muon, https://kellerjordan.github.io/posts/muon, 2024.
  """
  m, n = y.shape[-2:]
  at_once = _STEPS_PER_GRAM if n >= 2 * m else 1
  for done in range(0, num_steps, at_once):
    y = _take_steps(y, coefficients, min(at_once, num_steps - done))
  return y


def orthogonalize(
  x: jax.Array,
  *,
  coefficients: Sequence[float] = COEFFICIENTS['quintic'],
  num_steps: int = 5,
) -> jax.Array:
  """Brings the singular values of every matrix near 1, wherever it lies.

  Args:
    x: [..., m, n].
    coefficients: (a, b, c) of the iteration.
    num_steps: Number of its steps.

  Returns:
    An array like x, with finite gradients; zero stays zero.
  """
  is_tall = x.shape[-2] > x.shape[-1]
  y = jnp.matrix_transpose(x) if is_tall else x
  square = jnp.sum(jnp.square(y), axis=(-2, -1), keepdims=True)
  y = iterate(y * jax.lax.rsqrt(square + 1e-12), coefficients, num_steps)
  return jnp.matrix_transpose(y) if is_tall else y


def _take_steps(y, coefficients, num_steps):
  """Steps of Newton-Schulz from one Gram matrix.

  The factors R of the steps are polynomials of the same matrix and commute, so
  the next Gram matrix is R (Y Y^T) R and all factors can be multiplied before
  the iterate is: products of m x m instead of m x n, worth it if m is small.

  Args:
    y: [..., m, n], m at most n.
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
  return jnp.einsum('...ij,...jk->...ik', x, y)
