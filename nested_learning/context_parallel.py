"""Shares the tokens of a row among the devices of the mesh axis 'context'.

Device i of n holds the i-th part of a row, t / n tokens. Operations on single
tokens need no communication. A convolution or a window needs the tokens before
its part (`halo`), full attention the keys of every device
(`layers/ring_attention.py`), and a memory its state at the end of the previous
part (`hand_over`).

The functions run under `jax.set_mesh`. They shard 'context' by hand, and leave
the sharding of rows and heads to the compiler.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import sharding as jsharding
import jax.numpy as jnp

from nested_learning import sharding

AXIS = 'context'


def num_parts(num_tokens: int, *, multiple: int = 1) -> int:
  """Returns the number of parts into which the mesh divides the tokens.

  Args:
    num_tokens: Tokens of a row, t.
    multiple: Number of tokens that a part must be a multiple of.

  Returns:
    The size of 'context', or 1 (every device has all tokens) if the mesh has no
    such axis or the axis does not divide the tokens.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or AXIS in mesh.manual_axes:
    return 1
  size = mesh.shape.get(AXIS, 1)
  return 1 if num_tokens % (size * multiple) else size


def over_parts(function: Callable[..., Any], in_axes: Any, out_axes: Any):
  """Maps a function over the parts of the devices along 'context'.

  Args:
    function: Function of one device's parts.
    in_axes: For each argument, the axis of its arrays that is divided, or None.
    out_axes: The same for each result.

  Returns:
    A function of whole arrays. Gradients reach arguments only, not arrays that
    `function` closes over.
  """
  as_spec = lambda axis: jsharding.PartitionSpec(
    *([] if axis is None else [None] * axis + [AXIS])
  )
  is_none = lambda x: x is None
  return jax.shard_map(
    function,
    in_specs=jax.tree.map(as_spec, in_axes, is_leaf=is_none),
    out_specs=jax.tree.map(as_spec, out_axes, is_leaf=is_none),
    axis_names={AXIS},
    check_vma=False,
  )


def index() -> jax.Array:
  """Returns the index of this device's part, inside `over_parts`."""
  return jax.lax.axis_index(AXIS)


def shift(x: Any, by: int, *, wrap: bool = False) -> Any:
  """Receives a pytree from the device `by` parts before, inside `over_parts`.

  Args:
    x: Pytree of this device.
    by: Distance in parts; negative for devices after this one.
    wrap: Whether the first device follows the last. Otherwise the first `by`
      devices receive zeros.

  Returns:
    The other device's pytree.
  """
  size = jax.lax.axis_size(AXIS)
  pairs = [(i, (i + by) % size) for i in range(size)]
  if not wrap:
    pairs = [(i, i + by) for i in range(size) if 0 <= i + by < size]
  return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, pairs), x)


def halo(x: Any, num_tokens: int) -> Any:
  """Returns the tokens before this device's part, inside `over_parts`.

  Args:
    x: Pytree of this device's tokens, [b, t, ...].
    num_tokens: Number of tokens to receive, w.

  Returns:
    A pytree of [b, w, ...], zeros before a row's start.
  """
  size = jax.tree.leaves(x)[0].shape[1]
  num_whole, rest = divmod(num_tokens, size)
  num_before = min(num_whole + bool(rest), jax.lax.axis_size(AXIS) - 1)
  pieces = []
  for by in range(num_before, 0, -1):  # oldest first
    first = max(by * size - num_tokens, 0)
    pieces.append(shift(jax.tree.map(lambda a, i=first: a[:, i:], x), by))
  missing = num_tokens - sum(jax.tree.leaves(p)[0].shape[1] for p in pieces)

  def join(like, *parts):
    shape = like.shape[0], missing, *like.shape[2:]
    return jnp.concatenate([jnp.zeros(shape, like.dtype), *parts], axis=1)

  return jax.tree.map(join, x, *pieces)


def hand_over(
  scan: Callable[[Any, Any, Any], tuple[Any, Any]],
  params: Any,
  start: Any,
  tokens: Any,
  *,
  in_axes: Any,
  out_axes: Any,
) -> tuple[Any, Any]:
  """Scans the parts of a row one after the other, each on its own device.

  Device i starts from the final state of device i - 1, so that the result is
  exact. The rows of a device form a pipeline: device i reads one row while
  device i + 1 reads the row before it, in r + n - 1 turns for r rows instead of
  r n. The backward pass scans every part again, and a device saves only the
  states at the starts of its own parts.

  Args:
    scan: `scan(params, state, tokens) -> (result, state)`, for any number of
      rows [b, ...].
    params: Arguments that all rows share.
    start: Pytree of [b, ...], the state before the first token.
    tokens: Pytree of [b, ..., t, ...].
    in_axes: The axis t of each array of the tokens, a prefix of their tree.
    out_axes: The same for the result.

  Returns:
    The result, and the state after the last token.
  """
  num_rows = jax.tree.leaves(start)[0].shape[0]
  num_groups = _num_groups(num_rows)

  def part(params, start, tokens):
    size, here = jax.lax.axis_size(AXIS), index()
    start, tokens = jax.tree.map(
      functools.partial(_split, num_groups), (start, tokens)
    )
    first = jax.tree.map(lambda x: x[0], (start, tokens))
    like = jax.eval_shape(scan, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def turn(received, number):
      group = number - here
      own = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(
          x, jnp.clip(group, 0, num_groups - 1), keepdims=False
        ),
        (start, tokens),
      )
      state = jax.tree.map(
        lambda a, b: jnp.where(here == 0, a, b), own[0], received
      )
      result, state = jax.lax.cond(
        (group >= 0) & (group < num_groups),
        lambda: scan(params, state, own[1]),
        lambda: zeros,
      )
      return shift(state, 1), (result, state)

    turn = jax.checkpoint(turn, prevent_cse=False)
    turns = jnp.arange(num_groups + size - 1)
    _, found = jax.lax.scan(turn, zeros[1], turns)
    result, state = jax.tree.map(
      lambda x: _join(jax.lax.dynamic_slice_in_dim(x, here, num_groups)), found
    )
    return result, jax.tree.map(lambda x: x[None], state)

  run = over_parts(part, (None, None, in_axes), (out_axes, 0))
  result, states = run(params, start, tokens)
  return result, jax.tree.map(lambda x: x[-1], states)


def _num_groups(num_rows: int) -> int:
  """Returns the number of rows per device, the stages of the pipeline."""
  mesh = jax.sharding.get_abstract_mesh()
  sizes = [mesh.shape.get(axis, 1) for axis in sharding.ROWS]
  rows, rest = divmod(num_rows, math.prod(sizes))
  return 1 if rest else rows


def _split(num_groups: int, x: jax.Array) -> jax.Array:
  """Splits rows [b, ...] into groups [g, b / g, ...], each on its device."""
  return jnp.swapaxes(x.reshape(-1, num_groups, *x.shape[1:]), 0, 1)


def _join(x: jax.Array) -> jax.Array:
  """Joins groups [g, b / g, ...] to rows [b, ...]."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
