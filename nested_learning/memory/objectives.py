"""What a memory minimises when it writes, and the names configs use for it.

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


OBJECTIVES: Mapping[str, Objective] = {'l2': l2, 'dot': dot}

ACTIVATIONS: Mapping[str, Activation] = {
  'gelu': jax.nn.gelu,
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}
