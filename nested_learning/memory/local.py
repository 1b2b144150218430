r"""Two maps that both learn the value, each by a delta rule of its own.

.. math::
   A_t &= A_{t-1} + a_t (v_t - A_{t-1} k_t) k_t^T \\
   h_t &= \phi(A_{t-1} k_t) \\
   B_t &= B_{t-1} + b_t (v_t - B_{t-1} h_t) h_t^T \\
   y_t &= B_t \phi(A_t q_t)

No error passes through a map, and none is of an anchor: a chunk is two delta
rules, one after the other, and exact whatever its size. This is DeltaTTT. Its
a_t is `inner_lr`. Its b_t is here `hidden_lr` by the square of h_t's norm, of
which h has any: so is `hidden_lr` the share of the error that a write takes
away, and B stays finite where h is long. `retention` acts as elsewhere, and is
1 in the paper.

References:
  DeltaTTT, Tsinghua LeapLab, 2025 (local targets, the tokenwise recurrence).
"""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning.memory import chunk_rule
from nested_learning.memory import interface
from nested_learning.memory import networks
from nested_learning.memory import rule as rules
from nested_learning.memory import writes

_MAPS = ('in', 'vector')
_SMALL_SQUARE = 1e-2  # added to that of a norm of which there may be nothing


def write_token(
  network: networks.Network,
  rule: interface.Rule,
  initial: Any,
  memory: Any,
  feed: interface.Feed,
  does_write: jax.Array,
) -> dict[str, rules.Carry]:
  """Both maps after one token: the definition.

  Args:
    network: An MLP of one vector role whose hidden layer is as wide as values.
    rule: With its errors 'local'.
    initial: Initial memory per map, [(b,) h, ..., out, in].
    memory: Before the token.
    feed: Of the token, [b, h, 1, ...].
    does_write: bool [b, 1, 1, 1].

  Returns:
    The carry of each map.
  """
  carries = {}
  inputs = _map_inputs(network, networks.linear_of(memory), feed.key)
  for name in _MAPS:
    x = inputs[name]
    carries[name] = rules.write_token(
      rules.Carry(memory[name]),
      writes.reference(rule, initial[name]),
      x,
      -writes.per_map(feed.value, name),
      _rates(name, feed, x, does_write),
      erase=True,
    )
  return carries


def solve(
  network: networks.Network,
  rule: interface.Rule,
  initial: Any,
  memory: Any,
  feed: interface.Feed,
  keys: chunk_rule.Keys,
  does_write: jax.Array | None,
) -> dict[str, chunk_rule.Chunk]:
  """Both maps for all tokens of a chunk.

  Args:
    network: As in `write_token`.
    rule: As in `write_token`.
    initial: Initial memory per map, [b, h, ..., out, in].
    memory: Before the chunk.
    feed: Of its tokens, [b, h, t, ...].
    keys: Of its keys.
    does_write: bool [b, 1, t, 1], or None where all tokens write.

  Returns:
    The solved chunk of each map.
  """
  solved = {}
  for name in _MAPS:
    x = feed.key
    if name != 'in':
      linear = lambda name, x: (
        chunk_rule.read_before(solved[name], x) if name in solved else x
      )
      x = _map_inputs(network, linear, feed.key)[name]
    rates = _rates(name, feed, x, does_write)
    if name != 'in':
      decays = writes.per_map(keys.decays, name)
      keys = chunk_rule.make_keys(x, rates, decays, erase=True)
    solved[name] = chunk_rule.solve_chunk(
      rules.Carry(memory[name]),
      writes.reference(rule, initial[name]),
      initial[name],
      keys,
      -writes.per_map(feed.value, name),
      rates,
    )
  return solved


def _rates(name, feed, x, does_write):
  """The rates of a map with inputs x."""
  rates = writes.feed_rates(feed, does_write)
  if name == 'in':
    return rates
  if feed.hidden_lr is not None:
    rates = rates._replace(inner_lr=feed.hidden_lr)
  rates = writes.per_map(rates, name)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return rates._replace(inner_lr=rates.inner_lr / (square + _SMALL_SQUARE))


def _map_inputs(network, linear, x):
  """What each map of a network reads."""
  inputs = {}

  def record(name, x):
    inputs[name] = x
    return linear(name, x)

  network.apply(record, x)
  return inputs
