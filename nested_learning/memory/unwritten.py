"""A chunk whose tokens read and write nothing: no rule is solved."""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning.memory import interface
from nested_learning.memory import networks
from nested_learning.memory import rows
from nested_learning.memory import rule as rules


def solve(
  rule: interface.Rule,
  initial: Any,
  state: interface.State,
  reset: jax.Array | None,
  has_border: jax.Array | None,
) -> tuple[networks.Linear, dict[str, rules.Carry]]:
  """What each token's maps give, and the maps after the last token.

  Args:
    rule: How the memory is read.
    initial: Initial memory per map, [b, h, ..., out, in].
    state: Before the chunk.
    reset: bool [b, c], True at a document's first token, or None.
    has_border: bool, whether any row has a reset, or None.

  Returns:
    The `linear` of the tokens, and a `Carry` per map.
  """
  memory, trace = state.memory, state.trace
  weights = rule.weights(memory)
  if reset is None:
    return networks.linear_of(weights), _carries(memory, trace)
  fresh = (jnp.cumsum(reset, axis=1) > 0)[:, None, :, None]
  first = rule.weights(initial)

  def linear(name, x):
    read = networks.apply_map(weights[name], x)

    def read_again():
      initially = networks.apply_map(first[name], x)
      return rows.where_tokens(fresh, initially, read)

    return jax.lax.cond(has_border, read_again, lambda: read)

  ended = jnp.any(reset, axis=1)
  memory = rows.where(ended, initial, memory)
  if trace is not None:
    trace = rows.where(ended, jax.tree.map(jnp.zeros_like, trace), trace)
  return linear, _carries(memory, trace)


def _carries(memory, trace):
  return {
    name: rules.Carry(weights, trace and trace[name])
    for name, weights in memory.items()
  }
