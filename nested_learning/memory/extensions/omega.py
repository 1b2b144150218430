r"""Atlas: steps that sum the errors of a window, and orthogonal steps.

The step of a token sums the errors of the last c tokens of its document, itself
included. This is the Omega rule:

.. math::
   S_t &= momentum_t S_{t-1} + \sum_{i=t-c+1}^{t} weight_i \delta_i x_i^T \\
   W_t &= W_{ref} + retention_t (W_{t-1} - W_{ref}) - S_t

Every error is evaluated with the chunk's anchor, also of tokens in earlier
chunks; with chunks of one token this is exactly the paper's rule. weight_i is
inner_lr_i; the paper's \gamma_i^{(t)} may differ between the tokens t whose
windows hold token i, here it is one number per token i.

With orthogonal steps, weight_i is a number of its own in (0, 1), and

.. math::
   W_t = W_{ref} + retention_t (W_{t-1} - W_{ref}) - inner\_lr_t NS(S_t)

with NS five quintic steps of Newton-Schulz. The paper leaves its coefficients
open; these are Muon's. The trace does not depend on W: the traces of a chunk
are known at once and orthogonalised side by side. All of their matrices exist
at the same time, chunk_size times the size of a map.

The paper bounds neither the weights of a window nor the state, and plain steps
need both bounds: an error is written once per token of the window, from the
anchor of a chunk, so that untrained memories overflow within a hundred tokens.
The bounds are ours: `models.zoo` divides OmegaNet's inner_lr by c, and
`Rule.max_norm` bounds the state at the end of a chunk, where the paper
normalises the memory's layer.

A stream carries the last c - 1 tokens that were written.

References:
  Behrouz et al., Atlas, arXiv:2505.23735, 2025, section 3.2 (the Omega rule)
  and section 5 (orthogonal steps).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import newton_schulz
from nested_learning.memory import chunked
from nested_learning.memory import decays as decays_lib
from nested_learning.memory import layout
from nested_learning.memory import networks
from nested_learning.memory import rule as rules
from nested_learning.memory import writes


@dataclasses.dataclass(frozen=True)
class Omega:
  """Writes the errors of a window of tokens in every step."""

  window: int = 8  # tokens, c; the paper does not say
  step: Literal['gradient', 'orthogonal'] = 'gradient'

  def __post_init__(self):
    errors.check_choices(self)
    errors.check_field(self, 'window', self.window >= 1, 'at least 1 token')

  @property
  def inputs(self):
    """The weight of a token's error in the trace, with orthogonal steps."""
    return {} if self.step == 'gradient' else {'weight': 'fraction'}

  def check(self, rule: rules.Rule) -> None:
    """Raises `errors.UserError` if the rule erases, or lacks a trace."""
    rule.require(
      f'Omega(window={self.window})',
      erase='none',
      learns='every_map',
      read='token',
    )
    if self.step == 'orthogonal':
      rule.require(f'Omega(step={self.step!r})', momentum=True)

  def check_network(self, network: networks.Network) -> None:
    """Allows every network."""

  def init_state(self, initial, batch_size):
    """Returns the `_Tail` of a stream's start; None with a window of one."""
    if self.window == 1:
      return None
    return _init_tail(initial, batch_size, self.window)

  def write_token(self, network, rule, initial, state, anchor, inputs, write):
    """Writes one token's window; see `memory.Extension`."""
    tail = self._tail(initial, state)
    token = _Tail(inputs.key, inputs.value, self._weights(inputs), write)
    window, tail = _append(tail, token, keep=write[:, 0, 0, 0])
    evaluated = writes.evaluate(
      network, rule, anchor, _write_inputs(window.key, window.value)
    )
    weight = jnp.where(window.valid, window.weight, 0.0)
    rates = writes.token_rates(inputs, write)
    carries = {}
    for name, weights in state.memory.items():
      carry = rules.Carry(weights, state.trace and state.trace[name])
      reference = writes.reference(rule, initial[name])
      of_window = evaluated.inputs[name], evaluated.deltas[name]
      own, by = writes.per_map((rates, weight), name)
      if self.step == 'orthogonal':
        carries[name] = _write_orthogonal(carry, reference, *of_window, by, own)
      else:
        own = own._replace(inner_lr=by)
        carries[name] = rules.write_token(
          carry, reference, *of_window, own, erase=False
        )
    return carries, tail if self.window > 1 else None

  def prepare(self, rule, initial, state, chunks, *, write):
    """Lays out the window of every chunk; see `memory.Extension`."""
    inputs, tail = chunks.inputs, self._tail(initial, state)
    key, value, weight = (
      layout.join(x) for x in (inputs.key, inputs.value, self._weights(inputs))
    )
    in_slots = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)
    valid = jnp.ones((key.shape[0], key.shape[2]), bool)
    if chunks.mask is not None:
      valid = in_slots(chunks.mask)
    window, tail = _lay_out(
      tail,
      _Tail(key, value, weight, valid[:, None, :, None]),
      state.offset,
      rule.chunk_size,
      reset=None if chunks.reset is None else in_slots(chunks.reset),
      write=write,
    )
    keys = None
    if write and self.step == 'gradient':
      keys = self._make_keys(chunks, window)
    return _Known(window, keys), tail if self.window > 1 else None

  def solve_chunk(self, network, rule, initial, state, anchor, chunk):
    """Writes the windows of a chunk's tokens; see `memory.Extension`."""
    window = chunk.known.window
    fresh = None
    if chunk.reset is not None:
      fresh = jnp.cumsum(chunk.reset, axis=1) > 0
      # Tokens before the chunk are evaluated with its anchor.
      past = window.key.shape[2] - fresh.shape[1]
      fresh = jnp.pad(fresh, ((0, 0), (past, 0)))  # [b, p]
    evaluated = writes.evaluate_documents(
      network,
      rule,
      anchor,
      initial,
      _write_inputs(window.key, window.value),
      None,
      fresh,
      chunk.has_border,
    )
    solve = _solve_gradient
    if self.step == 'orthogonal':
      solve = _solve_orthogonal
    return solve(rule, initial, state, evaluated, chunk)

  def _tail(self, initial, state):
    if self.window == 1:  # a tail of no tokens
      return _init_tail(initial, state.offset.shape[0], 1)
    return state.extra

  def _weights(self, inputs):
    if self.step == 'orthogonal':
      return inputs.extra['weight']
    return inputs.inner_lr

  def _make_keys(self, chunks, window):
    """Computes the keys of all chunks; rows of `written` are p tokens."""
    reset, does_write = chunks.columns()
    inputs = chunks.inputs
    rates = writes.token_rates(inputs, does_write)
    decays = _sum_windows(decays_lib.make_decays(rates, reset), window.band)
    keys = chunked.make_keys(window.key, rates, decays, erase=False)
    return keys, chunked.make_scores(keys, inputs.query)


