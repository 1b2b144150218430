"""What a memory minimises, its functions, and the names configs use for them.

An objective is `objective(prediction, target) -> value` over the last axis; its
gradient with respect to the prediction is the error that is written. Any such
function can be passed to the engine; `OBJECTIVES` and `ACTIVATIONS` only look
up the ones that configs name.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Objective = Callable[[jax.Array, jax.Array], jax.Array]
Activation = Callable[[jax.Array], jax.Array]

_SMOOTH = 1e-6  # under square roots


def l2(prediction: jax.Array, target: jax.Array) -> jax.Array:
  """Half the squared distance; its error is prediction - target.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 93 (with 1/2).
  """
  return 0.5 * jnp.sum(jnp.square(prediction - target), axis=-1)


def dot(prediction: jax.Array, target: jax.Array) -> jax.Array:
  """Negative inner product; its error is -target.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 92 (printed
    with the opposite sign, which unlearns).
  """
  return -jnp.sum(prediction * target, axis=-1)


def make_huber(threshold: float) -> Objective:
  """Half the squared distance; beyond `threshold`, absolute differences.

  References:
    Behrouz et al., Miras, arXiv:2504.13173, 2025 (Yaad), with one threshold for
    all tokens.
  """

  def huber(prediction, target):
    error = prediction - target
    square = jnp.sum(jnp.square(error), axis=-1)
    size = jnp.sum(jnp.sqrt(jnp.square(error) + _SMOOTH), axis=-1)
    return jnp.where(square <= threshold**2, 0.5 * square, threshold * size)

  return huber


def make_lp(power: float) -> Objective:
  """The sum of |prediction - target|^power, smooth at zero.

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
  """A / |A|_4^2 over each map [..., out, in].

  References:
    Behrouz et al., Miras, arXiv:2504.13173, 2025 (Moneta, q = 4).
  """
  return memory * jax.lax.rsqrt(
    jnp.sum(memory**4, axis=(-1, -2), keepdims=True) + _SMOOTH
  )


def softmax(memory: jax.Array) -> jax.Array:
  """Each output's weights as a distribution over its inputs, [..., out, in].

  References:
    Behrouz et al., Miras, arXiv:2504.13173, 2025 (Memora).
  """
  return jax.nn.softmax(memory, axis=-1)


# From what is written to what is read.
RETENTION_MAPS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'lq_norm': lq_norm,
  'softmax': softmax,
}

ACTIVATIONS: Mapping[str, Activation] = {
  'gelu': jax.nn.gelu,
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}
