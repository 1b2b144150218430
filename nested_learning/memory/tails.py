r"""Steps that sum the errors of several tokens: a window of those before.

With `window` c, a token's step has the errors of the last c tokens of its
document, its own the last, where other rules have its own alone:

.. math::
   S_t &= momentum_t S_{t-1} + \sum_{i=t-c+1}^{t} weight_i \delta_i x_i^T \\
   W_t &= W_{ref} + retention_t (W_{t-1} - W_{ref}) - S_t

This is Atlas' Omega rule. Errors are of the chunk's anchor, also those of
tokens that belong to earlier chunks, so that with chunks of one token it is the
paper's to the letter; weight_i is inner_lr_i. Its \gamma_i^{(t)} may differ
between the tokens t that look at token i; here it is one number of token i.

A stream carries the last c - 1 tokens that were written, its tail.

References:
  Behrouz et al., Atlas, arXiv:2505.23735, 2025, section 3.2 (the Omega rule).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import rows


class Tail(NamedTuple):
  """The c - 1 last tokens that were written.

  Attributes:
    key: [b, h, c - 1, d].
    value: [b, h, c - 1, d].
    weight: Of the token's error, [b, h, c - 1, 1].
    valid: bool [b, 1, c - 1, 1], whether it is a token of this document.
  """

  key: jax.Array
  value: jax.Array
  weight: jax.Array
  valid: jax.Array


class Window(NamedTuple):
  """Every chunk with the c - 1 tokens before it: p tokens, of n chunks.

  Attributes:
    key: [n, b, h, p, d].
    value: [n, b, h, p, d].
    weight: [n, b, h, p, 1].
    band: 1 where a token of the chunk has the error of another in its step,
      [n, b, 1, chunk size, p]; else 0.
  """

  key: jax.Array
  value: jax.Array
  weight: jax.Array
  band: jax.Array


def init_tail(initial: Any, batch_size: int, window: int) -> Tail:
  """The tail at a stream's start: nothing.

  Args:
    initial: Initial memory per map, [h, ..., out, in]; values are as wide as
      keys.
    batch_size: Rows b.
    window: c, tokens.

  Returns:
    A `Tail`.
  """
  heads, _, dim = initial['in'].shape[-3:]
  zeros = lambda d: jnp.zeros(
    (batch_size, heads, window - 1, d), initial['in'].dtype
  )
  valid = jnp.zeros((batch_size, 1, window - 1, 1), bool)
  return Tail(zeros(dim), zeros(dim), zeros(1), valid)


def append(tail: Tail, token: Tail, *, keep: jax.Array) -> tuple[Tail, Tail]:
  """The tail with one token more.

  Args:
    tail: Of c - 1 tokens.
    token: The same of the token that comes next.
    keep: bool [b], whether that token belongs to the stream.

  Returns:
    The c tokens of its window, and the tail after it.
  """
  join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=2)
  window = jax.tree.map(join, tail, token)
  later = jax.tree.map(lambda x: x[:, :, 1:], window)
  return window, rows.where(keep, later, tail)


def lay_out(
  tail: Tail,
  tokens: Tail,
  offset: jax.Array,
  chunk_size: int,
  *,
  reset: jax.Array | None,
  write: bool,
) -> tuple[Window, Tail]:
  """The window of every chunk of a call, and the tail after it.

  Args:
    tail: Before the call.
    tokens: Those of the call in slots of whole chunks, [b, h, s, ...]; `valid`
      says which slots hold one.
    offset: int [b], slots of the first chunk that earlier calls filled.
    chunk_size: Slots of a chunk.
    reset: bool [b, s], True at a document's first token, or None.
    write: Whether tokens write.

  Returns:
    The `Window` and the `Tail`.
  """
  past = tail.key.shape[2]
  num_slots = tokens.key.shape[2]
  index = jnp.arange(past + num_slots)
  at = index - offset[:, None]  # the place in the tail, right before the call
  is_tail = (at >= 0) & (at < past)
  at = jnp.clip(at, 0, max(past - 1, 0))

  def join(before, after):
    pads = [(0, 0), (0, 0), (past, 0), (0, 0)]
    after = jnp.pad(after, pads)
    if not past:
      return after
    before = rows.take(before, at, 2).astype(after.dtype)
    return jnp.where(is_tail[:, None, :, None], before, after)

  whole = jax.tree.map(join, tail, tokens)
  document = jnp.zeros((offset.shape[0], past + num_slots), jnp.int32)
  if reset is not None:
    document = jnp.cumsum(jnp.pad(reset, ((0, 0), (past, 0))), axis=1)
  valid = whole.valid[:, 0, :, 0]

  view = jnp.arange(0, num_slots, chunk_size)[:, None]
  view = view + jnp.arange(past + chunk_size)
  cut = lambda x: jnp.moveaxis(x[:, :, view], 2, 0)
  age = past + jnp.arange(chunk_size)[:, None] - jnp.arange(past + chunk_size)
  near = (age >= 0) & (age <= past)
  documents, valids = document[:, view], valid[:, view]  # [b, n, p]
  steps = tokens.valid.reshape(*documents.shape[:2], chunk_size, 1) & write
  band = near & valids[:, :, None] & steps
  band &= documents[:, :, None] == documents[:, :, past:, None]
  band = jnp.moveaxis(band, 1, 0)[:, :, None].astype(whole.weight.dtype)
  window = Window(cut(whole.key), cut(whole.value), cut(whole.weight), band)

  count = jnp.sum(tokens.valid, axis=(1, 2, 3)) if write else 0
  last = (offset + count)[:, None] + jnp.arange(past)
  take = lambda x: rows.take(x, last, 2)
  after = jax.tree.map(take, whole) if past else tail
  ours = rows.take(document, last, 1) == document[:, -1:] if past else None
  if past:
    after = after._replace(valid=after.valid & ours[:, None, :, None])
  return window, after
