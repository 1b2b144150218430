"""Softmax attention of given queries to given keys, and rotary positions.

`jax.nn.dot_product_attention` is not used. It holds all t x s scores at once,
computes the softmax in float32 even for float64 inputs, and has no second query
for keys without a position. Its cuDNN kernel, which would be faster on GPUs,
must be requested by hand and takes half-precision inputs only.

References:
  Su et al., RoFormer, arXiv:2104.09864, 2021, eq. 34 (rotary positions).
  Ainslie et al., GQA, arXiv:2305.13245, 2023 (grouped keys and values).
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 256  # queries scored at a time
_GROUPS = 8  # groups of blocks, each scored against keys of one length


class Persistent(NamedTuple):
  """Learned keys and values that every query sees, at any distance.

  Attributes:
    query: [b, t, h, d], the queries before rotation.
    key: [n, kv heads, d].
    value: [n, kv heads, d].
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array


def rotate(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
  """Rotates pairs of channels by angles proportional to the position.

  The score of a rotated query and key depends on their distance alone.

  Args:
    x: [b, t, h, d]; channel i is paired with channel i + d / 2.
    position: int [b, t], or [t] for all rows.
    theta: Base of the wavelengths.

  Returns:
    An array like x.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half) / half)
  angle = position[..., None, None] * frequency  # [(b,) t, 1, d / 2]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = x[..., :half], x[..., half:]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  # The angles are float32, which would widen bfloat16 inputs.
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  visible: jax.Array,
  *,
  persistent: Persistent | None = None,
) -> jax.Array:
  """Computes softmax(query key^T / sqrt(d)) value over the visible keys.

  Args:
    query: [b, t, h, d].
    key: [b, s, kv heads, d]; neighbouring query heads share one.
    value: [b, s, kv heads, d].
    visible: bool [b, t, s]. A query that sees no key gets the mean value.
    persistent: Keys and values visible to every query, or None.

  Returns:
    [b, t, h, d] in the dtype of value; the softmax is in float32 at least.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)

  def score(query, key):
    query = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum(
      'btkgd,bskd->bkgts', query, key, preferred_element_type=wide
    )
    return scores * query.shape[-1] ** -0.5

  # The smallest number and not -inf, whose softmax is NaN where all is masked.
  scores = jnp.where(
    visible[:, None, None], score(query, key), jnp.finfo(wide).min
  )
  if persistent is not None:
    rows = lambda x: jnp.broadcast_to(x, (len(value), *x.shape))
    learned = rows(persistent.key.astype(key.dtype))
    scores = jnp.concatenate([score(persistent.query, learned), scores], -1)
    learned = rows(persistent.value.astype(value.dtype))
    value = jnp.concatenate([learned, value], axis=1)
  # Weights are at most 1: half precision suffices for the second product.
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
  """Computes `attend` with memory linear in the number of tokens.

  Scores one block of queries at a time, and scores it again in the backward
  pass. Causal queries are scored against the keys up to the end of their group
  of blocks: with eight groups, 56 % of all scores.

  Args:
    query: [b, t, h, d].
    key: [b, s, kv heads, d].
    value: [b, s, kv heads, d].
    places: Positions of the queries, a pytree of [b, t].
    sees: `sees(places, n)` returns which of the first n keys the queries at
      these places see, bool [b, t, n].
    is_causal: Whether no query sees a key after its own; t is s then.
    persistent: Keys and values visible to every query, or None.

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
    # Recomputed in the backward pass, which then keeps no scores [t, s].
    score = jax.checkpoint(functools.partial(look, length))
    in_group = jax.tree.map(lambda x, a=first, b=end: x[a:b], blocks)
    outputs.append(_map(score, in_group))
  out = jnp.moveaxis(jnp.concatenate(outputs), 0, 1)
  return out.reshape(batch_size, -1, *query.shape[2:])[:, :num_tokens]


def _map(function, xs):
  """Maps over the leading axis, without a loop if it has one entry."""
  if len(jax.tree.leaves(xs)[0]) > 1:
    return jax.lax.map(function, xs)
  return function(jax.tree.map(lambda x: x[0], xs))[None]


def _cut(x, num_blocks):
  """Cuts [b, t, ...] into [n, b, _BLOCK, ...], zeros after the last token."""
  missing = num_blocks * _BLOCK - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
  return jnp.moveaxis(
    x.reshape(x.shape[0], num_blocks, _BLOCK, *x.shape[2:]), 1, 0
  )
