"""Drawing the next token from logits."""

import jax
import jax.numpy as jnp


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """Sets all but the k largest logits to minus infinity.

  Args:
    logits: [..., v].
    k: How many to keep, at least 1; ties with the k-th are kept too.

  Returns:
    An array like logits.
  """
  k = min(k, logits.shape[-1])
  smallest = jax.lax.top_k(logits, k)[0][..., -1:]
  return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
  """Keeps the fewest most likely tokens that together have probability >= p.

  Args:
    logits: [..., v].
    p: In (0, 1]; the most likely token is always kept, and ties with the least
      likely one that is kept are kept too.

  Returns:
    An array like logits, minus infinity where dropped.

  References:
    Holtzman et al., arXiv:1904.09751, 2019, section 3.1 (nucleus sampling).
  """
  descending = -jnp.sort(-logits, axis=-1)
  probability = jax.nn.softmax(descending, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  kept = jnp.where(before < p, descending, jnp.inf)
  smallest = jnp.min(kept, axis=-1, keepdims=True)
  return jnp.where(logits < smallest, -jnp.inf, logits)


def sample(
  key: jax.Array,
  logits: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float = 1.0,
) -> jax.Array:
  """Draws one token per row; the most likely one at temperature 0.

  Args:
    key: A key from `jax.random.key`.
    logits: float32 [b, v].
    temperature: Divides the logits; 0 is greedy.
    top_k: Draw among the k most likely tokens only; None is all of them.
    top_p: Draw among the most likely tokens of this total probability, after
      temperature and top_k; 1 is all of them.

  Returns:
    Tokens, int32 [b].
  """
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_k is not None:
    logits = keep_top_k(logits, top_k)
  if top_p < 1:
    logits = keep_top_p(logits, top_p)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
