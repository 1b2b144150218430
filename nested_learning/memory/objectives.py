"""Objectives, activations and retention maps of memories, and their names.

An objective is `objective(prediction, target) -> value` over the last axis. Its
gradient with respect to the prediction is the error that is written. The engine
takes any such function; the tables look up those that configs name.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Objective = Callable[[jax.Array, jax.Array], jax.Array]
Activation = Callable[[jax.Array], jax.Array]

# Added under square roots, whose gradient is infinite at zero.
_SMOOTH = 1e-6


def l2(prediction: jax.Array, target: jax.Array) -> jax.Array:
  """Computes half the squared distance; its error is prediction - target.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 93 (with 1/2).
  """
  return 0.5 * jnp.sum(jnp.square(prediction - target), axis=-1)


def dot(prediction: jax.Array, target: jax.Array) -> jax.Array:
  """Computes the negative inner product; its error is -target.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 92 (printed
    with the opposite sign, which unlearns).
  """
  return -jnp.sum(prediction * target, axis=-1)


def make_huber(threshold: float) -> Objective:
  """Makes half the squared distance, with absolute differences far away.

  Args:
    threshold: Distance beyond which differences are absolute, one for all
      tokens.

  Returns:
    An objective.

  References:
    Behrouz et al., Miras, arXiv:2504.13173, 2025 (Yaad).
  """

  def huber(prediction, target):
    error = prediction - target
    square = jnp.sum(jnp.square(error), axis=-1)
    size = jnp.sum(jnp.sqrt(jnp.square(error) + _SMOOTH), axis=-1)
    return jnp.where(square <= threshold**2, 0.5 * square, threshold * size)

  return huber


def make_lp(power: float) -> Objective:
  """Makes the sum of |prediction - target|^power, smooth at zero.

  Args:
    power: Exponent, above 1.

  Returns:
    An objective.

  References:
    Behrouz et al., Miras, arXiv:2504.13173, 2025 (Moneta).
  """

  def lp(prediction, target):
    square = jnp.square(prediction - target) + _SMOOTH
    return jnp.sum(square ** (power / 2), axis=-1)

  return lp


OBJECTIVES: Mapping[str, Objective] = {
  'l2': l2,
  'dot': dot,
  'huber': make_huber(1.0),
  'l3': make_lp(3.0),
}


def lq_norm(memory: jax.Array) -> jax.Array:
  """Computes A / |A|_4^2 for each map A [..., out, in].

  References:
    Behrouz et al., Miras, arXiv:2504.13173, 2025 (Moneta, q = 4).
  """
  return memory * jax.lax.rsqrt(
    jnp.sum(memory**4, axis=(-1, -2), keepdims=True) + _SMOOTH
  )


def softmax(memory: jax.Array) -> jax.Array:
  """Turns the weights of each output [..., out, in] into a distribution.

  References:
    Behrouz et al., Miras, arXiv:2504.13173, 2025 (Memora).
  """
  return jax.nn.softmax(memory, axis=-1)


# From the weights that are written to the weights that are read.
RETENTION_MAPS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'lq_norm': lq_norm,
  'softmax': softmax,
}

ACTIVATIONS: Mapping[str, Activation] = {
  'gelu': jax.nn.gelu,
  'silu': jax.nn.silu,
}
