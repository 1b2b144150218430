"""Stacks of equal blocks; blocks that learn inside a sequence are apart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.layers import base
from nested_learning.layers import local_losses


class Stacks(NamedTuple):
  """Blocks in three stacks, lowest first.

  The lowest block that learns is apart, so that the gradient of its levels
  passes neither through its mixer nor through a block below.

  Attributes:
    below: Blocks that do not learn; None if all learn.
    first: The lowest block that learns, a stack of one.
    rest: The blocks above it, which learn; None if there are none.
  """

  below: Any
  first: Any
  rest: Any


def split_blocks(params: Any, num_last: int) -> Any:
  """Splits the blocks of a model's parameters into `Stacks`.

  Args:
    params: Parameters of a model; blocks in `Stacks` are returned as they are.
    num_last: Number of blocks that learn, or of groups if the mixer is a
      pattern.

  Returns:
    Parameters that the model takes as well.
  """
  blocks = params['blocks']
  if isinstance(blocks, Stacks):
    return params
  num_blocks = _num_layers(blocks)
  first = num_blocks - num_last

  def cut(start, end):
    if start == end:
      return None
    return jax.tree.map(lambda x: x[start:end], blocks)

  stacks = Stacks(
    cut(0, first), cut(first, first + 1), cut(first + 1, num_blocks)
  )
  return {**params, 'blocks': stacks}


def split_labels(labels: Any, num_blocks: int, num_last: int) -> Any:
  """Splits `level_labels` like `split_blocks` splits parameters.

  Args:
    labels: Labels of the parameters.
    num_blocks: Number of blocks, or of groups, of the model.
    num_last: See `split_blocks`.

  Returns:
    A tree of names; parameters of blocks that do not learn are 'base'.
  """
  blocks = labels['blocks']
  stacks = Stacks(
    jax.tree.map(lambda _: 'base', blocks) if num_last < num_blocks else None,
    blocks,
    blocks if num_last > 1 else None,
  )
  return {**labels, 'blocks': stacks}


def split_layers(params: Any, state: Any) -> tuple[Any, Any]:
  """Takes stacks of blocks apart, for loops that read token by token.

  A block in a stack is copied out of it whenever it is read, and its state is
  copied back.

  Args:
    params: Parameters of a model.
    state: States of all blocks, stacked.

  Returns:
    Parameters and states with a tuple in place of each stack; the model takes
    them as well.
  """
  blocks = params['blocks']
  layers = range(_num_layers(blocks))
  part = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  blocks = tuple(part(blocks, i) for i in layers)
  return {**params, 'blocks': blocks}, tuple(part(state, i) for i in layers)


def join_layers(state: Any) -> Any:
  """Stacks the states of blocks that `split_layers` took apart."""
  return jax.tree.map(lambda *x: jnp.stack(x), *state)


def init_state(group: base.Layer, blocks: Any, batch_size: int) -> Any:
  """Returns the stacked states of all blocks at the start of streams.

  Args:
    group: The layer that is stacked.
    blocks: Stacked parameters, or `Stacks` of them.
    batch_size: Number of rows.

  Returns:
    The states, lowest block first.
  """
  init = jax.vmap(lambda params: group.init_state(params, batch_size))
  stacks = blocks if isinstance(blocks, Stacks) else [blocks]
  return _join([init(stack) for stack in stacks if stack is not None])


def apply(
  group: base.Layer,
  blocks: Any,
  state: Any,
  x: jax.Array,
  info: base.TokenInfo,
) -> tuple[jax.Array, Any]:
  """Passes x through all blocks.

  Args:
    group: The layer that is stacked.
    blocks: Stacked parameters, `Stacks` of them, or a tuple of blocks.
    state: States of all blocks, or of the part that `info` names; None at a
      stream's start; a tuple if the blocks are one.
    x: [b, t, e].
    info: Facts about the tokens; a local loss in it is for blocks that learn.

  Returns:
    [b, t, e] and the states, with a local loss in
    `local_losses.StateAndGradients`.
  """
  if isinstance(blocks, tuple) and not isinstance(blocks, Stacks):
    states = []
    for block, before in zip(blocks, state, strict=True):
      x, after = group.apply(block, before, x, info)
      states.append(after)
    return x, tuple(states)
  if not isinstance(blocks, Stacks):
    body = lambda x, both: group.apply(*both, x, info)
    return _scan(body, x, (blocks, state))
  states, gradients, start = [], {}, 0
  for name, stack in blocks._asdict().items():
    part = base.Part.BELOW if name == 'below' else base.Part.ABOVE
    if stack is None or info.part not in (None, part):
      continue
    end = start + _num_layers(stack)
    own_state = jax.tree.map(lambda s, a=start, b=end: s[a:b], state)
    start = end
    learns = info.local_loss is not None and name != 'below'
    own = info if learns else info._replace(local_loss=None)
    body = lambda x, both, own=own: group.apply(*both, x, own)
    x, out = _scan(body, x, (stack, own_state))
    if learns:
      gradients[name] = out.gradients
      out = out.state
    states.append(out)
  state = _join(states)
  if info.local_loss is not None:
    parts = (
      Stacks(None, gradients['first'][i], gradients.get('rest', ((), None))[i])
      for i in range(2)
    )
    state = local_losses.StateAndGradients(
      state, local_losses.Gradients(*parts)
    )
  return x, state


def _scan(body, x, both):
  """Scans a stack of parameters and states.

  A stack of one has no scan: the backward pass of a scan begins at its start,
  that of one block at the first parameter that has a gradient.
  """
  if _num_layers(both[0]) > 1:
    return jax.lax.scan(body, x, both)
  x, out = body(x, jax.tree.map(lambda a: jnp.squeeze(a, 0), both))
  return x, jax.tree.map(lambda a: a[None], out)


def _join(states):
  """Joins stacked states of blocks along the stack."""
  if len(states) == 1:
    return states[0]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *states)


def _num_layers(stack):
  return jax.tree.leaves(stack)[0].shape[0]
