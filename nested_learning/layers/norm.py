"""Normalisation over the last axis."""

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import base

_EPSILON = 1e-6  # added to mean squares, so that zero has a finite gradient


def scale_param(size: int, axis: str = 'embed') -> parameters.Param:
  """Returns the learned scale of an RMS norm, initially one."""
  return parameters.Param(
    (size,), (axis,), parameters.constant(1.0), decay=False
  )


@base.recomputed
def rms_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
  """Computes scale * x / rms(x) over the last axis.

  Args:
    scale: [e].
    x: [..., e]; the arithmetic is in float32 at least, since the squares of
      half-precision numbers overflow.

  Returns:
    An array like x.

  References:
    Zhang and Sennrich, arXiv:1910.07467, 2019, eq. 4.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(mean_square + _EPSILON) * scale).astype(x.dtype)


def layer_norm(scale: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
  """Computes scale * (x - mean) / deviation + bias over the last axis.

  Args:
    scale: Broadcastable to x.
    bias: Broadcastable to x.
    x: [..., e], float32 or wider.

  Returns:
    An array like x.

  References:
    Ba et al., arXiv:1607.06450, 2016, eq. 4.
  """
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + _EPSILON) * scale + bias


def l2_normalize(x: jax.Array) -> jax.Array:
  """Computes x / |x| over the last axis.

  Zero stays zero: the constant under the root keeps its gradient finite.
  """
  return x * jax.lax.rsqrt(
    jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON
  )
