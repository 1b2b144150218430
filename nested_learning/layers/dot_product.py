"""Softmax attention of given queries to given keys.

On NVIDIA GPUs, calls that its kernel can take go to cuDNN by way of
`jax.nn.dot_product_attention`; `why_not_cudnn` has the rule. Elsewhere that
function is not used: it holds all t x s scores at once, computes the softmax in
float32 even for float64 inputs, and has no second query for keys apart from the
others.

References:
  Ainslie et al., GQA, arXiv:2305.13245, 2023 (grouped keys and values).
  Gemma Team, Gemma 2, arXiv:2408.00118, 2024, section 2 (caps of scores).
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 256  # queries scored at a time
_GROUPS = 8  # groups of blocks, each scored against keys of one length
_CUDNN_MASK_BYTES = 2**30  # of a call; cuDNN reads a bias [b, 1, t, s]


class Scoring(NamedTuple):
  """How products of queries and keys become scores.

  Attributes:
    scale: Factor of the products; None is 1 / sqrt(d).
    cap: Bound of the scores, cap * tanh(score / cap); None for no bound.
  """

  scale: float | None = None
  cap: float | None = None

  def factor(self, head_dim: int) -> float:
    """Returns the factor of products over `head_dim` channels."""
    return head_dim**-0.5 if self.scale is None else self.scale

  def apply(self, products: jax.Array, head_dim: int) -> jax.Array:
    """Returns the scores of products over `head_dim` channels."""
    return cap(products * self.factor(head_dim), self.cap)


def cap(x: jax.Array, bound: float | None) -> jax.Array:
  """Computes bound * tanh(x / bound), or x if there is no bound."""
  return x if bound is None else bound * jnp.tanh(x / bound)


class Apart(NamedTuple):
  """Keys that are scored with queries of their own.

  Attributes:
    query: [b, t, h, d].
    key: [n, kv heads, d], or [b, n, kv heads, d] if every row has its own.
    value: Like key.
    visible: bool [b, t, n], or None if every query sees all of them.
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array
  visible: jax.Array | None = None


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  visible: jax.Array,
  *,
  scoring: Scoring,
  apart: Sequence[Apart] = (),
) -> jax.Array:
  """Computes softmax(query key^T / sqrt(d)) value over the visible keys.

  Args:
    query: [b, t, h, d].
    key: [b, s, kv heads, d]; neighbouring query heads share one.
    value: [b, s, kv heads, d].
    visible: bool [b, t, s]. A query that sees no key gets the mean value.
    scoring: Scale and bound of the scores.
    apart: Further keys and values, with queries of their own.

  Returns:
    [b, t, h, d] in the dtype of value; the softmax is in float32 at least.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)

  def score(query, key):
    query = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum(
      'btkgd,bskd->bkgts', query, key, preferred_element_type=wide
    )
    return scoring.apply(scores, query.shape[-1])

  def hide(scores, visible):
    # The smallest number and not -inf, whose softmax is NaN where all is
    # masked.
    return jnp.where(visible[:, None, None], scores, jnp.finfo(wide).min)

  scores = hide(score(query, key), visible)
  rows = lambda x: jnp.broadcast_to(x, (len(query), *x.shape[-3:]))
  for other in apart:
    found = score(other.query, rows(other.key.astype(key.dtype)))
    if other.visible is not None:
      found = hide(found, other.visible)
    scores = jnp.concatenate([found, scores], axis=-1)
    value = jnp.concatenate([rows(other.value.astype(value.dtype)), value], 1)
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
  scoring: Scoring,
  persistent: Apart | None = None,
) -> jax.Array:
  """Computes `attend` with memory linear in the number of tokens.

  Scores one block of queries at a time, and scores it again in the backward
  pass. Causal queries are scored against the keys up to the end of their group
  of blocks: with eight groups, 56 % of all scores. In a program for NVIDIA GPUs
  cuDNN computes it instead, unless `why_not_cudnn` names a reason.

  Args:
    query: [b, t, h, d].
    key: [b, s, kv heads, d].
    value: [b, s, kv heads, d].
    places: Positions of the queries, a pytree of [b, t].
    sees: `sees(places, n)` returns which of the first n keys the queries at
      these places see, bool [b, t, n].
    is_causal: Whether no query sees a key after its own; t is s then.
    scoring: Scale and bound of the scores.
    persistent: Keys and values visible to every query, or None.

  Returns:
    [b, t, h, d] in the dtype of value.
  """
  arrays = query, key, value, places
  options = {'is_causal': is_causal, 'scoring': scoring}
  reason = why_not_cudnn(
    query,
    key,
    widest=_widest_cudnn_head(),
    is_causal=is_causal,
    scoring=scoring,
    persistent=persistent,
  )
  if reason is None:
    # Arrays may lie on the CPU of a machine with GPUs.
    return jax.lax.platform_dependent(
      *arrays,
      cuda=lambda *arrays: _attend_in_cudnn(*arrays, sees, **options),
      default=lambda *arrays: _attend_in_blocks(*arrays, sees, **options),
    )
  return _attend_in_blocks(*arrays, sees, persistent=persistent, **options)


def why_not_cudnn(
  query: jax.Array,
  key: jax.Array,
  *,
  widest: int,
  is_causal: bool,
  scoring: Scoring,
  persistent: Apart | None = None,
) -> str | None:
  """Returns why cuDNN does not compute a call of `attend_in_blocks`, or None.

  Args:
    query: As in `attend_in_blocks`.
    key: As in `attend_in_blocks`.
    widest: Width of the widest head that cuDNN takes here; 0 if there is no
      GPU for it.
    is_causal: As in `attend_in_blocks`.
    scoring: As in `attend_in_blocks`.
    persistent: As in `attend_in_blocks`.
  """
  head_dim = query.shape[-1]
  half = jnp.bfloat16, jnp.float16
  num_tokens, num_keys = query.shape[1], key.shape[1]
  mask_bytes = 2 * query.shape[0] * num_tokens * num_keys
  reasons = {
    'there is no NVIDIA GPU from Ampere on': not widest,
    f'the dtype is {query.dtype}, not bfloat16': query.dtype not in half,
    f'head_dim={head_dim} is above {widest} or no multiple of 8': (
      head_dim > widest or head_dim % 8 != 0
    ),
    'scores are bounded': scoring.cap is not None,
    'some keys have queries of their own': persistent is not None,
    'queries see keys of an earlier call': not is_causal,
    f'{num_tokens} tokens are odd': num_tokens % 2 != 0,
    f'its mask would take {mask_bytes:,} bytes': mask_bytes > _CUDNN_MASK_BYTES,
  }
  return next((reason for reason, holds in reasons.items() if holds), None)


def _widest_cudnn_head() -> int:
  """Returns the width of the widest head that cuDNN takes; 0 without a GPU."""
  if jax.default_backend() != 'gpu':
    return 0
  capability = getattr(jax.devices()[0], 'compute_capability', '')
  found = capability.split('.')[0]  # as in '9.0'; AMD's are names
  major = int(found) if found.isdigit() else 0
  return 256 if major >= 9 else 128 if major == 8 else 0


def _attend_in_cudnn(query, key, value, places, sees, *, is_causal, scoring):
  """Computes `attend_in_blocks` by a kernel of cuDNN."""
  visible = sees(places, key.shape[1])[:, None]  # [b, 1, t, s]
  return jax.nn.dot_product_attention(
    query,
    key.astype(query.dtype),
    value.astype(query.dtype),
    mask=visible,
    scale=scoring.factor(query.shape[-1]),
    is_causal=is_causal,
    implementation='cudnn',
  ).astype(value.dtype)


def _attend_in_blocks(
  query, key, value, places, sees, *, is_causal, scoring, persistent=None
):
  """Computes `attend_in_blocks` block by block."""
  (batch_size, num_tokens), num_keys = query.shape[:2], key.shape[1]

  def look(num_keys, block):
    query, unplaced, places = block
    return attend(
      query,
      key[:, :num_keys],
      value[:, :num_keys],
      sees(places, num_keys),
      scoring=scoring,
      apart=(persistent._replace(query=unplaced),) if persistent else (),
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
