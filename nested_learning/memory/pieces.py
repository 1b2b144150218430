"""Tokens of a call, laid out in pieces of one size: chunks, or segments.

Pieces are counted from the stream's start. A call that starts in the middle of
one has empty slots in its first and its last piece, in each row other ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import rows


class Pieces(NamedTuple):
  """Tokens in n pieces of c slots.

  Attributes:
    tokens: A pytree of [n, b, h, c, ...].
    reset: bool [n, b, c], True at a document's first token, or None.
    mask: bool [n, b, c], False for empty slots; None where all are filled.
  """

  tokens: Any
  reset: jax.Array | None
  mask: jax.Array | None


def lay_out(
  size: int,
  offset: jax.Array,
  tokens: Any,
  *,
  is_aligned: bool,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
) -> tuple[Pieces, Callable[[jax.Array], jax.Array]]:
  """Lays out the tokens of a call.

  Args:
    size: Slots of a piece, c.
    offset: int32 [b], tokens of its piece that a row has read.
    tokens: A pytree of [b, h, t, ...].
    is_aligned: Whether every row starts a piece and there is no mask, which
      spares moving tokens: the last piece alone may be partly empty.
    reset: bool [b, t], or None.
    mask: bool [b, t], False for tokens that are not there, or None.

  Returns:
    The `Pieces`, and a function from [n, b, h, c, ...] to [b, h, t, ...], what
    each token has in its slot.
  """
  num_tokens = jax.tree.leaves(tokens)[0].shape[2]
  if not is_aligned:
    num_slots = -(-(num_tokens + size - 1) // size) * size
    reset, mask = rows.default_marks(reset, mask, offset.shape[0], num_tokens)
    order, slot, present = rows.to_slots(offset, mask, num_slots)
    tokens = jax.tree.map(lambda x: rows.take(x, order, 2), tokens)
    reset = rows.take(reset & mask, order, 1) & present
    pieces = cut(size, tokens, reset, present)
    return pieces, lambda x: rows.take(join(x), slot, 2)
  padding = -num_tokens % size
  if padding:
    tokens = jax.tree.map(lambda x: rows.pad_tokens(x, padding, 2), tokens)
    reset = None if reset is None else rows.pad_tokens(reset, padding, 1)
    mask = jnp.arange(num_tokens + padding) < num_tokens
    mask = jnp.broadcast_to(mask, (offset.shape[0], num_tokens + padding))
  pieces = cut(size, tokens, reset, mask)
  return pieces, lambda x: join(x)[:, :, :num_tokens]


def cut(
  size: int, tokens: Any, reset: jax.Array | None, mask: jax.Array | None
) -> Pieces:
  """Cuts whole pieces: tokens of [b, h, n c, ...], marks of [b, n c]."""

  def cut_axis(x, axis):
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  cut_marks = lambda x: None if x is None else cut_axis(x, 1)
  tokens = jax.tree.map(lambda x: cut_axis(x, 2), tokens)
  return Pieces(tokens, cut_marks(reset), cut_marks(mask))


def join(x: jax.Array) -> jax.Array:
  """[n, b, h, c, ...] to [b, h, n c, ...]."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])
