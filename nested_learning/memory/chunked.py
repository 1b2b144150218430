r"""The update rule of one linear map for a chunk of tokens, in matmuls.

Once the errors of a whole chunk are known, equation (1) of `rule.py` is linear
in W. Let g_t be the product of retentions up to t, G[t, s] = g_t / g_s for
s <= t, c_t and w the same of the momentum, and K = X X^T. The contributions
u_s of the tokens solve a unit lower triangular system, and the weights after
any token are

.. math::
   W_t = g_t W_0 + (1 - g_t) W_{ref} + \sum_{s \le t} G_{ts} u_s x_s^T
         - c_t S_0 - \sum_{r \le t} w_{tr} inner\_lr_r delta_r x_r^T        (2)

Every array has its token axis last but one; rates are [..., t, 1].

References:
  Yang et al., arXiv:2412.06464, 2024 (the chunked gated delta rule).
"""

from collections.abc import Mapping
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import decays as decays_lib
from nested_learning.memory import networks
from nested_learning.memory import rule as rules

# Up to this size multiplying whole matrices is cheaper than cutting them up:
# TPUs compute nothing faster with operands of less than 128 x 128.
_SMALL = 16
_SMALL_ON_TPUS = 64


class Keys(NamedTuple):
  """The part of (2) that depends on a chunk's inputs and rates alone.

  Attributes:
    x: [..., t, i].
    decays: Products of the chunk's rates, broadcastable to x.
    inverse: Inverse of the unit lower triangular system, [..., t, t]; None
      without erase.
    gram: K, [..., t, t]; None where no momentum needs it.
  """

  x: jax.Array
  decays: decays_lib.Decays
  inverse: jax.Array | None
  gram: jax.Array | None


def make_keys(
  x: jax.Array,
  rates: rules.Rates,
  decays: decays_lib.Decays,
  *,
  erase: bool,
  small: int | None = None,
) -> Keys:
  """Computes a chunk's `Keys`.

  Args:
    x: Inputs of the map, [..., t, i].
    rates: Each [..., t, 1].
    decays: From the same rates, broadcastable to x.
    erase: Whether the rule is Delta Gradient Descent.
    small: As in `unit_lower_inverse`.

  Returns:
    The `Keys`.
  """
  if not erase:
    return Keys(x, decays, None, None)
  # The inverse amplifies the rounding of its matrix, so that no digit may be
  # lost to a fast matmul.
  gram = jnp.einsum(
    '...ti,...si->...ts', x, x, precision=jax.lax.Precision.HIGHEST
  )  # K, [..., t, t]
  inner_lr = rates.masked().inner_lr
  inverse = unit_lower_inverse(inner_lr * decays.between_before * gram, small)
  return Keys(x, decays, inverse, None if decays.trace is None else gram)


class Solved(NamedTuple):
  """A map's chunk, solved; `read_chunk` and `end_chunk` evaluate (2).

  Attributes:
    carry: Weights and trace before the chunk.
    reference: W_ref, or None for zero.
    initial: Weights after a document border.
    keys: The chunk's `Keys`.
    written: [..., t, o], rows weighted by G.
    step: inner_lr delta, [..., t, o], rows weighted by w; None without trace.
  """

  carry: rules.Carry
  reference: jax.Array | None
  initial: jax.Array | None
  keys: Keys
  written: jax.Array
  step: jax.Array | None


def solve_chunk(
  carry: rules.Carry,
  reference: jax.Array | None,
  initial: jax.Array | None,
  keys: Keys,
  delta: jax.Array,
  rates: rules.Rates,
  *,
  read: jax.Array | None = None,
) -> Solved:
  """Solves equation (1) for all tokens of a chunk at once.

  Args:
    carry: Weights [..., o, i] and trace before the chunk.
    reference: W_ref, or None for zero.
    initial: Weights after a document border; may be None where
      `decays.fresh` is None.
    keys: From `make_keys` with the same rates. With an inverse the rule is
      Delta Gradient Descent.
    delta: [..., t, o].
    rates: Each [..., t, 1].
    read: Output of the weights before the chunk (initial after a border) for
      each input, [..., t, o], if it is known already.

  Returns:
    A `Solved`.
  """
  rates = rates.masked()
  trace = keys.decays.trace
  step = rates.inner_lr * delta
  chunk = Solved(carry, reference, initial, keys, -step, None)
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
  # Entries of the inverse cancel where keys repeat.
  written = -jnp.matmul(
    keys.inverse, right, precision=jax.lax.Precision.HIGHEST
  )
  return chunk._replace(written=written, step=None if trace is None else step)


def make_scores(keys: Keys, q: jax.Array) -> jax.Array:
  """Computes G o Q K^T, the weight of each token's write in a later read.

  Args:
    keys: From `make_keys`.
    q: [..., t, i].

  Returns:
    [..., t, t], without the momentum's share.
  """
  return keys.decays.between * jnp.einsum('...ti,...si->...ts', q, keys.x)