class _Tail(NamedTuple):
  """The c - 1 last tokens that were written.

  Attributes:
    key: [b, h, c - 1, d].
    value: [b, h, c - 1, d].
    weight: Weight of the token's error, [b, h, c - 1, 1].
    valid: bool [b, 1, c - 1, 1], whether it is a token of this document.
  """

  key: jax.Array
  value: jax.Array
  weight: jax.Array
  valid: jax.Array


class _Window(NamedTuple):
  """Every chunk with the c - 1 tokens before it: p tokens, of n chunks.

  Attributes:
    key: [n, b, h, p, d].
    value: [n, b, h, p, d].
    weight: [n, b, h, p, 1].
    band: 1 where a token of the chunk has the error of another in its step,
      [n, b, 1, chunk size, p]; else 0.
  """

  key: jax.Array
  value: jax.Array
  weight: jax.Array
  band: jax.Array


class _Known(NamedTuple):
  """`Chunks.known`: the windows, and keys with scores of plain steps."""

  window: _Window
  keys: tuple[chunked.Keys, jax.Array] | None


def _write_inputs(key, value):
  """Makes the part of `WriteInputs` from which errors are computed."""
  return rules.WriteInputs(key, value, None, None)


def _init_tail(initial: Any, batch_size: int, window: int) -> _Tail:
  """Makes the tail of a stream's start; values are as wide as keys."""
  heads, _, dim = initial['in'].shape[-3:]
  zeros = lambda d: jnp.zeros(
    (batch_size, heads, window - 1, d), initial['in'].dtype
  )
  valid = jnp.zeros((batch_size, 1, window - 1, 1), bool)
  return _Tail(zeros(dim), zeros(dim), zeros(1), valid)


