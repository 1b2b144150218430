"""Blocks in stacks: those that learn inside a sequence apart from the rest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.layers import base
from nested_learning.layers import cms


class Stacks(NamedTuple):
  """The blocks in stacks that are read one after the other.

  The lowest block that learns is apart, so that no gradient of its levels goes
  through its mixer, and none through a block below.

  Attributes:
    below: Blocks that do not learn; None if there are none.
    first: The lowest one that learns, a stack of one.
    rest: Those above it; None if there are none.
  """

  below: Any
  first: Any
  rest: Any


def split_blocks(params: Any, num_last: int) -> Any:
  """A model's parameters with its blocks in `Stacks`.

  Args:
    params: Of a model; if its blocks are in stacks, they stay as they are.
    num_last: Blocks that learn, or groups of them where the mixer is a pattern.

  Returns:
    Parameters that `forward` takes as well.
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
  """The labels of `level_labels` for what `split_blocks` makes.

  Args:
    labels: Of the parameters as they are kept.
    num_blocks: Blocks, or groups of them, of the model.
    num_last: As for `split_blocks`.

  Returns:
    A tree of names; nothing below the blocks that learn is of a level.
  """
  blocks = labels['blocks']
  stacks = Stacks(
    jax.tree.map(lambda _: 'base', blocks) if num_last < num_blocks else None,
    blocks,
    blocks if num_last > 1 else None,
  )
  return {**labels, 'blocks': stacks}


def init_state(group: base.Layer, blocks: Any, batch_size: int) -> Any:
  """The states of all blocks, stacked, however the blocks are.

  Args:
    group: What is stacked.
    blocks: A stack of its parameters, or `Stacks`.
    batch_size: Rows.

  Returns:
    The states, lowest first.
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
  """Reads x through all blocks.

  Args:
    group: What is stacked.
    blocks: A stack of its parameters, or `Stacks`.
    state: Of `init_state`, or None for a stream's start.
    x: [b, t, e].
    info: A local loss in them is for the blocks of `Stacks` that learn.

  Returns:
    [b, t, e], and the states; with a local loss, `cms.StateAndGradients`.
  """
  if not isinstance(blocks, Stacks):
    body = lambda x, both: group.apply(*both, x, info)
    return jax.lax.scan(body, x, (blocks, state))
  states, gradients, start = [], Stacks(None, None, None), 0
  for name, stack in blocks._asdict().items():
    if stack is None:
      continue
    end = start + _num_layers(stack)
    part = jax.tree.map(lambda s, a=start, b=end: s[a:b], state)
    start = end
    learns = info.local_loss is not None and name != 'below'
    own = info if learns else info._replace(local_loss=None)
    body = lambda x, both, own=own: group.apply(*both, x, own)
    if name == 'first':
      x, out = body(x, jax.tree.map(lambda a: a[0], (stack, part)))
      out = jax.tree.map(lambda a: a[None], out)
    else:
      x, out = jax.lax.scan(body, x, (stack, part))
    if learns:
      gradients = gradients._replace(**{name: out.gradients})
      out = out.state
    states.append(out)
  state = _join(states)
  if info.local_loss is not None:
    state = cms.StateAndGradients(state, gradients)
  return x, state


def _join(states):
  """Stacked states of blocks as one."""
  if len(states) == 1:
    return states[0]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *states)


def _num_layers(stack):
  return jax.tree.leaves(stack)[0].shape[0]
