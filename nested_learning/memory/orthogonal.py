r"""Steps along the orthogonalised trace, one matrix per token.

.. math::
   S_t &= momentum_t S_{t-1} + \sum_i weight_i \delta_i x_i^T \\
   W_t &= W_{ref} + retention_t (W_{t-1} - W_{ref})
          - inner\_lr_t NS(S_t)

with the sum over the token's window (`tails.py`) and NS five quintic steps of
Newton-Schulz. The trace does not depend on W, so that a chunk's traces are
known at once, and orthogonalised side by side. Their matrices are all there at
the same time: a chunk takes chunk_size times the memory of a map.

References:
  Behrouz et al., Atlas, arXiv:2505.23735, 2025, section 5 (which leaves the
  coefficients of NS open; here Muon's).
"""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import newton_schulz
from nested_learning.memory import chunk_rule
from nested_learning.memory import interface
from nested_learning.memory import networks
from nested_learning.memory import rule as rules
from nested_learning.memory import tails
from nested_learning.memory import writes


def write_token(
  carry: rules.Carry,
  reference: jax.Array | None,
  x: jax.Array,
  delta: jax.Array,
  weight: jax.Array,
  rates: rules.Rates,
) -> rules.Carry:
  """One token's step: the definition.

  Args:
    carry: Weights [..., o, i] and trace before the token.
    reference: W_ref [..., o, i], or None for zero.
    x: Inputs of the window's tokens, [..., c, i].
    delta: Their errors, [..., c, o].
    weight: Of these, [..., c, 1].
    rates: Of the token, each [..., 1, 1].

  Returns:
    The carry after the token.
  """
  rates = rates.masked()
  if rates.write is not None:
    weight = jnp.where(rates.write, weight, 0.0)
  step = jnp.einsum('...to,...ti->...oi', weight * delta, x)
  trace = rates.momentum * carry.trace + step
  kept = rates.retention * carry.weights
  if reference is not None:
    kept = kept + (1.0 - rates.retention) * reference
  return rules.Carry(
    kept - rates.inner_lr * newton_schulz.orthogonalize(trace), trace
  )


def solve(
  rule: interface.Rule,
  state: interface.State,
  initial: Any,
  seen: writes.Seen,
  rates: rules.Rates,
  window: tails.Window,
  reset: jax.Array | None,
) -> tuple[networks.Linear, dict[str, rules.Carry]]:
  """The steps of all tokens of a chunk.

  Args:
    rule: How the memory is written.
    state: Before the chunk.
    initial: Initial memory per map, [b, h, ..., out, in].
    seen: Inputs and errors of the window's p tokens.
    rates: Of the chunk's tokens, each [b, h, t, 1].
    window: Of the chunk, its parts [b, h, p, ...].
    reset: bool [b, 1, t, 1], True at a document's first token, or None.

  Returns:
    What every map gives for the token's own input, after its own step; and
    weights and trace per map after the chunk.
  """
  masked = rates.masked()
  decays = chunk_rule.make_decays(masked._replace(momentum=None), reset)
  passed, start = chunk_rule.trace_decays(masked.momentum, reset)
  mix = jnp.matmul(passed, window.band)
  weights, traces = {}, {}
  for name, before in state.memory.items():
    shared = (decays, mix, start, window.weight, masked.inner_lr)
    kept, by, carried, weight, inner_lr = writes.per_map(shared, name)
    rows = weight * seen.deltas[name]
    steps = jnp.einsum('...tp,...po,...pi->...toi', by, rows, seen.inputs[name])
    per_token = lambda x: x[..., None, :, :]
    trace = carried[..., None] * per_token(state.trace[name]) + steps
    moved = inner_lr[..., None] * newton_schulz.orthogonalize(trace)
    base = per_token(before)
    if kept.fresh is not None:
      base = jnp.where(kept.fresh[..., None], per_token(initial[name]), base)
    after = kept.kept[..., None] * base
    reference = writes.reference(rule, initial[name])
    if reference is not None:
      after = after + (1.0 - kept.kept[..., None]) * per_token(reference)
    after = after - jnp.einsum('...ts,...soi->...toi', kept.between, moved)
    weights[name], traces[name] = after, trace

  def linear(name, x):
    return jnp.einsum('...toi,...ti->...to', weights[name], x)

  last = lambda x: x[..., -1, :, :]
  ended = {n: rules.Carry(last(weights[n]), last(traces[n])) for n in weights}
  return linear, ended