def _append(tail: _Tail, token: _Tail, *, keep: jax.Array):
  """Returns the c tokens of a token's window, and the tail after it.

  Args:
    tail: c - 1 tokens.
    token: The next token.
    keep: bool [b], whether that token belongs to the stream.
  """
  join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=2)
  window = jax.tree.map(join, tail, token)
  later = jax.tree.map(lambda x: x[:, :, 1:], window)
  return window, layout.where(keep, later, tail)


def _lay_out(
  tail: _Tail,
  tokens: _Tail,
  offset: jax.Array,
  chunk_size: int,
  *,
  reset: jax.Array | None,
  write: bool,
) -> tuple[_Window, _Tail]:
  """Lays out the window of every chunk of a call.

  Args:
    tail: Before the call.
    tokens: The call's tokens in slots of whole chunks, [b, h, s, ...]; `valid`
      says which slots hold one.
    offset: int [b], slots of the first chunk that earlier calls filled.
    chunk_size: Slots of a chunk.
    reset: bool [b, s], True at a document's first token, or None.
    write: Whether tokens write.

  Returns:
    The `_Window`, and the tail after the call.
  """
  past = tail.key.shape[2]
  num_slots = tokens.key.shape[2]
  whole = _join_tail(tail, tokens, offset)
  document = jnp.zeros((offset.shape[0], past + num_slots), jnp.int32)
  if reset is not None:
    document = jnp.cumsum(jnp.pad(reset, ((0, 0), (past, 0))), axis=1)

  # Slots of each chunk and of the c - 1 before it, [n, p].
  view = jnp.arange(0, num_slots, chunk_size)[:, None]
  view = view + jnp.arange(past + chunk_size)
  cut = lambda x: jnp.moveaxis(x[:, :, view], 2, 0)
  age = past + jnp.arange(chunk_size)[:, None] - jnp.arange(past + chunk_size)
  near = (age >= 0) & (age <= past)
  documents = document[:, view]  # [b, n, p]
  valid = whole.valid[:, 0, :, 0][:, view]
  writing = tokens.valid.reshape(*valid.shape[:2], chunk_size, 1) & write
  band = near & valid[:, :, None] & writing
  band &= documents[:, :, None] == documents[:, :, past:, None]
  band = jnp.moveaxis(band, 1, 0)[:, :, None].astype(whole.weight.dtype)
  window = _Window(cut(whole.key), cut(whole.value), cut(whole.weight), band)
  if not past:
    return window, tail

  count = jnp.sum(tokens.valid, axis=(1, 2, 3)) if write else 0
  last = (offset + count)[:, None] + jnp.arange(past)  # [b, c - 1]
  after = jax.tree.map(lambda x: layout.take(x, last, 2), whole)
  ours = layout.take(document, last, 1) == document[:, -1:]
  return window, after._replace(valid=after.valid & ours[:, None, :, None])


