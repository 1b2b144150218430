r"""Memories that grow: at first few of their units are read and written.

With the units of a network in E blocks, G_k the memory with its first k blocks
alone, and t the token's place in its document, counted from 1,

.. math::
   M_t = M_{t-1} - write(G_{k(t)}(M_{t-1})), \qquad
   y_t = G_{k(t)}(M_t)(q_t), \qquad
   k(t) = \min(E, 1 + \lfloor (t - 1) / \lfloor N / E \rfloor \rfloor)

so that what was said first lies where nothing is written at first but little,
and later tokens find empty blocks. This is Proteus' capacity schedule.

Settled here: a block is some of an MLP's hidden units (rows of its first map,
columns of its second), or some of a matrix' inputs; blocks that are not written
yet are not let go of either, so that they stand at their initial values; k is
that of the first token of t's chunk, as all else that a chunk's tokens share; a
document starts with one block.

References:
  Bayat et al., Proteus, arXiv:2608.16844, 2026 (its rule; that blocks change
  between chunks, and what a block is, are this package's).
"""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning.memory import networks


def active_units(
  position: jax.Array, *, num_units: int, num_blocks: int, num_tokens: int
) -> jax.Array:
  """How many units a memory has at a place of a document.

  Args:
    position: int, tokens of the document before that place.
    num_units: Of the whole network.
    num_blocks: E, blocks that become active one after the other.
    num_tokens: N, of a document for which the last block becomes active.

  Returns:
    An int array like position.
  """
  blocks = jnp.minimum(num_blocks, 1 + position // (num_tokens // num_blocks))
  return -(-blocks * num_units // num_blocks)


def chunk_positions(
  position: jax.Array,
  offset: jax.Array,
  chunk_size: int,
  *,
  num_tokens: int,
  reset: jax.Array | None,
  mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """How much of its document had been read where each token's chunk began.

  Args:
    position: int [b], tokens that earlier calls read of the document.
    offset: int [b], tokens that they read of the chunk.
    chunk_size: Tokens of a chunk.
    num_tokens: Of this call, t.
    reset: bool [b, t], True at a document's first token, or None.
    mask: bool [b, t], False for tokens that are not there, or None.

  Returns:
    int [b, t], zero in a chunk where the document began; and int [b], tokens of
    the document after this call.
  """
  here = jnp.ones((position.shape[0], num_tokens), jnp.int32)
  if mask is not None:
    here = mask.astype(jnp.int32)
  count = jnp.cumsum(here, axis=1)
  rank = count - here
  started = -position[:, None]  # the rank of the document's first token
  if reset is not None:
    first = jnp.where(reset & (here > 0), rank, started)
    started = jax.lax.cummax(first, axis=1)
  started = jnp.broadcast_to(started, here.shape)
  in_chunk = (offset[:, None] + rank) % chunk_size
  begin = jnp.maximum(rank - started - in_chunk, 0)
  return begin, (count - started)[:, -1]


def gate(
  network: networks.Network, linear: networks.Linear, active: jax.Array | None
) -> networks.Linear:
  """A `linear` of active units alone.

  Args:
    network: Whose maps they are.
    linear: Of all units.
    active: int [b, 1, t, 1], how many are active, or None for all.

  Returns:
    A `linear` whose other units give nothing.
  """
  if active is None:
    return linear

  def gated(name, x):
    units = network.units[name]
    on = lambda y: y * _is_active(units, active, y.ndim)
    return linear(name, on(x)) if units.side == 'in' else on(linear(name, x))

  return gated


def gate_input(
  network: networks.Network, x: jax.Array, active: jax.Array | None
) -> jax.Array:
  """What of a network's input [..., b, h, t, d] its first map reads."""
  units = network.units.get('in')
  if active is None or units.side == 'out':
    return x
  return x * (jnp.asarray(units.index) < active)


def keep_inactive(
  network: networks.Network,
  active: jax.Array | None,
  memory: Any,
  initial: Any,
) -> Any:
  """The memory with units that are not active as they were initially.

  Args:
    network: Whose maps they are.
    active: int [b], or None for all.
    memory: Weights per map, [b, h, ..., out, in].
    initial: The same, or without b.

  Returns:
    A memory.
  """
  if active is None:
    return memory
  kept = {}
  for name, weights in memory.items():
    units = network.units[name]
    number = active.reshape(-1, *[1] * (weights.ndim - 1))
    is_active = _is_active(units, number, weights.ndim)
    if units.side == 'out':
      is_active = jnp.swapaxes(is_active, -1, -2)
    kept[name] = jnp.where(is_active, weights, initial[name])
  return kept


def last_active(
  network: networks.Network, active: jax.Array | None, mask: jax.Array | None
) -> jax.Array | None:
  """How many units are active at the last token that is there.

  Args:
    network: Whose units they are.
    active: int [b, 1, t, 1], or None for all.
    mask: bool [b] or [b, t], False for tokens that are not there, or None.

  Returns:
    int [b], all units where no token is there; or None.
  """
  if active is None:
    return None
  active = active[:, 0, :, 0]
  if mask is None:
    return active[:, -1]
  mask = mask.reshape(active.shape)
  place = jnp.arange(1, active.shape[1] + 1)
  last = jnp.max(jnp.where(mask, place, 0), axis=1)
  found = jnp.take_along_axis(active, jnp.maximum(last - 1, 0)[:, None], 1)
  return jnp.where(last > 0, found[:, 0], network.num_units)


def _is_active(units, active, ndim):
  """bool [b, 1, ..., t or 1, units], with role axes where ndim has them."""
  while active.ndim < ndim:
    active = active[:, :, None]
  return jnp.asarray(units.index) < active
