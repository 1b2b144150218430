r"""The update rule of one linear map for a chunk of tokens at once.

With the errors of a whole chunk known, equation (1) of `rule.py` is linear in
W and solved at once: with g_t the product of retentions up to t, G[t, s] =
g_t / g_s for s <= t, and K = X X^T, every token's contribution is one row of a
unit lower triangular system, and the state of any token is

.. math::
   W_t = g_t W_0 + (1 - g_t) W_{ref} + \sum_{s \le t} G_{ts} u_s x_s^T
         - c_t S_0 - \sum_{r \le t} w_{tr} inner\_lr_r delta_r x_r^T        (2)

Every array has its token axis last but one; rates are [..., t, 1].

References:
  Yang et al., arXiv:2412.06464, 2024 (the chunked gated delta rule).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import networks
from nested_learning.memory import rule
from nested_learning.memory import triangular

_SMALLEST = 1e-12  # retentions and momenta below are taken as this in logs


class Decays(NamedTuple):
  """What a chunk's rates come to, shared by all maps; see (2).

  Attributes:
    kept: g_t, [..., t, 1].
    kept_before: g_{t-1}, [..., t, 1]; g_t where the retained is erased.
    between: G, [..., t, t], lower triangular.
    between_before: G one token earlier, strictly lower triangular.
    fresh: bool [..., t, 1], True from the chunk's first document border on, or
      None without borders.
    trace: The same of the momentum, or None.
  """

  kept: jax.Array
  kept_before: jax.Array
  between: jax.Array
  between_before: jax.Array
  fresh: jax.Array | None
  trace: 'TraceDecays | None'


class TraceDecays(NamedTuple):
  """The momentum's part of `Decays`.

  Attributes:
    start: c_t, weight of the first trace in W_t, [..., t, 1].
    start_before: c_{t-1}.
    between: w, weight of a token's step in a later W_t, [..., t, t].
    between_before: w one token earlier.
    last: Weight of each token's step in the last trace, [..., t, 1].
    last_start: Weight of the first trace in the last one, [..., 1, 1].
  """

  start: jax.Array
  start_before: jax.Array
  between: jax.Array
  between_before: jax.Array
  last: jax.Array
  last_start: jax.Array


def make_decays(
  rates: rule.Rates,
  reset: jax.Array | None = None,
  *,
  erase_from: str = 'previous',
) -> Decays:
  """Computes a chunk's `Decays` from its rates.

  Args:
    rates: Each [..., t, 1].
    reset: bool [..., t, 1], True at a document's first token, or None.
    erase_from: As in `write_token`; what is 'retained' has one retention more.

  Returns:
    The `Decays`; a token of one document has no weight in another.
  """
  rates = rates.masked()
  fresh, same = _documents(reset, rates.retention.shape[-2])
  kept, kept_before, between = _products(rates.retention, reset, same)
  between_before = _shift_down(between)
  if reset is not None:  # the shifted row belongs to the document before
    between_before = jnp.where(same, between_before, 0.0)
  trace = None
  if rates.momentum is not None:
    start, _, passed = _products(rates.momentum, reset, same)
    if fresh is not None:  # a new document starts with an empty trace
      start = jnp.where(fresh, 0.0, start)
    applied = between
    if rates.write is not None:
      applied = between * jnp.swapaxes(rates.write, -1, -2)
    in_weights = jnp.matmul(applied, passed)
    from_start = jnp.matmul(applied, start)
    in_before = _shift_down(in_weights)
    if reset is not None:
      in_before = jnp.where(same, in_before, 0.0)
    trace = TraceDecays(
      start=from_start,
      start_before=_shift_down(from_start),
      between=in_weights,
      between_before=in_before,
      last=jnp.swapaxes(passed[..., -1:, :], -1, -2),
      last_start=start[..., -1:, :],
    )
    if fresh is not None:
      trace = trace._replace(
        start_before=jnp.where(fresh, 0.0, trace.start_before)
      )
  decays = Decays(kept, kept_before, between, between_before, fresh, trace)
  if erase_from == 'previous':
    return decays
  once_more = lambda x: rates.retention * x
  if trace is not None:
    trace = trace._replace(
      start_before=once_more(trace.start_before),
      between_before=once_more(trace.between_before),
    )
  return decays._replace(
    kept_before=kept,
    between_before=jnp.tril(between, -1),
    trace=trace,
  )


def trace_decays(
  momentum: jax.Array, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """What a chunk's momenta come to in the trace itself.

  Args:
    momentum: [..., t, 1], neutral where nothing is written.
    reset: bool [..., t, 1], True at a document's first token, or None.

  Returns:
    Weight of a token's step in a later trace, [..., t, t], and of the trace
    before the chunk, [..., t, 1].
  """
  fresh, same = _documents(reset, momentum.shape[-2])
  start, _, passed = _products(momentum, reset, same)
  return passed, start if fresh is None else jnp.where(fresh, 0.0, start)


def sum_windows(decays: Decays, band: jax.Array) -> Decays:
  """The same where every step sums the errors of several tokens.

  Args:
    decays: Of the chunk's t tokens.
    band: Which of p tokens are summed by a token's step, [..., t, p].

  Returns:
    `Decays` whose weights of steps are weights of the p tokens' errors.
  """
  trace = decays.trace
  if trace is not None:
    last = jnp.matmul(jnp.swapaxes(trace.last, -1, -2), band)
    trace = trace._replace(
      between=jnp.matmul(trace.between, band),
      last=jnp.swapaxes(last, -1, -2),
    )
  return decays._replace(between=jnp.matmul(decays.between, band), trace=trace)


class Keys(NamedTuple):
  """What a chunk's inputs come to, whatever the weights; see (2).

  Attributes:
    x: [..., t, i].
    decays: Of the chunk, broadcastable to x.
    inverse: Of the unit lower triangular system, [..., t, t]; None without
      erase.
    gram: K, where the momentum needs it, [..., t, t]; else None.
  """

  x: jax.Array
  decays: Decays
  inverse: jax.Array | None
  gram: jax.Array | None


def make_keys(
  x: jax.Array, rates: rule.Rates, decays: Decays, *, erase: bool
) -> Keys:
  """Computes a chunk's `Keys`.

  Args:
    x: Inputs of the map, [..., t, i].
    rates: Each [..., t, 1].
    decays: From the same rates, broadcastable to x.
    erase: Whether the rule is Delta Gradient Descent.

  Returns:
    The `Keys`.
  """
  if not erase:
    return Keys(x, decays, None, None)
  gram = jnp.einsum(
    '...ti,...si->...ts', x, x, precision=jax.lax.Precision.HIGHEST
  )
  inner_lr = rates.masked().inner_lr
  inverse = triangular.unit_lower_inverse(
    inner_lr * decays.between_before * gram
  )
  return Keys(x, decays, inverse, None if decays.trace is None else gram)


class Chunk(NamedTuple):
  """A map's chunk, solved: what `read_chunk` and `end_chunk` need of it."""

  carry: rule.Carry
  reference: jax.Array | None
  initial: jax.Array | None
  keys: Keys
  written: jax.Array  # [..., t, o], rows that G weighs
  step: jax.Array | None  # inner_lr delta, rows that w weighs


