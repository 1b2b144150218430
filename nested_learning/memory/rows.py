"""Rows and tokens of a batch: selecting them, and laying them into slots."""

from typing import Any

import jax
import jax.numpy as jnp


def where(condition: jax.Array, yes: Any, no: Any) -> Any:
  """Selects rows of two pytrees [b, ...] by a condition [b]."""

  def leaf(a, b):
    return jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)

  return jax.tree.map(leaf, yes, no)


def where_tokens(condition: jax.Array, yes: Any, no: Any) -> Any:
  """Selects tokens of two pytrees [b, h, (r,) t, d] by a [b, 1, t, 1]."""

  def leaf(a, b):
    return jnp.where(condition if b.ndim == 4 else condition[:, :, None], a, b)

  return jax.tree.map(leaf, yes, no)


def broadcast(initial: Any, like: Any) -> Any:
  """One row's pytree [...] as the rows [b, ...] of another."""
  return jax.tree.map(
    lambda w, row: jnp.broadcast_to(w, row.shape), initial, like
  )


def default_marks(
  reset: jax.Array | None,
  mask: jax.Array | None,
  batch_size: int,
  num_tokens: int,
) -> tuple[jax.Array, jax.Array]:
  """The marks with None made explicit: no border, every token there."""
  shape = (batch_size, num_tokens)
  reset = jnp.zeros(shape, bool) if reset is None else reset.astype(bool)
  mask = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
  return reset, mask


def to_slots(
  offset: jax.Array, mask: jax.Array, num_slots: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Lays the tokens that are there into slots aligned with their chunks.

  Args:
    offset: int [b], slots of the first chunk that earlier calls filled.
    mask: bool [b, t].
    num_slots: Number of slots s.

  Returns:
    The token of each slot [b, s], the slot of each token [b, t], and which
    slots hold a token, bool [b, s].
  """
  num_tokens = mask.shape[1]
  rank = jnp.arange(num_slots)[None] - offset[:, None]
  present = (rank >= 0) & (rank < jnp.sum(mask, axis=1)[:, None])
  by_rank = jnp.argsort(~mask, axis=1, stable=True)
  order = jnp.take_along_axis(by_rank, jnp.clip(rank, 0, num_tokens - 1), 1)
  slot = offset[:, None] + jnp.cumsum(mask, axis=1) - 1
  return order, jnp.clip(slot, 0, num_slots - 1), present


def take(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
  """x[b, ..., index[b, :], ...] along the token axis."""
  shape = [1] * x.ndim
  shape[0], shape[axis] = index.shape
  return jnp.take_along_axis(x, index.reshape(shape), axis)


def pad_tokens(x: jax.Array, padding: int, axis: int) -> jax.Array:
  """Appends `padding` zeros along the token axis."""
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, padding)
  return jnp.pad(x, pads)