def _join_tail(tail, tokens, offset):
  """Joins tail and tokens, [b, h, c - 1 + s, ...], the tail at each offset."""
  past, num_slots = tail.key.shape[2], tokens.key.shape[2]
  # Earlier tokens stand right before the call's first slot, which is `offset`.
  at = jnp.arange(past + num_slots) - offset[:, None]
  is_tail = (at >= 0) & (at < past)
  at = jnp.clip(at, 0, max(past - 1, 0))  # what is read elsewhere is not used

  def join(before, after):
    after = jnp.pad(after, [(0, 0), (0, 0), (past, 0), (0, 0)])
    if not past:
      return after
    before = layout.take(before, at, 2).astype(after.dtype)
    return jnp.where(is_tail[:, None, :, None], before, after)

  return jax.tree.map(join, tail, tokens)


def _sum_windows(
  decays: decays_lib.Decays, band: jax.Array
) -> decays_lib.Decays:
  """Turns weights of t steps into weights of the p errors that they sum."""
  trace = decays.trace
  if trace is not None:
    last = jnp.matmul(jnp.swapaxes(trace.last, -1, -2), band)
    trace = trace._replace(
      between=jnp.matmul(trace.between, band),
      last=jnp.swapaxes(last, -1, -2),
    )
  return decays._replace(between=jnp.matmul(decays.between, band), trace=trace)


def _solve_gradient(rule, initial, state, evaluated, chunk):
  """Solves plain steps: without erase, errors are rows with known weights."""
  known = chunk.known
  keys, scores = known.keys
  solved = {}
  for name, weights in state.memory.items():
    # Who writes is in the decays, through the band.
    rates = rules.Rates(known.window.weight, chunk.inputs.retention)
    own = keys
    if name != 'in':
      decays = writes.per_map(keys.decays, name)
      own = chunked.Keys(evaluated.inputs[name], decays, None, None)
    solved[name] = chunked.solve_chunk(
      rules.Carry(weights, state.trace and state.trace[name]),
      writes.reference(rule, initial[name]),
      initial[name],
      own,
      evaluated.deltas[name],
      writes.per_map(rates, name),
    )
  return chunked.make_linear(solved, scores), chunked.end_chunks(solved)


def _solve_orthogonal(rule, initial, state, evaluated, chunk):
  """Solves steps along the orthogonalised trace, one matrix per token."""
  reset, does_write = chunk.columns()
  rates = writes.token_rates(chunk.inputs, does_write).masked()
  decays = decays_lib.make_decays(rates._replace(momentum=None), reset)
  passed, start = decays_lib.trace_decays(rates.momentum, reset)
  window = chunk.known.window
  mix = jnp.matmul(passed, window.band)  # [b, 1, t, p]
  per_token = lambda x: x[..., None, :, :]
  weights, traces = {}, {}
  for name, before in state.memory.items():
    shared = (decays, mix, start, window.weight, rates.inner_lr)
    kept, by, carried, weight, inner_lr = writes.per_map(shared, name)
    rows = weight * evaluated.deltas[name]
    steps = jnp.einsum(
      '...tp,...po,...pi->...toi', by, rows, evaluated.inputs[name]
    )
    trace = carried[..., None] * per_token(state.trace[name]) + steps
    moved = inner_lr[..., None] * newton_schulz.orthogonalize(trace)
    base = per_token(before)
    if kept.fresh is not None:
      base = jnp.where(kept.fresh[..., None], per_token(initial[name]), base)
    after = kept.kept[..., None] * base  # [..., t, o, i]
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


def _write_orthogonal(carry, reference, x, delta, weight, rates):
  """Writes one token along the orthogonalised trace: the definition.

  Args:
    carry: Weights [..., o, i] and trace before the token.
    reference: W_ref [..., o, i], or None for zero.
    x: Inputs of the window's tokens, [..., c, i].
    delta: Their errors, [..., c, o].
    weight: Weights of their errors, [..., c, 1].
    rates: Rates of the token, each [..., 1, 1].

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
