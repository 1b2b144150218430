"""The tokens of a call in chunks, and selection of rows and tokens.

Chunks are counted from the stream's start. A call that starts inside a chunk
has empty slots in its first and its last chunk, different ones in each row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import sharding


class Chunks(NamedTuple):
  """Tokens in n chunks of c slots; a scan passes one chunk, without n.

  Attributes:
    inputs: A pytree of [n, b, h, c, ...].
    reset: bool [n, b, c], True at a document's first token, or None.
    mask: bool [n, b, c], False for empty slots; None where all are filled.
    has_border: bool [n], whether any row has a reset; None without resets.
    known: A pytree [n, ...] computed before the scan, or None.
  """

  inputs: Any
  reset: jax.Array | None
  mask: jax.Array | None
  has_border: jax.Array | None = None
  known: Any = None

  def columns(self) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns `reset` and `mask` beside rates, each [(n,) b, 1, c, 1]."""
    column = lambda x: None if x is None else x[..., None, :, None]
    return column(self.reset), column(self.mask)


def lay_out(
  chunk_size: int,
  offset: jax.Array,
  inputs: Any,
  *,
  is_aligned: bool,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
) -> tuple[Chunks, Callable[[jax.Array], jax.Array]]:
  """Lays out the tokens of a call in chunks.

  Args:
    chunk_size: Slots of a chunk, c.
    offset: int32 [b], tokens of its chunk that a row has read.
    inputs: A pytree of [b, h, t, ...].
    is_aligned: Whether every row starts a chunk and there is no mask. Tokens
      then keep their order, and only the last chunk may have empty slots.
    reset: bool [b, t], or None.
    mask: bool [b, t], False for tokens that are not there, or None.

  Returns:
    The `Chunks`, and a function from values in slots, [n, b, h, c, ...], to
    values of tokens, [b, h, t, ...].
  """
  num_tokens = jax.tree.leaves(inputs)[0].shape[2]
  if not is_aligned:
    # Enough slots for the largest offset, in whole chunks.
    num_slots = -(-(num_tokens + chunk_size - 1) // chunk_size) * chunk_size
    reset, mask = default_info(reset, mask, offset.shape[0], num_tokens)
    order, slot, present = to_slots(offset, mask, num_slots)
    inputs = jax.tree.map(lambda x: take(x, order, 2), inputs)
    reset = take(reset & mask, order, 1) & present
    chunks = _cut(chunk_size, inputs, reset, present)
    return chunks, lambda x: take(join(x), slot, 2)
  padding = -num_tokens % chunk_size
  if padding:
    inputs = jax.tree.map(lambda x: _pad_tokens(x, padding, 2), inputs)
    reset = None if reset is None else _pad_tokens(reset, padding, 1)
    mask = jnp.arange(num_tokens + padding) < num_tokens
    mask = jnp.broadcast_to(mask, (offset.shape[0], num_tokens + padding))
  chunks = _cut(chunk_size, inputs, reset, mask)
  return chunks, lambda x: join(x)[:, :, :num_tokens]


def join(x: jax.Array) -> jax.Array:
  """Joins chunks: [n, b, h, c, ...] to [b, h, n c, ...]."""
  x = jnp.moveaxis(x, 0, 2)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def present_first(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Orders tokens so that the ones that are there come first.

  Args:
    mask: bool [b, t], False for padding.

  Returns:
    The token of each place, int [b, t], and the place of each token, its
    inverse: `take(take(x, order, 1), place, 1)` is x.
  """
  if mask.shape[1] == 1:  # a token of each row has one place
    return (jnp.zeros(mask.shape, int),) * 2
  order = jnp.argsort(~mask, axis=1, stable=True)
  return order, jnp.argsort(order, axis=1)


def to_slots(
  offset: jax.Array, mask: jax.Array, num_slots: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Assigns the tokens that are there to slots aligned with their chunks.

  Args:
    offset: int [b], slots of the first chunk that earlier calls filled.
    mask: bool [b, t].
    num_slots: Number of slots s.

  Returns:
    The token of each slot [b, s], the slot of each token [b, t], and which
    slots hold a token, bool [b, s].
  """
  num_tokens = mask.shape[1]
  rank = jnp.arange(num_slots)[None] - offset[:, None]  # [b, s]
  present = (rank >= 0) & (rank < jnp.sum(mask, axis=1)[:, None])
  by_rank, _ = present_first(mask)
  # Clips keep the indices of empty slots and absent tokens inside the arrays;
  # `present` and the mask hide what is read there.
  order = jnp.take_along_axis(by_rank, jnp.clip(rank, 0, num_tokens - 1), 1)
  slot = offset[:, None] + jnp.cumsum(mask, axis=1) - 1
  return order, jnp.clip(slot, 0, num_slots - 1), present


def default_info(
  reset: jax.Array | None,
  mask: jax.Array | None,
  batch_size: int,
  num_tokens: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns reset and mask as arrays [b, t]: no border, every token there."""
  shape = (batch_size, num_tokens)
  reset = jnp.zeros(shape, bool) if reset is None else reset.astype(bool)
  mask = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
  return reset, mask


def where(condition: jax.Array, yes: Any, no: Any) -> Any:
  """Selects rows of two pytrees [b, ...] by a condition [b]."""

  def leaf(a, b):
    return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

  return jax.tree.map(leaf, yes, no)


def where_any(condition: jax.Array, yes: Callable[[], Any], no: Any) -> Any:
  """Selects rows of `yes()` by a condition [b]; computes them only if any."""
  # Branches lose the shardings of their results, so pin them on both sides.
  pin = sharding.pin_heads
  select = lambda: pin(where(condition, yes(), no))
  return pin(jax.lax.cond(jnp.any(condition), select, lambda: pin(no)))


def where_tokens(condition: jax.Array, yes: Any, no: Any) -> Any:
  """Selects tokens of two pytrees [b, h, (r,) t, d] by a [b, 1, t, 1]."""

  def leaf(a, b):
    return jnp.where(condition if b.ndim == 4 else condition[:, :, None], a, b)

  return jax.tree.map(leaf, yes, no)


def take(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
  """Gathers x[b, ..., index[b, :], ...] along the token axis."""
  shape = [1] * x.ndim
  shape[0], shape[axis] = index.shape
  return jnp.take_along_axis(x, index.reshape(shape), axis)


def without_leading(tree: Any, num_axes: int) -> Any:
  """Returns the shapes of a tree's arrays without their first axes."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[num_axes:], x.dtype), tree
  )


def _cut(
  chunk_size: int,
  inputs: Any,
  reset: jax.Array | None,
  mask: jax.Array | None,
) -> Chunks:
  """Cuts inputs [b, h, n c, ...], reset and mask [b, n c] into chunks."""

  def cut_axis(x, axis):
    shape = (*x.shape[:axis], -1, chunk_size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  inputs = jax.tree.map(lambda x: cut_axis(x, 2), inputs)
  reset = None if reset is None else cut_axis(reset, 1)  # [n, b, c]
  mask = None if mask is None else cut_axis(mask, 1)
  has_border = None if reset is None else jnp.any(reset, axis=(1, 2))
  return Chunks(inputs, reset, mask, has_border)


def _pad_tokens(x: jax.Array, padding: int, axis: int) -> jax.Array:
  """Appends `padding` zeros along the token axis."""
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, padding)
  return jnp.pad(x, pads)
