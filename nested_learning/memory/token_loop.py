"""The engine token by token: the definition.

Time is cut into chunks of `rule.chunk_size` tokens, counted from the stream's
start. The inputs and the error of a token's write are computed from the memory
as it stood at the start of the token's chunk (the *anchor*); a document border
ends a chunk early. The state between two calls may lie anywhere inside a chunk.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 83-90.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning.memory import layout
from nested_learning.memory import networks
from nested_learning.memory import rule as rules
from nested_learning.memory import writes


def scan_tokens(
  network: networks.Network,
  rule: rules.Rule,
  initial: Any,
  state: rules.State,
  inputs: Any,
  *,
  project: rules.Project,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  write: bool = True,
) -> tuple[rules.Result, rules.State]:
  """Reads and writes token by token: the definition of the engine.

  Args:
    network: The memory's network.
    rule: How it is written and read.
    initial: Initial memory per map, [h, ..., out, in].
    state: From `init_state` or an earlier call.
    inputs: Inputs of `project`, a pytree of [b, h, t, ...].
    project: Makes the `WriteInputs` of the tokens from the memory itself; None
      where the inputs are the `WriteInputs`.
    reset: bool [b, t], True at a document's first token.
    mask: bool [b, t], False for tokens that are not there.
    write: False reads the memory and leaves it as it is.

  Returns:
    The `Result`, and the state after the tokens.
  """
  num_rows, _, num_tokens = jax.tree.leaves(inputs)[0].shape[:3]
  reset, mask = layout.default_info(reset, mask, num_rows, num_tokens)
  start = rules.init_state(rule, initial, num_rows)
  start = start._replace(anchor=rule.weights(start.memory))
  write_token = _write_token
  if rule.extension is not None:
    write_token = _write_extended

  def body(state, token):
    inputs, reset, mask = token
    inputs = jax.tree.map(lambda x: x[:, :, None], inputs)  # [b, h, 1, ...]
    # A border empties the memory; chunks go on counting from the start.
    fresh = start._replace(offset=state.offset)
    state = layout.where(reset & mask, fresh, state)
    starts = state.offset == 0
    anchor = layout.where(starts, rule.weights(state.memory), state.anchor)
    does_write = (mask & write)[:, None, None, None]  # [b, 1, 1, 1]
    carries, token, read, extra = write_token(
      network, rule, initial, state, anchor, inputs, project, does_write
    )
    memory = {name: carry.weights for name, carry in carries.items()}
    trace = state.trace and {n: carry.trace for n, carry in carries.items()}
    if rule.read == 'token':
      linear = networks.linear_of(memory)
      read = writes.read_vector(network, linear, token.query)
    offset = state.offset + mask
    ends = offset == rule.chunk_size
    bounded = writes.bound(rule, initial, memory, trace)
    memory, trace = layout.where(ends & write, bounded, (memory, trace))
    offset = jnp.where(ends, 0, offset)
    state = rules.State(memory, anchor, trace, offset, extra)
    return state, writes.result(rule, read, token)

  tokens = (
    jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs),
    reset.T,
    mask.T,
  )
  state, result = jax.lax.scan(body, state, tokens)
  # [t, b, h, 1, ...] to [b, h, t, ...]
  result = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), result)
  return result, state


def _write_token(
  network, rule, initial, state, anchor, inputs, project, does_write
):
  """Returns carries per map after a token, its inputs, its anchor's read."""
  errors = writes.evaluate(network, rule, anchor, inputs, project)
  carries = {}
  for name, weights in state.memory.items():
    carry = rules.Carry(weights, state.trace and state.trace[name])
    if not writes.learns(rule, name, initial):
      carries[name] = carry
      continue
    carries[name] = rules.write_token(
      carry,
      writes.reference(rule, initial[name]),
      errors.inputs[name],
      errors.deltas[name],
      writes.map_rates(rule, name, errors, does_write),
      erase=writes.erases(rule, name, initial),
      erase_from=rule.erase_from,
    )
  return carries, errors.token, errors.read, None


def _write_extended(
  network, rule, initial, state, anchor, inputs, project, does_write
):
  """Writes a token as the rule's extension does."""
  del project  # extensions are defined for static memories
  carries, extra = rule.extension.write_token(
    network, rule, initial, state, anchor, inputs, does_write
  )
  return carries, inputs, None, extra