def solve_chunk(
  carry: rule.Carry,
  reference: jax.Array | None,
  initial: jax.Array | None,
  keys: Keys,
  delta: jax.Array,
  rates: rule.Rates,
  *,
  read: jax.Array | None = None,
) -> Chunk:
  """Solves equation (1) for all tokens of a chunk at once.

  Args:
    carry: Weights [..., o, i] and trace before the chunk.
    reference: W_ref, or None for zero.
    initial: What the weights become at a document border; may be None where
      `decays.fresh` is.
    keys: From `make_keys` of the same rates; with its inverse the rule is
      Delta Gradient Descent.
    delta: [..., t, o].
    rates: Each [..., t, 1].
    read: What the weights before the chunk (initial after a border) give for
      each input, [..., t, o], if that is known already.

  Returns:
    The solved `Chunk`.
  """
  rates = rates.masked()
  trace = keys.decays.trace
  step = rates.inner_lr * delta
  chunk = Chunk(carry, reference, initial, keys, -step, None)
  if keys.inverse is None:
    if trace is None:
      return chunk
    return chunk._replace(written=jnp.zeros_like(step), step=step)
  if read is None:
    read = _carried_read(chunk, keys.x)
  before = _carried(chunk, keys.x, keys.decays.kept_before, read)
  # Without a trace, erased and written together: u_t - inner_lr_t delta_t.
  right = rates.inner_lr * before + step
  if trace is not None:
    before = before - trace.start_before * networks.apply_map(
      carry.trace, keys.x
    )
    before = before - jnp.matmul(trace.between_before * keys.gram, step)
    right = rates.inner_lr * before
  written = -jnp.matmul(
    keys.inverse, right, precision=jax.lax.Precision.HIGHEST
  )
  return chunk._replace(written=written, step=None if trace is None else step)


def make_scores(keys: Keys, q: jax.Array) -> jax.Array:
  """How much of each token's write the query of a later one sees, G o Q K^T.

  Args:
    keys: From `make_keys`.
    q: [..., t, i].

  Returns:
    [..., t, t], without the momentum's share.
  """
  return keys.decays.between * jnp.einsum('...ti,...si->...ts', q, keys.x)


