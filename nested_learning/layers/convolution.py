"""Causal depthwise convolution whose last inputs are its state."""

import jax
import jax.numpy as jnp

from nested_learning import parameters


def table(width: int, channels: int, axis: str) -> parameters.Table:
  """One filter of `width` taps per channel, initially the identity plus noise.

  The last tap is the current token's.
  """

  def init(key, shape, dtype):
    noise = parameters.normal(0.1)(key, shape, dtype)
    return noise.at[-1].add(1.0)

  return {'kernel': parameters.Param((width, channels), (None, axis), init)}


def init_state(width: int, channels: int, batch_size: int, dtype) -> jax.Array:
  """The inputs before a stream's start: zeros [b, width - 1, channels]."""
  return jnp.zeros((batch_size, width - 1, channels), dtype)


def apply(
  params: parameters.Table,
  state: jax.Array | None,
  x: jax.Array,
  *,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Convolves x with what came before it in its document.

  Args:
    params: Of `table`.
    state: [b, width - 1, channels], from `init_state` or an earlier call; None
      at a stream's start.
    x: [b, t, channels].
    reset: bool [b, t], True at a document's first token, or None.
    mask: bool [b, t], False for tokens that are not there, or None. What those
      tokens get is undefined.

  Returns:
    [b, t, channels], and the state after the tokens.
  """
  kernel = params['kernel'].astype(x.dtype)
  width = kernel.shape[0]
  num_tokens = x.shape[1]
  order = None
  if state is None:
    state = init_state(width, x.shape[-1], x.shape[0], x.dtype)
  if mask is not None:  # tokens that are there move to the front
    order = jnp.argsort(~mask, axis=1, stable=True)
    x = jnp.take_along_axis(x, order[..., None], axis=1)
    if reset is not None:
      reset = jnp.take_along_axis(reset & mask, order, axis=1)
  padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
  document = None
  if reset is not None:
    document = jnp.cumsum(reset, axis=1)
    document = jnp.pad(document, ((0, 0), (width - 1, 0)))
  out = 0.0
  for tap in range(width):
    past = padded[:, tap : tap + num_tokens]
    if document is not None:
      same = document[:, tap : tap + num_tokens] == document[:, width - 1 :]
      past = jnp.where(same[..., None], past, 0.0)
    out = out + kernel[tap] * past
  if mask is None:
    last = padded[:, num_tokens:]
    if document is not None:
      same = document[:, num_tokens:] == document[:, -1:]
      last = jnp.where(same[..., None], last, 0.0)
    return out, last
  count = jnp.sum(mask, axis=1)
  index = count[:, None] + jnp.arange(width - 1)
  last = jnp.take_along_axis(padded, index[..., None], axis=1)
  if document is not None:
    latest = jnp.max(document, axis=1, keepdims=True)
    same = jnp.take_along_axis(document, index, axis=1) == latest
    last = jnp.where(same[..., None], last, 0.0)
  rank = jnp.argsort(order, axis=1)
  return jnp.take_along_axis(out, rank[..., None], axis=1), last
