"""A row's tokens over the devices of the mesh axis 'context'.

Device i of n has the i-th part of a row, t / n tokens. What looks at one token
at a time needs nothing for that. What mixes tokens needs what came before its
part: a convolution and a window the tokens before (`halo`), attention to all
the keys of every device (`ring_attention.py`), and a memory the state at the
end of the part before (`hand_over`).

Functions here run under `jax.set_mesh`. Inside of them 'context' alone is in
the hands of the function; rows and heads stay with the compiler.
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
  """Into how many parts the mesh divides a call's tokens.

  Args:
    num_tokens: Of a row, t.
    multiple: Of how many tokens a part has to be a multiple.

  Returns:
    The size of 'context'; 1, which is for all tokens on every device, where no
    mesh has that axis, or it does not divide the tokens.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or AXIS in mesh.manual_axes:
    return 1
  size = mesh.shape.get(AXIS, 1)
  return 1 if num_tokens % (size * multiple) else size


def over_parts(function: Callable[..., Any], in_axes: Any, out_axes: Any):
  """Makes `function` one of the parts that the devices along 'context' have.

  Args:
    function: Of arrays, each of a device's own part.
    in_axes: Per argument the axis of its arrays that is divided, or None.
    out_axes: Of its results likewise.

  Returns:
    A function of whole arrays. What `function` needs a gradient of has to be
    an argument: it closes over nothing that has one.
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
  """Which part this device has, inside `over_parts`."""
  return jax.lax.axis_index(AXIS)


def shift(x: Any, by: int, *, wrap: bool = False) -> Any:
  """A pytree of the device `by` parts before, inside `over_parts`.

  Args:
    x: Of this device.
    by: How many parts before; below zero, after.
    wrap: Whether the first device follows the last. Otherwise devices without
      one before them get zeros.

  Returns:
    The same of that device.
  """
  size = jax.lax.axis_size(AXIS)
  pairs = [(i, (i + by) % size) for i in range(size)]
  if not wrap:
    pairs = [(i, i + by) for i in range(size) if 0 <= i + by < size]
  return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, pairs), x)


def halo(x: Any, num_tokens: int) -> Any:
  """The tokens before this device's part, inside `over_parts`.

  Args:
    x: A pytree of this device's [b, t, ...].
    num_tokens: How many to take, w.

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
  """Scans a row's parts one after the other, each on the device that has it.

  Device i waits for the state that device i - 1 ends with, so that this is
  exact. Rows of a device are handed over one by one: with r of them, device i
  works on one while device i + 1 works on the one before, r + n - 1 turns in
  all instead of r n. In the backward pass a part is scanned again, so that what
  a device keeps is the states at its own parts' starts.

  Args:
    scan: `scan(params, state, tokens) -> (result, state)`, of any number of
      rows [b, ...].
    params: What all rows share.
    start: Pytree of [b, ...], the state before the first token.
    tokens: Pytree of [b, ..., t, ...].
    in_axes: For each array of the tokens, which axis is t (a prefix of them).
    out_axes: Of the result likewise.

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
  """Rows of one device, which it works on one after the other."""
  mesh = jax.sharding.get_abstract_mesh()
  sizes = [mesh.shape.get(axis, 1) for axis in sharding.ROWS]
  rows, rest = divmod(num_rows, math.prod(sizes))
  return 1 if rest else rows


def _split(num_groups: int, x: jax.Array) -> jax.Array:
  """Rows [b, ...] as groups [g, b / g, ...]; no row changes its device."""
  return jnp.swapaxes(x.reshape(-1, num_groups, *x.shape[1:]), 0, 1)


def _join(x: jax.Array) -> jax.Array:
  """Groups [g, b / g, ...] as rows [b, ...]."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
