"""Softmax attention of given queries to given keys."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 256  # queries that are scored at a time
_GROUPS = 8  # of blocks that are scored against keys of one length, at most


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
  sees: Callable[[Any, int], jax.Array],
  *,
  is_causal: bool,
  persistent: Persistent | None = None,
) -> jax.Array:
  """`attend`, whose memory grows with the tokens and not with their square.

  Queries are taken a block at a time, and the backward pass scores each block
  again. Where they are causal, a group of blocks is scored against the keys up
  to its end alone: with eight groups, 56 % of all.

  Args:
    query: [b, t, h, d].
    key: [b, s, kv heads, d].
    value: [b, s, kv heads, d].
    places: Of the queries, leaves [b, t].
    sees: From the places of some queries and a number n of keys to which of the
      first n they see, bool [b, t, n].
    is_causal: Whether a query sees no key after its own, t being s.
    persistent: What is seen beside them, or None.

  Returns:
    [b, t, h, d] in the dtype of value.
  """
  (batch_size, num_tokens), num_keys = query.shape[:2], key.shape[1]

  def look(num_keys, block):
    query, unplaced, places = block
    return attend(
      query,
      key[:, :num_keys],
      value[:, :num_keys],
      sees(places, num_keys),
      persistent=persistent and persistent._replace(query=unplaced),
    )

  queries = query, persistent and persistent.query, places
  if num_tokens <= _BLOCK:
    return look(num_keys, queries)
  num_blocks = -(-num_tokens // _BLOCK)
  blocks = jax.tree.map(lambda x: _cut(x, num_blocks), queries)
  outputs = []
  for group in np.array_split(
    np.arange(num_blocks), min(num_blocks, _GROUPS) if is_causal else 1
  ):
    first, end = int(group[0]), int(group[-1]) + 1
    length = min(end * _BLOCK, num_keys) if is_causal else num_keys
    score = jax.checkpoint(functools.partial(look, length))
    in_group = jax.tree.map(lambda x, a=first, b=end: x[a:b], blocks)
    outputs.append(_map(score, in_group))
  out = jnp.moveaxis(jnp.concatenate(outputs), 0, 1)
  return out.reshape(batch_size, -1, *query.shape[2:])[:, :num_tokens]


def _map(function, xs):
  """`lax.map`, without a loop for one."""
  if len(jax.tree.leaves(xs)[0]) > 1:
    return jax.lax.map(function, xs)
  return function(jax.tree.map(lambda x: x[0], xs))[None]


def _cut(x, num_blocks):
  """[b, t, ...] to [block, b, _BLOCK, ...], the last one padded with zeros."""
  missing = num_blocks * _BLOCK - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
  return jnp.moveaxis(
    x.reshape(x.shape[0], num_blocks, _BLOCK, *x.shape[2:]), 1, 0
  )
