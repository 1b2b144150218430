"""Momentum as an associative memory of gradients, with better memories.

Momentum is gradient descent on <m, g>: a linear memory that stores every
gradient without a key. `preconditioned_momentum` chooses the values to store;
`delta_momentum` erases the memory's output for a gradient before it stores the
new one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning.optimizers import placement
from nested_learning.optimizers import settings

_FORMS = ('stable', 'paper')


class MomentumState(NamedTuple):
  """State of a momentum.

  Attributes:
    count: Steps taken so far, int32.
    trace: The momentum, in float32 or wider.
    preconditioner: State of the transformation that makes the stored values.
  """

  count: jax.Array
  trace: Any
  preconditioner: Any


def delta_momentum(
  learning_rate: optax.ScalarOrSchedule,
  *,
  form: str = 'stable',
  decay: float = 0.9,
  erase: float = 0.2,
  preconditioner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum that erases along a gradient before it stores it.

  For a kernel of shape [in, out] with gradient G and momentum m,

  .. math::
    m &\leftarrow \text{decay}\; m - \frac{\text{erase}}{\|G\|_F^2} G G^\top m
      + P(G) \\
    W &\leftarrow W - \text{lr}\; m .

  This is the delta rule on |m^T G - P|^2, with the columns of G as keys. If
  successive gradients agree, momentum does not pile up; if they turn, the old
  direction decays by `decay` alone. A vector is one key, and the leading axes
  of larger tensors are a stack of kernels.

  Form 'paper' has neither the norm nor the weight `erase`,
  :math:`m \leftarrow m\,\alpha - G G^\top m - \text{lr}\; P(G)` and
  :math:`W \leftarrow W + m`, and diverges as soon as the norm of a gradient
  exceeds about sqrt(1 + decay): the step of a delta rule must be below
  2 / |key|^2. Dividing by the norm holds that at every scale of
  gradients, and keeps m bounded for erase <= 1 + decay.

  Deviations from print: arXiv's eq. 49 lacks the identity in
  (alpha I - G^T G) and any rate on the Gram matrix; the derivation puts it on
  the input side, which in Flax's layout is the left.

  Args:
    learning_rate: Step size, a scalar or an optax schedule (per step).
    form: 'stable' or 'paper'.
    decay: Fraction of the momentum kept per step; NL writes alpha.
    erase: Fraction erased along the gradient (form 'stable'); 0 is momentum.
    preconditioner: Optax transformation that computes the values P(G). None:
      the gradients themselves.

  Returns:
    An optax gradient transformation.

  Raises:
    ValueError: If a setting is out of its range, or at `init` if a parameter is
      not of a floating type.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 48-49.
  """
  settings.check_choice(_FORMS, form=form)
  settings.check_rate(learning_rate=learning_rate)
  settings.check_decay(decay=decay)
  settings.check_rate(erase=erase)
  stable = form == 'stable'
  if stable and isinstance(erase, (int, float)) and erase > 1 + decay:
    raise ValueError(
      f'{erase=} is above 1 + decay = {1 + decay}, where the momentum grows '
      'without bound; about 0.2 is usual.'
    )

  def remember(m, g, value, rate):
    kernel = _as_kernel(g.astype(m.dtype))
    if stable:
      kernel = _normalize(kernel)
    held = placement.matmul(jnp.matrix_transpose(kernel), _as_kernel(m))
    erased = placement.matmul(kernel, held).reshape(m.shape)
    value = value.astype(m.dtype)
    if not stable:
      return decay * m - erased - rate * value
    return decay * m - erase * erased + value

  return _make_momentum(learning_rate, remember, preconditioner, stable)


