r"""Products of a chunk's retentions and momenta, shared by all maps.

For tokens t and s of one chunk and document: g_t is the product of retentions
up to t, G[t, s] = g_t / g_s for s <= t, and c_t and w are the same with the
trace of the momentum; see equation (2) in `chunked.py`. Every array has its
token axis last but one; rates are [..., t, 1].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import rule as rules

# Lower bound of rates in logarithms: the logarithm of zero is minus infinity,
# and the difference of two of them is not a number.
_SMALLEST = 1e-12


class Decays(NamedTuple):
  """Products of a chunk's rates, shared by all maps; see (2).

  Attributes:
    kept: g_t, [..., t, 1].
    kept_before: g_{t-1}, [..., t, 1]; g_t where the retained is erased.
    between: G, [..., t, t], lower triangular.
    between_before: G one token earlier, strictly lower triangular.
    fresh: bool [..., t, 1], True from the chunk's first document border on, or
      None without borders.
    trace: Products of the momentum, or None.
  """

  kept: jax.Array
  kept_before: jax.Array
  between: jax.Array
  between_before: jax.Array
  fresh: jax.Array | None
  trace: 'TraceDecays | None'


class TraceDecays(NamedTuple):
  """Products of momentum and retention; see (2).

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
  rates: rules.Rates,
  reset: jax.Array | None = None,
  *,
  erase_from: str = 'previous',
) -> Decays:
  """Computes a chunk's `Decays` from its rates.

  Args:
    rates: Each [..., t, 1].
    reset: bool [..., t, 1], True at a document's first token, or None.
    erase_from: As in `Rule`; with 'retained', what is erased has been through
      one retention more.

  Returns:
    The `Decays`. A token of one document has no weight in another.
  """
  rates = rates.masked()
  fresh, same = _documents(reset, rates.retention.shape[-2])
  kept, kept_before, between = _products(rates.retention, reset, same)
  before = _one_token_earlier(between, reset, same)
  decays = Decays(kept, kept_before, between, before, fresh, None)
  if rates.momentum is not None:
    trace = _make_trace_decays(rates, reset, decays, same)
    decays = decays._replace(trace=trace)
  if erase_from == 'previous':
    return decays
  trace = decays.trace
  if trace is not None:
    trace = trace._replace(
      start_before=rates.retention * trace.start_before,
      between_before=rates.retention * trace.between_before,
    )
  return decays._replace(
    kept_before=kept, between_before=jnp.tril(between, -1), trace=trace
  )


def trace_decays(
  momentum: jax.Array, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Computes the weights of steps in the trace itself.

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


def _make_trace_decays(rates, reset, decays, same):
  """Computes the `TraceDecays` of a chunk whose other decays are known."""
  start, _, passed = _products(rates.momentum, reset, same)
  if decays.fresh is not None:  # a new document starts with an empty trace
    start = jnp.where(decays.fresh, 0.0, start)
  applied = decays.between
  if rates.write is not None:  # tokens that do not write apply no trace
    applied = applied * jnp.swapaxes(rates.write, -1, -2)
  in_weights = jnp.matmul(applied, passed)  # w, [..., t, t]
  from_start = jnp.matmul(applied, start)  # c_t, [..., t, 1]
  start_before = _shift_down(from_start)
  if decays.fresh is not None:
    start_before = jnp.where(decays.fresh, 0.0, start_before)
  return TraceDecays(
    start=from_start,
    start_before=start_before,
    between=in_weights,
    between_before=_one_token_earlier(in_weights, reset, same),
    last=jnp.swapaxes(passed[..., -1:, :], -1, -2),
    last_start=start[..., -1:, :],
  )


def _one_token_earlier(between, reset, same):
  """Returns weights [..., t, t] before the token's own write."""
  before = _shift_down(between)
  # The row above a document's first token belongs to another document.
  return before if reset is None else jnp.where(same, before, 0.0)


def _documents(reset, size):
  """Returns which tokens follow a border, and pairs of one document."""
  lower = jnp.tril(jnp.ones((size, size), bool))
  if reset is None:
    return None, lower
  document = jnp.cumsum(reset, axis=-2)
  return document > 0, lower & (document == jnp.swapaxes(document, -1, -2))


def _products(rates, reset, same):
  """Returns products up to t, up to t - 1, and from s + 1 to t if `same`."""
  log = jnp.log(jnp.maximum(rates, _SMALLEST))
  if reset is None:
    total = jnp.cumsum(log, axis=-2)
  else:  # sums within a document, so that no bit of another one enters
    total = jnp.matmul(
      same.astype(log.dtype), log, precision=jax.lax.Precision.HIGHEST
    )
  ratio = jnp.where(same, total - jnp.swapaxes(total, -1, -2), -jnp.inf)
  return jnp.exp(total), jnp.exp(total - log), jnp.exp(ratio)


def _shift_down(rows: jax.Array) -> jax.Array:
  """Moves every row one token later; the first becomes zero."""
  pad = [(0, 0)] * (rows.ndim - 2) + [(1, 0), (0, 0)]
  return jnp.pad(rows[..., :-1, :], pad)
