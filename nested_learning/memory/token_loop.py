"""The engine token by token: the definition.

Time is cut into chunks of `rule.chunk_size` tokens, counted from the stream's
start. The inputs and the error of a token's write are computed from the memory
as it stood at the start of the token's chunk (the *anchor*); a document border
ends a chunk early. The state between two calls may lie anywhere inside a chunk.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 83-90.
"""

import functools
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
  num_rows = jax.tree.leaves(inputs)[0].shape[0]
  start = rules.init_state(rule, initial, num_rows)
  start = start._replace(anchor=rule.weights(start.memory))
  body = functools.partial(_read_token, network, rule, initial, project, write)

  def read(state, token):
    inputs, reset, mask = token
    inputs = jax.tree.map(lambda x: x[:, :, None], inputs)  # [b, h, 1, ...]
    if reset is not None:
      # A border empties the memory; chunks go on counting from the start.
      border = reset if mask is None else reset & mask
      fresh = start._replace(offset=state.offset)
      state = layout.where(border, fresh, state)
    return body(state, inputs, mask)

  by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs)
  marks = jax.tree.map(lambda x: x.astype(bool).T, (reset, mask))
  state, result = jax.lax.scan(read, state, (by_token, *marks))
  # [t, b, h, 1, ...] to [b, h, t, ...]
  result = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), result)
  return result, state


def _read_token(network, rule, initial, project, write, state, inputs, mask):
  """Reads and writes a token of each row; the mask [b] leaves rows out."""
  moves = _moving_maps(rule, initial)
  made = lambda: moves(rule.weights(state.memory))
  moved = layout.where_any(state.offset == 0, made, moves(state.anchor))
  anchor = {**state.anchor, **moved}
  column = None if mask is None else mask[:, None, None, None]
  write_token = _write_token if rule.extension is None else _write_extended
  memory, trace, token, read, extra = write_token(
    network, rule, initial, state, anchor, inputs, project, column, write
  )
  if rule.read == 'token':
    read = writes.read_vector(network, networks.linear_of(memory), token.query)
  offset = state.offset + (1 if mask is None else mask)
  ends = offset == rule.chunk_size
  if write and rule.max_norm is not None:
    moving = moves(memory), moves(trace)
    bound = lambda: writes.bound(rule, moves(initial), *moving)
    moved, moved_trace = layout.where_any(ends, bound, moving)
    memory = {**memory, **moved}
    trace = trace and {**trace, **moved_trace}
  state = rules.State(memory, anchor, trace, jnp.where(ends, 0, offset), extra)
  return state, writes.result(rule, read, token)


def _write_token(
  network, rule, initial, state, anchor, inputs, project, mask, write
):
  """Returns memory and trace after a token, its inputs, its anchor's read."""
  errors = writes.evaluate(network, rule, anchor, inputs, project)
  memory, trace = {**state.memory}, state.trace
  for name in (n for n in initial if write and writes.learns(rule, n, initial)):
    carry = rules.write_token(
      rules.Carry(memory[name], trace and trace[name]),
      writes.reference(rule, initial[name]),
      errors.inputs[name],
      errors.deltas[name],
      writes.map_rates(rule, name, errors, mask),
      erase=writes.erases(rule, name, initial),
      erase_from=rule.erase_from,
    )
    memory[name] = carry.weights
    trace = trace and {**trace, name: carry.trace}
  return memory, trace, errors.token, errors.read, None


def _write_extended(
  network, rule, initial, state, anchor, inputs, project, mask, write
):
  """Writes a token as the rule's extension does."""
  del project  # extensions are defined for static memories
  mask = jnp.ones((len(state.offset), 1, 1, 1), bool) if mask is None else mask
  carries, extra = rule.extension.write_token(
    network, rule, initial, state, anchor, inputs, mask & write
  )
  memory = {name: carry.weights for name, carry in carries.items()}
  trace = state.trace and {n: carry.trace for n, carry in carries.items()}
  return memory, trace, inputs, None, extra


def _moving_maps(rule, initial):
  """Returns the function that selects the maps that tokens can change."""
  all_move = rule.extension is not None or rule.to_weights is not None
  names = [n for n in initial if all_move or writes.learns(rule, n, initial)]
  return lambda maps: maps and {name: maps[name] for name in names}
