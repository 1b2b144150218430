"""Rotary positions: a score depends on how far a key is from its query.

References:
  Su et al., RoFormer, arXiv:2104.09864, 2021, eq. 34.
"""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding.

  Args:
    x: [b, t, h, d]; the first and second half of d are the pairs.
    position: int [b, t], or [t] for all rows.
    theta: Base of the wavelengths.

  Returns:
    An array like x.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half) / half)
  angle = position[..., None, None] * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = x[..., :half], x[..., half:]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