def read_chunk(
  chunk: Chunk, q: jax.Array, scores: jax.Array | None = None
) -> jax.Array:
  """W_t q_t for every token t of a solved chunk, after its own write.

  Args:
    chunk: From `solve_chunk`.
    q: [..., t, i].
    scores: From `make_scores`, if they are known already.

  Returns:
    [..., t, o].
  """
  decays = chunk.keys.decays
  read = _carried(chunk, q, decays.kept, _carried_read(chunk, q))
  if scores is None:
    scores = make_scores(chunk.keys, q)
  read = read + jnp.matmul(scores, chunk.written)
  if decays.trace is None:
    return read
  seen = jnp.einsum('...ti,...si->...ts', q, chunk.keys.x)
  trace = decays.trace
  read = read - trace.start * networks.apply_map(chunk.carry.trace, q)
  return read - jnp.matmul(trace.between * seen, chunk.step)


def read_before(chunk: Chunk, q: jax.Array) -> jax.Array:
  """W_{t-1} q_t for every token t of a solved chunk without momentum.

  Args:
    chunk: From `solve_chunk`, with what is erased read from the 'previous'.
    q: [..., t, i].

  Returns:
    [..., t, o].
  """
  decays = chunk.keys.decays
  read = _carried(chunk, q, decays.kept_before, _carried_read(chunk, q))
  seen = jnp.einsum('...ti,...si->...ts', q, chunk.keys.x)
  return read + jnp.matmul(decays.between_before * seen, chunk.written)


def end_chunk(chunk: Chunk) -> rule.Carry:
  """Weights and trace after the last token of a solved chunk."""
  decays = chunk.keys.decays
  kept = decays.kept[..., -1:, :]
  weights = chunk.carry.weights
  if decays.fresh is not None:
    weights = jnp.where(decays.fresh[..., -1:, :], chunk.initial, weights)
  weights = kept * weights
  if chunk.reference is not None:
    weights = weights + (1.0 - kept) * chunk.reference
  outer = lambda y: jnp.einsum('...to,...ti->...oi', y, chunk.keys.x)
  last = lambda matrix: jnp.swapaxes(matrix[..., -1:, :], -1, -2)
  rows = last(decays.between) * chunk.written
  if decays.trace is None:
    return rule.Carry(weights + outer(rows))
  trace, step = decays.trace, chunk.step
  rows = rows - last(trace.between) * step
  weights = weights - trace.start[..., -1:, :] * chunk.carry.trace
  return rule.Carry(
    weights + outer(rows),
    trace.last_start * chunk.carry.trace + outer(trace.last * step),
  )


def _carried_read(chunk: Chunk, q: jax.Array) -> jax.Array:
  """What the weights before the chunk, or after a border, give for q."""
  read = networks.apply_map(chunk.carry.weights, q)
  fresh = chunk.keys.decays.fresh
  if fresh is None:
    return read
  return jnp.where(fresh, networks.apply_map(chunk.initial, q), read)


def _carried(
  chunk: Chunk, q: jax.Array, kept: jax.Array, read: jax.Array
) -> jax.Array:
  """What of that is left at each token, retention having moved it."""
  if chunk.reference is None:
    return kept * read
  return kept * read + (1.0 - kept) * networks.apply_map(chunk.reference, q)


def _documents(reset, size):
  """Which tokens come after a border, and earlier ones of one's document."""
  lower = jnp.tril(jnp.ones((size, size), bool))
  if reset is None:
    return None, lower
  document = jnp.cumsum(reset, axis=-2)
  return document > 0, lower & (document == jnp.swapaxes(document, -1, -2))


def _products(rates, reset, same):
  """Products up to t, up to t - 1, and from s + 1 to t (where `same`)."""
  log = jnp.log(jnp.maximum(rates, _SMALLEST))
  if reset is None:
    total = jnp.cumsum(log, axis=-2)
  else:  # sums within a document: no bit of another one enters
    total = jnp.matmul(
      same.astype(log.dtype), log, precision=jax.lax.Precision.HIGHEST
    )
  ratio = jnp.where(same, total - jnp.swapaxes(total, -1, -2), -jnp.inf)
  return jnp.exp(total), jnp.exp(total - log), jnp.exp(ratio)


def _shift_down(rows: jax.Array) -> jax.Array:
  """Every row one token later, the first zero."""
  pad = [(0, 0)] * (rows.ndim - 2) + [(1, 0), (0, 0)]
  return jnp.pad(rows[..., :-1, :], pad)
