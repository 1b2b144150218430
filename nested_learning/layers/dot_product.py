"""Softmax attention of given queries to given keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Persistent(NamedTuple):
  """Keys and values that every query sees, wherever it is.

  Attributes:
    query: [b, t, h, d], the queries without a position.
    key: [n, kv heads, d].
    value: [n, kv heads, d].
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  visible: jax.Array,
  *,
  persistent: Persistent | None = None,
) -> jax.Array:
  """softmax(query key^T / sqrt(d)) value, over the keys that are visible.

  Args:
    query: [b, t, h, d].
    key: [b, s, kv heads, d]; neighbouring query heads share one.
    value: [b, s, kv heads, d].
    visible: bool [b, t, s]. A query that sees nothing gets an average.
    persistent: What is seen beside them, or None.

  Returns:
    [b, t, h, d] in the dtype of value; softmax is in float32 at least.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)

  def score(query, key):
    query = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum(
      'btkgd,bskd->bkgts', query, key, preferred_element_type=wide
    )
    return scores * query.shape[-1] ** -0.5

  scores = jnp.where(
    visible[:, None, None], score(query, key), jnp.finfo(wide).min
  )
  if persistent is not None:
    rows = lambda x: jnp.broadcast_to(x, (len(value), *x.shape))
    learned = rows(persistent.key.astype(key.dtype))
    scores = jnp.concatenate([score(persistent.query, learned), scores], -1)
    learned = rows(persistent.value.astype(value.dtype))
    value = jnp.concatenate([learned, value], axis=1)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  out = jnp.einsum('bkgts,bskd->btkgd', weights, value)
  return out.reshape(query.shape)