def preconditioned_momentum(
  learning_rate: optax.ScalarOrSchedule,
  *,
  form: str = 'stable',
  decay: float = 0.9,
  preconditioner: optax.GradientTransformation | None = None,
  preconditioner_decay: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum over preconditioned gradients.

  .. math::
    V &\leftarrow V - \zeta \nabla_V \tfrac12 |V - g^2|^2
      = (1 - \zeta) V + \zeta g^2 \\
    m &\leftarrow \text{decay}\; m + (1 - \text{decay})\, g / \sqrt{\hat V} \\
    W &\leftarrow W - \text{lr}\; m .

  The preconditioner is a memory with a gradient descent of its own, at rate
  zeta = 1 - preconditioner_decay. Regressed on squared gradients, it is the
  second moment of RMSProp. Unlike in Adam, every gradient is divided by the
  second moment of its own step, before it is stored.

  Form 'paper' is eq. 46-47 as arXiv prints it,
  :math:`m \leftarrow m - \text{lr}\; P g`, :math:`W \leftarrow W + m`. The text
  speaks of a forget gate, the equation has none; without it no gradient is ever
  forgotten, and the iterate oscillates forever. Eq. 41 prints P_{t+1} on both
  sides; its right side is read as P_t.

  Args:
    learning_rate: Step size, a scalar or an optax schedule (per step).
    form: 'stable' or 'paper'.
    decay: Fraction of the momentum kept per step (form 'stable').
    preconditioner: Optax transformation that replaces the one above.
    preconditioner_decay: Decay of the one above; NL's zeta is one minus this.

  Returns:
    An optax gradient transformation.

  Raises:
    ValueError: If a setting is out of its range, or at `init` if a parameter is
      not of a floating type.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 38-41, 46-47.
  """
  settings.check_choice(_FORMS, form=form)
  settings.check_rate(learning_rate=learning_rate)
  settings.check_decay(decay=decay, preconditioner_decay=preconditioner_decay)
  stable = form == 'stable'
  if preconditioner is None:
    preconditioner = optax.scale_by_rms(
      preconditioner_decay, eps_in_sqrt=False, bias_correction=True
    )

  def remember(m, g, value, rate):
    del g
    value = value.astype(m.dtype)
    return decay * m + (1 - decay) * value if stable else m - rate * value

  return _make_momentum(learning_rate, remember, preconditioner, stable)


def _make_momentum(learning_rate, remember, preconditioner, stable):
  """Makes an optimiser from a rule for the momentum.

  Args:
    learning_rate: A scalar or a schedule.
    remember: Function of (momentum, gradient, value, rate) of a leaf that
      returns the new momentum.
    preconditioner: Transformation of gradients to values; None: identity.
    stable: Whether the rate is applied to the momentum rather than inside it.

  Returns:
    An optax gradient transformation.
  """
  make_values = optax.with_extra_args_support(
    optax.identity() if preconditioner is None else preconditioner
  )

  def init_fn(params):
    settings.check_params(params)
    return MomentumState(
      count=jnp.zeros((), jnp.int32),
      trace=jax.tree.map(_zeros, params),
      preconditioner=make_values.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    rate = settings.rate_at(learning_rate, state.count)
    values, inner = make_values.update(
      updates, state.preconditioner, params, **extra_args
    )
    trace = jax.tree.map(
      lambda m, g, value: remember(m, g, value, rate).astype(m.dtype),
      state.trace,
      updates,
      values,
    )
    sign = -rate if stable else 1.0
    updates = jax.tree.map(
      lambda m, g: (sign * m).astype(g.dtype), trace, updates
    )
    count = optax.safe_increment(state.count)
    return updates, MomentumState(count, trace, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _normalize(kernel):
  """Divides every matrix by its Frobenius norm; zero stays zero."""
  # By the largest entry first: squares of entries beyond 1e19 overflow, and
  # squares of entries below 1e-19 vanish.
  tiny = jnp.finfo(kernel.dtype).tiny
  axes = (-2, -1)
  largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True, initial=0)
  kernel = kernel / jnp.maximum(largest, tiny)
  norm = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=axes, keepdims=True))
  return kernel / jnp.maximum(norm, tiny)


def _as_kernel(leaf):
  """Returns a leaf as [..., in, out]; a vector has one output."""
  return leaf if leaf.ndim >= 2 else leaf.reshape(-1, 1)


def _zeros(leaf):
  return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
