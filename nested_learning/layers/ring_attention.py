r"""Softmax attention over devices that share the tokens of a row.

Queries stay on their device. Keys and values travel round the ring of devices,
and every device accumulates the attention of its queries to each part:

.. math::
   top &= \max_s score_s \\
   out &= \sum_s e^{score_s - top} v_s / \sum_s e^{score_s - top}

one block of keys at a time: no device holds all keys of a row, or scores of
more than one block. The backward pass recomputes the scores, and the gradients
of keys and values travel round with the keys and values.

Every device scores all parts. Parts after its own are masked, so that half of
the work is wasted.

References:
  Liu et al., Ring Attention, arXiv:2310.01889, 2023.
  Dao et al., FlashAttention, arXiv:2205.14135, 2022 (sums and their backward
    pass, algorithms 1 and 4).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import context_parallel
from nested_learning.layers import dot_product
from nested_learning.layers import sliding_window

_BLOCK = 1024  # keys scored at a time, at most


class Places(NamedTuple):
  """Places of tokens [b, t], which decide the keys that a query sees.

  Attributes:
    position: int, number of earlier tokens of the stream.
    document: int, the token's document.
    present: bool, False for padding.
  """

  position: jax.Array
  document: jax.Array
  present: jax.Array


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  places: Places,
  *,
  persistent: dot_product.Apart | None = None,
) -> jax.Array:
  """Attends to every earlier token of the document, over the devices.

  Args:
    query: [b, t, h, d].
    key: [b, t, kv heads, d]; neighbouring query heads share one.
    value: [b, t, kv heads, d].
    places: Places of all tokens.
    persistent: Keys and values visible to every query, or None.

  Returns:
    [b, t, h, d] in the dtype of value. The outputs at padding are undefined.
  """
  run = context_parallel.over_parts(_attend_part, (1, 1, 1, 1), (1, 1))
  grouped = _group(query, key.shape[2])
  out, log_sum = run(grouped, key, value, places)
  # Two softmaxes are merged by the logarithms of their sums.
  if persistent is not None:
    query = _group(persistent.query, key.shape[2])
    scores = jnp.einsum(
      'btkgd,skd->btkgs',
      query,
      persistent.key.astype(query.dtype),
      preferred_element_type=log_sum.dtype,
    )
    scores *= query.shape[-1] ** -0.5
    learned_sum = jax.nn.logsumexp(scores, axis=-1)
    share = jax.nn.sigmoid(log_sum - learned_sum)[..., None]
    learned = jnp.einsum(
      'btkgs,skd->btkgd', jax.nn.softmax(scores), persistent.value
    )
    out = share * out + (1.0 - share) * learned
  return out.astype(value.dtype).reshape(*out.shape[:2], -1, out.shape[-1])


def attend_window(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  window: int,
  rotate: Callable[[jax.Array, jax.Array], jax.Array],
  scoring: dot_product.Scoring,
  reset: jax.Array | None = None,
  persistent: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, sliding_window.WindowState]:
  """Computes `sliding_window.attend` from a stream's start, over the devices.

  A device receives the last w tokens before its part, and nothing else.

  Args:
    query: [b, t, h, d].
    key: [b, t, kv heads, d].
    value: [b, t, kv heads, d].
    window: Tokens that a query sees, itself included, w.
    rotate: `rotate(x, position)` applies rotary positions.
    scoring: Scale and bound of the scores.
    reset: bool [b, t], True at a document's first token, or None.
    persistent: Keys and values [n, kv heads, d] visible to every query, or
      None.

  Returns:
    [b, t, h, d], and the state after the tokens.
  """
  shape = query.shape[:2]
  reset = jnp.zeros(shape, bool) if reset is None else reset
  document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)

  def part(persistent, query, key, value, reset, document):
    # The halo is zero before a row's start, where there is no document (-1).
    before = context_parallel.halo((key, value, document + 1), window)
    start = sliding_window.WindowState(
      key=before[0],
      value=before[1],
      document=before[2] - 1,
      slot=jnp.zeros_like(document[:, 0]),
      current=document[:, 0] - reset[:, 0],
    )
    out, state = sliding_window.attend(
      start,
      query,
      key,
      value,
      window=window,
      rotate=rotate,
      scoring=scoring,
      reset=reset,
      persistent=persistent,
    )
    return out, jax.tree.map(lambda x: x[None], state)

  run = context_parallel.over_parts(part, (None, *(1,) * 5), (1, 0))
  out, states = run(persistent, query, key, value, reset, document)
  return out, jax.tree.map(lambda x: x[-1], states)


@jax.custom_vjp
def _attend_part(query, key, value, places):
  """Returns outputs [b, t, k, g, d] and log-sums [b, t, k, g] of a part."""
  # Sums over thousands of keys lose digits in half precision.
  wide = jnp.promote_types(query.dtype, jnp.float32)
  own = places

  def add(total, block):
    key, value, places = block
    scores = _score(query, key, own, places)
    top = jnp.maximum(total[2], jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None])
    rescale = jnp.exp(total[2] - top)
    seen = jnp.einsum(
      'btkgs,bskd->btkgd',
      weights.astype(value.dtype),
      value,
      preferred_element_type=wide,
    )
    out = rescale[..., None] * total[0] + seen
    return (out, rescale * total[1] + jnp.sum(weights, -1), top), None

  lines = query.shape[:-1]
  total = (
    jnp.zeros(query.shape, wide),
    jnp.zeros(lines, wide),
    jnp.full(lines, jnp.finfo(wide).min, wide),  # -inf - -inf is NaN
  )
  total, _ = _go_round(add, total, (key, value, places))
  out, norm, top = total
  return out / norm[..., None], top + jnp.log(norm)


def _attend_forward(query, key, value, places):
  out, log_sum = _attend_part(query, key, value, places)
  return (out, log_sum), (query, key, value, places, out, log_sum)


def _attend_backward(kept, gradients):
  query, key, value, own, out, log_sum = kept
  out_gradient, sum_gradient = gradients
  wide = out.dtype
  scale = query.shape[-1] ** -0.5
  # The term shared by the gradients of all scores of a query.
  shared = sum_gradient - jnp.sum(out * out_gradient, axis=-1)

  def add(query_gradient, block):
    key, value, places = block
    scores = _score(query, key, own, places)
    weights = jnp.exp(scores - log_sum[..., None])
    of_value = jnp.einsum('btkgs,btkgd->bskd', weights, out_gradient)
    of_weights = jnp.einsum(
      'btkgd,bskd->btkgs', out_gradient, value.astype(wide)
    )
    of_scores = weights * (of_weights + shared[..., None]) * scale
    of_query = jnp.einsum('btkgs,bskd->btkgd', of_scores, key.astype(wide))
    of_key = jnp.einsum('btkgs,btkgd->bskd', of_scores, query.astype(wide))
    return query_gradient + of_query, (of_key, of_value)

  query_gradient, (of_key, of_value) = _go_round(
    add, jnp.zeros(query.shape, wide), (key, value, own)
  )
  return (
    query_gradient.astype(query.dtype),
    of_key.astype(key.dtype),
    of_value.astype(value.dtype),
    None,
  )


_attend_part.defvjp(_attend_forward, _attend_backward)


def _go_round(add, total, part):
  """Accumulates over all parts of a row, beginning with the device's own.

  Args:
    add: `add(total, block) -> (total, found)` for one block of keys. `found` is
      summed over devices and returned to the device that owns the block.
    total: Initial value.
    part: This device's (key, value, places).

  Returns:
    The total, and the sums of `found` for this device's own part.
  """
  key, *_ = part
  num_tokens = key.shape[1]
  num_turns = jax.lax.axis_size(context_parallel.AXIS) - 1
  # The largest block that divides the part.
  size = next(
    size
    for size in range(min(_BLOCK, num_tokens), 0, -1)
    if num_tokens % size == 0
  )
  cut = lambda x: jnp.moveaxis(
    x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0
  )
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])

  def add_part(total, part):
    total, found = jax.lax.scan(add, total, jax.tree.map(cut, part))
    return total, jax.tree.map(join, found)

  def turn(carry, _):
    total, part, sums = carry
    part, sums = context_parallel.shift((part, sums), 1, wrap=True)
    total, found = add_part(total, part)
    return (total, part, jax.tree.map(jnp.add, sums, found)), None

  total, sums = add_part(total, part)
  (total, _, sums), _ = jax.lax.scan(
    turn, (total, part, sums), length=num_turns
  )
  return total, context_parallel.shift(sums, 1, wrap=True)


def _score(query, key, own, places):
  """Returns scaled scores [b, t, k, g, s]; hidden keys get the least float."""
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum(
    'btkgd,bskd->btkgs', query, key, preferred_element_type=wide
  )
  age = own.position[:, :, None] - places.position[:, None, :]
  visible = (age >= 0) & places.present[:, None, :]
  visible &= own.document[:, :, None] == places.document[:, None, :]
  scores *= query.shape[-1] ** -0.5
  return jnp.where(visible[:, :, None, None], scores, jnp.finfo(wide).min)


def _group(query, num_kv_heads):
  """Groups queries [b, t, h, d] by their key head, [b, t, k, g, d]."""
  return query.reshape(*query.shape[:2], num_kv_heads, -1, query.shape[-1])