def read_chunk(
  chunk: Solved, q: jax.Array, scores: jax.Array | None = None
) -> jax.Array:
  """Computes W_t q_t for every token t, after the token's own write.

  Args:
    chunk: From `solve_chunk`.
    q: [..., t, i].
    scores: From `make_scores`, if known already.

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


def read_before(chunk: Solved, q: jax.Array) -> jax.Array:
  """Computes W_{t-1} q_t for every token t of a chunk without momentum.

  Args:
    chunk: From `solve_chunk`, with erase_from 'previous'.
    q: [..., t, i].

  Returns:
    [..., t, o].
  """
  decays = chunk.keys.decays
  read = _carried(chunk, q, decays.kept_before, _carried_read(chunk, q))
  seen = jnp.einsum('...ti,...si->...ts', q, chunk.keys.x)
  return read + jnp.matmul(decays.between_before * seen, chunk.written)


def end_chunk(chunk: Solved) -> rules.Carry:
  """Returns weights and trace after the last token of a solved chunk."""
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
    return rules.Carry(weights + outer(rows))
  trace, step = decays.trace, chunk.step
  rows = rows - last(trace.between) * step
  weights = weights - trace.start[..., -1:, :] * chunk.carry.trace
  return rules.Carry(
    weights + outer(rows),
    trace.last_start * chunk.carry.trace + outer(trace.last * step),
  )


def make_linear(
  solved: Mapping[str, Solved | rules.Carry], scores: jax.Array | None = None
) -> networks.Linear:
  """Makes the `linear` that applies each token's own weights.

  Args:
    solved: A solved chunk per map, or a `Carry` where no token writes it.
    scores: From `make_scores` of the map 'in', if known already.

  Returns:
    `linear(name, q)` for the chunk's tokens.
  """

  def linear(name, q):
    chunk = solved[name]
    if isinstance(chunk, rules.Carry):
      return networks.apply_map(chunk.weights, q)
    return read_chunk(chunk, q, scores if name == 'in' else None)

  return linear


def end_chunks(
  solved: Mapping[str, Solved | rules.Carry],
) -> dict[str, rules.Carry]:
  """Returns weights and trace per map after the last token of a chunk."""
  return {
    name: chunk if isinstance(chunk, rules.Carry) else end_chunk(chunk)
    for name, chunk in solved.items()
  }


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def unit_lower_inverse(
  strictly_lower: jax.Array, small: int | None = None
) -> jax.Array:
  r"""Inverts I + N for strictly lower triangular N, by matmuls alone.

  Halves are inverted and joined. No power of N is formed: products of powers
  overflow when keys repeat.

  .. math::
     \begin{pmatrix} A & 0 \\ B & D \end{pmatrix}^{-1} =
     \begin{pmatrix} A^{-1} & 0 \\ -D^{-1} B A^{-1} & D^{-1} \end{pmatrix}

  Args:
    strictly_lower: N, [..., c, c]; entries on or above the diagonal are not
      read.
    small: Size from which on halves are not halved again; None chooses it by
      the platform that is compiled for.

  Returns:
    [..., c, c], unit lower triangular.
  """
  if small is not None:
    return _invert(strictly_lower, small)
  if strictly_lower.shape[-1] <= _SMALL:  # the same on all platforms
    return _ladder(strictly_lower)
  return jax.lax.platform_dependent(
    strictly_lower,
    tpu=lambda x: _invert(x, _SMALL_ON_TPUS),
    default=lambda x: _invert(x, _SMALL),
  )


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(small, primals, tangents):
  (strictly_lower,), (tangent,) = primals, tangents
  inverse = unit_lower_inverse(strictly_lower, small)
  change = _matmul(inverse, _matmul(jnp.tril(tangent, -1), inverse))
  return inverse, -change


def _invert(strictly_lower: jax.Array, small: int) -> jax.Array:
  """Inverts the halves and joins them; see `unit_lower_inverse`."""
  size = strictly_lower.shape[-1]
  if size <= small:
    return _ladder(strictly_lower)
  half = (size + 1) // 2
  first = strictly_lower[..., :half, :half]
  second = strictly_lower[..., half:, half:]
  if size % 2:  # a last row of zeros makes the halves equal
    pad = [(0, 0)] * (strictly_lower.ndim - 2) + [(0, 1), (0, 1)]
    second = jnp.pad(second, pad)
  both = _invert(jnp.stack([first, second]), small)
  first, second = both[0], both[1][..., : size - half, : size - half]
  below = -_matmul(second, _matmul(strictly_lower[..., half:, :half], first))
  above = jnp.zeros((*below.shape[:-2], half, size - half), below.dtype)
  return jnp.concatenate(
    [
      jnp.concatenate([first, above], axis=-1),
      jnp.concatenate([below, second], axis=-1),
    ],
    axis=-2,
  )


def _ladder(strictly_lower: jax.Array) -> jax.Array:
  """Inverts small matrices: all pairs of blocks of a size at once."""
  size = strictly_lower.shape[-1]
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)
  )
  inverse = (row == column).astype(strictly_lower.dtype)
  for level in range((size - 1).bit_length()):
    # Blocks have 2^level rows; shifts, since kernels cannot divide integers.
    block = column >> level
    is_below = ((row >> level) == block + 1) & ((block & 1) == 0)
    below = jnp.where(is_below, strictly_lower, 0.0)
    if level:  # before, the inverse is the identity
      below = _matmul(inverse, _matmul(below, inverse))
    inverse = inverse - below
  return jnp.broadcast_to(inverse, strictly_lower.shape)  # for a size of one


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  # Entries of the inverse cancel where keys repeat.
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _carried_read(chunk: Solved, q: jax.Array) -> jax.Array:
  """Applies the weights before the chunk, or after a border, to q."""
  read = networks.apply_map(chunk.carry.weights, q)
  fresh = chunk.keys.decays.fresh
  if fresh is None:
    return read
  return jnp.where(fresh, networks.apply_map(chunk.initial, q), read)


def _carried(
  chunk: Solved, q: jax.Array, kept: jax.Array, read: jax.Array
) -> jax.Array:
  """Moves such a read by the retention up to each token."""
  if chunk.reference is None:
    return kept * read
  return kept * read + (1.0 - kept) * networks.apply_map(chunk.reference, q)
