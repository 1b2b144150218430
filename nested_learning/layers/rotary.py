"""Rotary positions, and how their frequencies are scaled for long contexts.

References:
  Su et al., RoFormer, arXiv:2104.09864, 2021, eq. 34.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from nested_learning import errors


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Divides all frequencies by one factor.

  References:
    Chen et al., arXiv:2306.15595, 2023, eq. 4 (position interpolation).
  """

  factor: float  # at least 1

  NAME: ClassVar = 'linear'

  def __post_init__(self):
    _check_factor(self)

  def scale(self, frequency: jax.Array) -> jax.Array:
    """Scales frequencies [d / 2], in radians per token."""
    return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Divides low frequencies by a factor and keeps high ones.

  Wavelengths below original_length / high_factor are kept, those above
  original_length / low_factor are stretched, and those between are mixed.

  References:
    Grattafiori et al., arXiv:2407.21783, 2024, section 3.4.2.
  """

  factor: float = 8.0  # at least 1
  low_factor: float = 1.0
  high_factor: float = 4.0  # above low_factor
  original_length: int = 8192  # tokens of the context before scaling

  NAME: ClassVar = 'llama3'

  def __post_init__(self):
    _check_factor(self)
    errors.check_field(self, 'low_factor', self.low_factor > 0, 'above 0')
    above = self.low_factor < self.high_factor < math.inf
    rule = f'a finite number above low_factor={self.low_factor}'
    errors.check_field(self, 'high_factor', above, rule)
    at_least_one = self.original_length >= 1
    errors.check_field(self, 'original_length', at_least_one, 'at least 1')

  def scale(self, frequency: jax.Array) -> jax.Array:
    """Scales frequencies [d / 2], in radians per token."""
    turns = frequency * (self.original_length / (2 * math.pi))
    kept = (turns - self.low_factor) / (self.high_factor - self.low_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return kept * frequency + (1.0 - kept) * frequency / self.factor


Scaling = LinearScaling | Llama3Scaling


def rotate(
  x: jax.Array,
  position: jax.Array,
  theta: float | None,
  scaling: Scaling | None = None,
) -> jax.Array:
  """Rotates pairs of channels by angles proportional to the position.

  The score of a rotated query and key depends on their distance alone.

  Args:
    x: [b, t, h, d]; channel i is paired with channel i + d / 2.
    position: int [b, t], or [t] for all rows.
    theta: Base of the wavelengths; None returns x as it is.
    scaling: How frequencies are scaled; None keeps them.

  Returns:
    An array like x.
  """
  if theta is None:
    return x
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half) / half)
  if scaling is not None:
    frequency = scaling.scale(frequency)
  angle = position[..., None, None] * frequency  # [(b,) t, 1, d / 2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = x[..., :half], x[..., half:]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  # The angles are float32, which would widen bfloat16 inputs.
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _check_factor(scaling: Scaling) -> None:
  fine = 1 <= scaling.factor < math.inf
  errors.check_field(scaling, 'factor', fine, 'a finite number of at least 1')
