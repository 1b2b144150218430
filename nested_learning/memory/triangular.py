"""Inverse of unit lower triangular matrices by matmuls alone."""

import jax
import jax.numpy as jnp

# Up to this size it is cheaper to multiply whole matrices than to cut them up.
_SMALL = 16


@jax.custom_jvp
def unit_lower_inverse(strictly_lower: jax.Array) -> jax.Array:
  r"""The inverse of I + N for strictly lower triangular N.

  Halves are inverted and joined, so that no power of N is ever formed (their
  product form overflows when keys repeat):

  .. math::
     \begin{pmatrix} A & 0 \\ B & D \end{pmatrix}^{-1} =
     \begin{pmatrix} A^{-1} & 0 \\ -D^{-1} B A^{-1} & D^{-1} \end{pmatrix}

  Args:
    strictly_lower: N, [..., c, c]; what stands on or above its diagonal is not
      read.

  Returns:
    [..., c, c], unit lower triangular.
  """
  size = strictly_lower.shape[-1]
  if size <= _SMALL:
    return _ladder(strictly_lower)
  half = (size + 1) // 2
  first = strictly_lower[..., :half, :half]
  second = strictly_lower[..., half:, half:]
  if size % 2:  # a last row of zeros makes the halves equal
    pad = [(0, 0)] * (strictly_lower.ndim - 2) + [(0, 1), (0, 1)]
    second = jnp.pad(second, pad)
  both = unit_lower_inverse(jnp.stack([first, second]))
  first, second = both[0], both[1][..., : size - half, : size - half]
  below = -_matmul(second, _matmul(strictly_lower[..., half:, :half], first))
  above = jnp.zeros((*below.shape[:-2], half, size - half), below.dtype)
  return jnp.concatenate(
    [
      jnp.concatenate([first, above], axis=-1),
      jnp.concatenate([below, second], axis=-1),
    ],
    axis=-2,
  )


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
  (strictly_lower,), (tangent,) = primals, tangents
  inverse = unit_lower_inverse(strictly_lower)
  change = _matmul(inverse, _matmul(jnp.tril(tangent, -1), inverse))
  return inverse, -change


def _ladder(strictly_lower: jax.Array) -> jax.Array:
  """The same for small matrices, all pairs of blocks of a size at once."""
  size = strictly_lower.shape[-1]
  index = jnp.arange(size)
  inverse = jnp.eye(size, dtype=strictly_lower.dtype)
  width = 1
  while width < size:
    block = index // width
    is_below = (block[:, None] == block + 1) & (block % 2 == 0)
    below = jnp.where(is_below, strictly_lower, 0.0)
    inverse = inverse - _matmul(inverse, _matmul(below, inverse))
    width *= 2
  return jnp.broadcast_to(inverse, strictly_lower.shape)  # for a size of one


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
