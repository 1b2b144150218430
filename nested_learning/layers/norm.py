"""Normalisation over the last axis."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import parameters
from nested_learning.layers import base

_EPSILON = 1e-6  # added to mean squares, so that zero has a finite gradient


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """The norm of a residual part: of a mixer, of an MLP, or of the output."""

  kind: Literal['rms', 'layer'] = 'rms'  # 'layer' also centres, with a bias
  epsilon: float = _EPSILON  # added to mean squares
  offset: float = 0.0  # added to the learned scale; 1 in Gemma
  # 'both' also normalises the part's output before it is added.
  place: Literal['before', 'both'] = 'before'

  def __post_init__(self):
    errors.check_choices(self)
    fine = 0 < self.epsilon < math.inf
    errors.check_field(self, 'epsilon', fine, 'above 0 and finite')
    finite = math.isfinite(self.offset)
    errors.check_field(self, 'offset', finite, 'a finite number')

  def param(self, size: int, axis: str | None = 'embed') -> Any:
    """Returns the scale, or scale and bias, of a norm over `size` numbers."""
    scale = parameters.Param(
      (size,), (axis,), parameters.constant(1.0 - self.offset), decay=False
    )
    if self.kind == 'rms':
      return scale
    bias = dataclasses.replace(scale, init=parameters.constant(0.0))
    return {'scale': scale, 'bias': bias}

  def table(self, size: int) -> parameters.Table:
    """Returns the norms of a residual part: 'norm', perhaps 'norm_after'."""
    names = ('norm',) if self.place == 'before' else ('norm', 'norm_after')
    return {name: self.param(size) for name in names}

  def apply(self, params: Any, x: jax.Array) -> jax.Array:
    """Normalises x [..., e] with the parameters of `param`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale = params['scale'] if self.kind == 'layer' else params
    if self.offset:  # half precision would lose digits of the sum
      scale = scale.astype(wide) + self.offset
    if self.kind == 'rms':
      return rms_norm(scale, x, epsilon=self.epsilon)
    normed = layer_norm(
      scale, params['bias'], x.astype(wide), epsilon=self.epsilon
    )
    return normed.astype(x.dtype)

  def apply_after(self, params: Any, x: jax.Array) -> jax.Array:
    """Normalises the output x of a part, by 'norm_after' if there is one."""
    if self.place == 'before':
      return x
    return self.apply(params['norm_after'], x)


def scale_param(size: int, axis: str = 'embed') -> parameters.Param:
  """Returns the learned scale of an RMS norm, initially one."""
  return NormConfig().param(size, axis)


def rms_norm(
  scale: jax.Array, x: jax.Array, *, epsilon: float = _EPSILON
) -> jax.Array:
  """Computes scale * x / rms(x) over the last axis.

  Args:
    scale: [e].
    x: [..., e]; the arithmetic is in float32 at least, since the squares of
      half-precision numbers overflow.
    epsilon: Added to the mean square.

  Returns:
    An array like x.

  References:
    Zhang and Sennrich, arXiv:1910.07467, 2019, eq. 4.
  """
  return _recomputed_rms_norm(epsilon)(scale, x)


@functools.cache
def _recomputed_rms_norm(epsilon: float) -> Callable[..., jax.Array]:
  def apply(scale, x):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)

  return base.recomputed(apply)


def layer_norm(
  scale: jax.Array, bias: jax.Array, x: jax.Array, *, epsilon: float = _EPSILON
) -> jax.Array:
  """Computes scale * (x - mean) / deviation + bias over the last axis.

  Args:
    scale: Broadcastable to x.
    bias: Broadcastable to x.
    x: [..., e], float32 or wider.
    epsilon: Added to the variance.

  Returns:
    An array like x.

  References:
    Ba et al., arXiv:1607.06450, 2016, eq. 4.
  """
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + epsilon) * scale + bias


def l2_normalize(x: jax.Array) -> jax.Array:
  """Computes x / |x| over the last axis.

  Zero stays zero: the constant under the root keeps its gradient finite.
  """
  return x * jax.lax.rsqrt(
    jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON
  )
