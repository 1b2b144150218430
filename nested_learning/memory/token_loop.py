"""The engine token by token: the definition.

Time is cut into chunks of `rule.chunk_size` tokens, counted from the stream's
start. What a token writes and the error of that write are computed from the
memory as it stood at the start of the token's chunk (the *anchor*); a document
border ends a chunk early. The state between two calls may lie anywhere inside a
chunk.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 83-90.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning.memory import interface
from nested_learning.memory import networks
from nested_learning.memory import rows
from nested_learning.memory import rule as rules
from nested_learning.memory import writes


def token_loop(
  network: networks.Network,
  rule: interface.Rule,
  initial: Any,
  state: interface.State,
  inputs: Any,
  *,
  project: interface.Project,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  write: bool = True,
) -> tuple[interface.Result, interface.State]:
  """Reads and writes token by token: the definition of the engine.

  Args:
    network: What the memory is.
    rule: How it is written and read.
    initial: Initial memory per map, [h, ..., out, in].
    state: Where the stream stands, from `init_state` or an earlier call.
    inputs: What `project` takes, a pytree of [b, h, t, ...].
    project: Makes the `Feed` of the tokens from the memory itself; None where
      the inputs are the `Feed`.
    reset: bool [b, t], True at a document's first token.
    mask: bool [b, t], False for tokens that are not there.
    write: False reads the memory and leaves it as it is.

  Returns:
    The `Result`, and the state after the tokens.
  """
  num_tokens = jax.tree.leaves(inputs)[0].shape[2]
  reset, mask = rows.default_marks(
    reset, mask, state.offset.shape[0], num_tokens
  )

  def body(state, token):
    inputs, reset, mask = token
    inputs = jax.tree.map(lambda x: x[:, :, None], inputs)
    fresh = interface.init_state(initial, mask.shape[0], momentum=rule.momentum)
    fresh = fresh._replace(
      anchor=rule.weights(fresh.memory), offset=state.offset
    )
    state = rows.where(reset & mask, fresh, state)
    starts = state.offset == 0
    anchor = rows.where(starts, rule.weights(state.memory), state.anchor)
    seen = writes.evaluate(network, rule, anchor, inputs, project)
    does_write = (mask & write)[:, None, None, None]
    carries = {}
    for name, weights in state.memory.items():
      rates = writes.map_rates(rule, name, seen, does_write)
      carries[name] = rules.write_token(
        rules.Carry(weights, state.trace and state.trace[name]),
        writes.reference(rule, initial[name]),
        seen.inputs[name],
        seen.deltas[name],
        rates,
        erase=writes.erases(rule, name, initial),
        erase_from=rule.erase_from,
      )
    memory = {name: carry.weights for name, carry in carries.items()}
    trace = state.trace and {n: carry.trace for n, carry in carries.items()}
    read = seen.read
    if rule.read == 'token':
      read = writes.read_vector(
        network, networks.linear_of(memory), seen.feed.query
      )
    offset = state.offset + mask
    ends = offset == rule.chunk_size
    bounded = writes.bound(rule, initial, memory, trace)
    memory, trace = rows.where(ends & write, bounded, (memory, trace))
    state = interface.State(memory, anchor, trace, jnp.where(ends, 0, offset))
    return state, writes.result(rule, read, seen)

  tokens = (
    jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs),
    reset.T,
    mask.T,
  )
  state, result = jax.lax.scan(body, state, tokens)
  result = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), result)
  return result, state
