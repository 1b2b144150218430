r"""The update rule of one linear map, token by token: the definition.

For a map W [o, i] with inputs x_t and errors delta_t at its output:

.. math::
   S_t &= momentum_t S_{t-1} + inner\_lr_t \, delta_t x_t^T \\
   W_t &= W_{ref} + retention_t (W_{t-1} - W_{ref})
          - erase \, inner\_lr_t (W_{t-1} x_t) x_t^T - S_t                  (1)

W_ref is zero, or the initial memory. Every array has its token axis last but
one; rates are [..., t, 1].

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 88, 90, 93 (DGD
  with retention); Titans, arXiv:2501.00663, 2024, eqs. 13-18 (momentum).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import networks


class Rates(NamedTuple):
  """How each token writes, all [..., t, 1].

  Attributes:
    inner_lr: Inner learning rate, >= 0.
    retention: Fraction kept, in [0, 1].
    momentum: Fraction of the trace kept, in [0, 1], or None for no momentum.
    write: bool, False makes the token an exact no-op; None writes every token.
  """

  inner_lr: jax.Array
  retention: jax.Array
  momentum: jax.Array | None = None
  write: jax.Array | None = None

  def masked(self) -> 'Rates':
    """The rates with those of tokens that do not write made neutral."""
    if self.write is None:
      return self
    neutral = lambda x, value: jnp.where(self.write, x, value)
    return Rates(
      inner_lr=neutral(self.inner_lr, 0.0),
      retention=neutral(self.retention, 1.0),
      momentum=None if self.momentum is None else neutral(self.momentum, 1.0),
      write=self.write,
    )


class Carry(NamedTuple):
  """What a map carries: its weights, and its trace if there is momentum."""

  weights: jax.Array
  trace: jax.Array | None = None


def write_token(
  carry: Carry,
  reference: jax.Array | None,
  x: jax.Array,
  delta: jax.Array,
  rates: Rates,
  *,
  erase: bool,
  erase_from: str = 'previous',
) -> Carry:
  """Equation (1) for one token: the definition.

  Args:
    carry: Weights [..., o, i] and trace before the token.
    reference: W_ref [..., o, i], or None for zero.
    x: [..., 1, i].
    delta: [..., 1, o].
    rates: Each [..., 1, 1].
    erase: Whether the rule is Delta Gradient Descent.
    erase_from: What is erased is what the 'previous' weights give for x, or
      the 'retained' ones.

  Returns:
    The carry after the token.
  """
  rates = rates.masked()
  weights, trace = carry
  outer = lambda y: jnp.einsum('...to,...ti->...oi', y, x)
  kept = rates.retention * weights
  if reference is not None:
    kept = kept + (1.0 - rates.retention) * reference
  if erase:
    before = kept if erase_from == 'retained' else weights
    kept = kept - outer(rates.inner_lr * networks.apply_map(before, x))
  step = outer(rates.inner_lr * delta)
  if rates.momentum is None:
    return Carry(kept - step)
  trace = rates.momentum * trace + step
  applied = trace if rates.write is None else jnp.where(rates.write, trace, 0.0)
  return Carry(kept - applied, trace)
