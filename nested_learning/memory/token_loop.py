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
from nested_learning.memory import local
from nested_learning.memory import networks
from nested_learning.memory import orthogonal
from nested_learning.memory import rows
from nested_learning.memory import rule as rules
from nested_learning.memory import tails
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
  num_rows, _, num_tokens = jax.tree.leaves(inputs)[0].shape[:3]
  reset, mask = rows.default_marks(reset, mask, num_rows, num_tokens)
  start = interface.init_state(
    initial, num_rows, momentum=rule.momentum, window=rule.window
  )
  start = start._replace(anchor=rule.weights(start.memory))
  if state.tail is None:
    state = state._replace(tail=start.tail)

  def body(state, token):
    inputs, reset, mask = token
    inputs = jax.tree.map(lambda x: x[:, :, None], inputs)
    fresh = start._replace(offset=state.offset)
    state = rows.where(reset & mask, fresh, state)
    starts = state.offset == 0
    anchor = rows.where(starts, rule.weights(state.memory), state.anchor)
    does_write = (mask & write)[:, None, None, None]
    write_token = _write
    if rule.errors != 'propagated':
      write_token = _write_local
    elif rule.window > 1 or rule.step == 'orthogonal':
      write_token = _write_window
    carries, feed, read, tail = write_token(
      network, rule, initial, state, anchor, inputs, project, does_write
    )
    memory = {name: carry.weights for name, carry in carries.items()}
    trace = state.trace and {n: carry.trace for n, carry in carries.items()}
    if rule.read == 'token':
      linear = networks.linear_of(memory)
      read = writes.read_vector(network, linear, feed.query)
    offset = state.offset + mask
    ends = offset == rule.chunk_size
    bounded = writes.bound(rule, initial, memory, trace)
    memory, trace = rows.where(ends & write, bounded, (memory, trace))
    offset = jnp.where(ends, 0, offset)
    state = interface.State(memory, anchor, trace, offset, tail)
    return state, writes.result(rule, read, feed)

  tokens = (
    jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs),
    reset.T,
    mask.T,
  )
  state, result = jax.lax.scan(body, state, tokens)
  result = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), result)
  return result, state


def _write(network, rule, initial, state, anchor, inputs, project, does_write):
  """Carries per map after a token; its feed, its anchor's read, the tail."""
  seen = writes.evaluate(network, rule, anchor, inputs, project)
  carries = {}
  for name, weights in state.memory.items():
    carry = rules.Carry(weights, state.trace and state.trace[name])
    if not writes.learns(rule, name, initial):
      carries[name] = carry
      continue
    carries[name] = rules.write_token(
      carry,
      writes.reference(rule, initial[name]),
      seen.inputs[name],
      seen.deltas[name],
      writes.map_rates(rule, name, seen, does_write),
      erase=writes.erases(rule, name, initial),
      erase_from=rule.erase_from,
    )
  return carries, seen.feed, seen.read, state.tail


def _write_local(
  network, rule, initial, state, anchor, feed, project, does_write
):
  """The same where every map has errors of its own."""
  del anchor, project
  carries = local.write_token(
    network, rule, initial, state.memory, feed, does_write
  )
  return carries, feed, None, state.tail


def _write_window(
  network, rule, initial, state, anchor, feed, project, does_write
):
  """The same where a step sums the errors of a window, or is orthogonal."""
  del project
  tail = state.tail
  if tail is None:
    tail = tails.init_tail(initial, feed.key.shape[0], 1)
  token = tails.Tail(
    feed.key, feed.value, writes.error_weights(rule, feed), does_write
  )
  window, tail = tails.append(tail, token, keep=does_write[:, 0, 0, 0])
  seen = writes.evaluate(
    network,
    rule,
    anchor,
    interface.Feed(window.key, window.value, None, None),
    None,
  )
  weight = jnp.where(window.valid, window.weight, 0.0)
  rates = writes.feed_rates(feed, does_write)
  carries = {}
  for name, weights in state.memory.items():
    carry = rules.Carry(weights, state.trace and state.trace[name])
    reference = writes.reference(rule, initial[name])
    inputs, deltas = seen.inputs[name], seen.deltas[name]
    own, by = writes.per_map((rates, weight), name)
    if rule.step == 'orthogonal':
      carries[name] = orthogonal.write_token(
        carry, reference, inputs, deltas, by, own
      )
    else:
      own = own._replace(inner_lr=by)
      carries[name] = rules.write_token(
        carry, reference, inputs, deltas, own, erase=False
      )
  return carries, feed, None, tail if rule.window > 1 else None
