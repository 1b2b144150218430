"""Softmax attention of given queries to given keys."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_BLOCK = 512  # queries that are scored at a time, where there are many
_MANY = 2048  # queries; fewer are scored at once


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


def attend_in_blocks(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  places: Any,
  sees: Callable[[Any], jax.Array],
  *,
  persistent: Persistent | None = None,
) -> jax.Array:
  """`attend`, whose memory grows with the tokens and not with their square.

  Many queries are taken a block at a time, and the backward pass scores each
  block again.

  Args:
    query: [b, t, h, d].
    key: [b, s, kv heads, d].
    value: [b, s, kv heads, d].
    places: Of the queries, leaves [b, t].
    sees: From the places of some queries to the keys they see, bool [b, t, s].
    persistent: What is seen beside them, or None.

  Returns:
    [b, t, h, d] in the dtype of value.
  """
  unplaced = None if persistent is None else persistent.query

  def look(block):
    query, unplaced, places = block
    beside = persistent and persistent._replace(query=unplaced)
    return attend(query, key, value, sees(places), persistent=beside)

  queries = query, unplaced, places
  num_tokens = query.shape[1]
  if num_tokens < _MANY:
    return look(queries)
  num_blocks = -(-num_tokens // _BLOCK)
  blocks = jax.tree.map(lambda x: _cut(x, num_blocks), queries)
  out = jax.lax.map(jax.checkpoint(look), blocks)
  return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])[
    :, :num_tokens
  ]


def _cut(x, num_blocks):
  """[b, t, ...] to [block, b, _BLOCK, ...], the last one padded with zeros."""
  missing = num_blocks * _BLOCK - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
  return jnp.moveaxis(
    x.reshape(x.shape[0], num_blocks, _BLOCK, *x.shape[2:]), 1, 0
  )
