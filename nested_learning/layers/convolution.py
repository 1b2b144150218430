"""Causal depthwise convolution; its state is its last inputs."""

import jax
import jax.numpy as jnp

from nested_learning import context_parallel
from nested_learning import parameters
from nested_learning.memory import layout


def table(width: int, channels: int, axis: str) -> parameters.Table:
  """Returns the parameters: one filter of `width` taps per channel.

  The filters start at the identity plus noise. The last tap weighs the current
  token.
  """

  def init(key, shape, dtype):
    noise = parameters.normal(0.1)(key, shape, dtype)
    return noise.at[-1].add(1.0)

  return {
    'kernel': parameters.Param(
      (width, channels), (None, axis), init, decay=False
    )
  }


def init_state(width: int, channels: int, batch_size: int, dtype) -> jax.Array:
  """Returns the state at a stream's start: zeros [b, width - 1, channels]."""
  return jnp.zeros((batch_size, width - 1, channels), dtype)


def apply(
  params: parameters.Table,
  state: jax.Array | None,
  x: jax.Array,
  *,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Convolves each token with the tokens before it in its document.

  Devices that share the tokens of a row exchange the `width - 1` tokens at the
  borders of their parts.

  Args:
    params: Parameters of `table`.
    state: [b, width - 1, channels], from `init_state` or an earlier call; None
      at a stream's start.
    x: [b, t, channels].
    reset: bool [b, t], True at a document's first token, or None.
    mask: bool [b, t], False for padding, or None. The outputs at padding are
      undefined.

  Returns:
    [b, t, channels], and the state after the tokens.
  """
  if not x.shape[1]:
    if state is None:
      width, channels = params['kernel'].shape
      state = init_state(width, channels, x.shape[0], x.dtype)
    return x, state
  in_parts = context_parallel.num_parts(x.shape[1]) > 1
  if state is not None or mask is not None or not in_parts:
    return _apply(params, state, x, reset=reset, mask=mask)
  before = params['kernel'].shape[0] - 1

  def part(params, tokens):
    x, reset = tokens
    state, borders = context_parallel.halo(tokens, before)
    if reset is not None:  # tokens before a border are of another document
      later = jnp.cumsum(borders[:, ::-1], axis=1)[:, ::-1] - borders
      state = jnp.where((later > 0)[..., None], 0.0, state)
    out, state = _apply(params, state, x, reset=reset)
    return out, state[None]

  run = context_parallel.over_parts(part, (None, 1), (1, 0))
  out, states = run(params, (x, reset))
  return out, states[-1]


def _apply(params, state, x, *, reset=None, mask=None):
  """Convolves the tokens that one device holds."""
  kernel = params['kernel'].astype(x.dtype)
  width = kernel.shape[0]
  num_tokens = x.shape[1]
  if state is None:
    state = init_state(width, x.shape[-1], x.shape[0], x.dtype)
  if mask is not None:
    order, place = layout.present_first(mask)
    x = layout.take(x, order, 1)
    reset = None if reset is None else layout.take(reset & mask, order, 1)
  padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
  document = None
  if reset is not None:
    document = jnp.cumsum(reset, axis=1)
    document = jnp.pad(document, ((0, 0), (width - 1, 0)))
  out = _filter(kernel, padded, document)
  if mask is None:
    last = padded[:, num_tokens:]  # [b, width - 1, channels]
    if document is not None:
      # Tokens before the last border are of another document.
      same = document[:, num_tokens:] == document[:, -1:]
      last = jnp.where(same[..., None], last, 0.0)
    return out, last
  count = jnp.sum(mask, axis=1)
  index = count[:, None] + jnp.arange(width - 1)
  last = layout.take(padded, index, 1)
  if document is not None:
    latest = jnp.max(document, axis=1, keepdims=True)
    same = layout.take(document, index, 1) == latest
    last = jnp.where(same[..., None], last, 0.0)
  return layout.take(out, place, 1), last


@jax.custom_vjp
def _filter(kernel, padded, document):
  """Filters [b, width - 1 + t, c] to [b, t, c], within documents.

  The gradient is written by hand, as the same sum backwards in time: automatic
  differentiation would pad every tap's slice to a copy as long as x.
  """
  num_tokens = padded.shape[1] - len(kernel) + 1
  own = None if document is None else document[:, -num_tokens:]
  window = lambda x, tap: x[:, tap : tap + num_tokens]
  out = 0.0
  for tap, weight in enumerate(kernel):
    past = window(padded, tap)
    if document is not None:
      past = jnp.where((window(document, tap) == own)[..., None], past, 0.0)
    out = out + weight * past
  return out


def _filter_fwd(kernel, padded, document):
  return _filter(kernel, padded, document), (kernel, padded, document)


def _filter_bwd(kept, gradient):
  kernel, padded, document = kept
  before = len(kernel) - 1
  num_tokens, length = gradient.shape[1], padded.shape[1]
  # Tokens after the call are of no document.
  later = jnp.pad(gradient, ((0, 0), (before, before), (0, 0)))
  own = None
  if document is not None:
    own = jnp.pad(
      document[:, -num_tokens:],
      ((0, 0), (before, before)),
      constant_values=-1,
    )
  of_padded, of_kernel = 0.0, []
  for tap, weight in enumerate(kernel):
    window = slice(before - tap, before - tap + length)
    sees = later[:, window]
    if document is not None:
      same = own[:, window] == document
      sees = jnp.where(same[..., None], sees, 0.0)
    of_padded = of_padded + weight * sees
    of_kernel.append(jnp.sum(sees * padded, axis=(0, 1)))
  return jnp.stack(of_kernel), of_padded, None


_filter.defvjp(_filter_fwd, _filter_bwd)
