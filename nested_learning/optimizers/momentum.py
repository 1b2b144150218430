"""Momentum as an associative memory of gradients, with better memories.

Momentum is gradient descent on <m, g>: a linear memory that stores every
gradient without a key. `preconditioned_momentum` chooses the values to store;
`delta_momentum` erases the memory's output for a gradient before it stores the
new one.
"""

from collections.abc import Callable
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning.optimizers import axes as axes_lib
from nested_learning.optimizers import placement
from nested_learning.optimizers import settings
from nested_learning.optimizers import trees

_FORMS = ('stable', 'paper')


class MomentumState(NamedTuple):
  """State of a momentum.

  Attributes:
    trace: The momentum, in float32 or wider.
    preconditioner: State of the transformation that makes the stored values.
  """

  trace: Any
  preconditioner: Any


def delta_momentum(
  learning_rate: optax.ScalarOrSchedule,
  *,
  form: str = 'stable',
  decay: float = 0.9,
  erase: float = 0.2,
  preconditioner: optax.GradientTransformation | None = None,
  dimension_numbers: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum that erases along a gradient before it stores it.

  For a kernel of shape [in, out] with gradient G and momentum m,

  .. math::
    m &\leftarrow \text{decay}\; m - \frac{\text{erase}}{\|G\|_F^2} G G^\top m
      + (1 - \text{decay})\, P(G) \\
    W &\leftarrow W - \text{lr}\; m .

  This is the delta rule on |m^T G - P|^2, with the columns of G as keys. If
  successive gradients agree, momentum does not pile up; if they turn, the old
  direction decays by `decay` alone.

  Like `optax.ema`, m is an average of gradients and not their sum. Along a
  gradient with curvature L, the step is then stable up to a rate of
  2 (1 + decay - erase) / ((1 - decay) L). With a sum, as in `optax.sgd`, the
  limit is 2 (1 + decay) / L. Above it, momentum diverges like gradient descent:
  give P = `optax.scale_by_rms()` where the scale of gradients is not known.

  Form 'paper' has neither the norm nor the weight `erase` nor the average,
  :math:`m \leftarrow m\,\alpha - G G^\top m - \text{lr}\; P(G)` and
  :math:`W \leftarrow W + m`. It diverges as soon as the norm of a gradient
  exceeds about sqrt(1 + decay): the step of a delta rule must be below
  2 / |key|^2. Dividing by the norm holds that at every scale of gradients, and
  keeps m bounded for erase <= 1 + decay. The rate is applied to the momentum
  and not inside it, which is the same for a constant rate, since m is linear in
  it; under a schedule, old gradients follow the rate of today.

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
    dimension_numbers: Tree of `optax.contrib.MuonDimensionNumbers` with the
      axes in and out of every kernel, or a function from the parameters to one;
      see `optimizers.dimension_numbers`. Parameters with None get momentum
      without erasing. None: vectors are one key, and the last two axes of
      larger arrays are a kernel, the others a stack of them.

  Returns:
    An optax gradient transformation.

  Raises:
    ValueError: If a setting is out of its range, or if a parameter is not of a
      floating type or the dimension numbers do not fit it.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 48-49.
  """
  settings.check_rate(learning_rate=learning_rate)
  direction = scale_by_delta_momentum(
    form=form,
    decay=decay,
    erase=erase,
    preconditioner=preconditioner,
    dimension_numbers=dimension_numbers,
  )
  return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def scale_by_delta_momentum(
  *,
  form: str = 'stable',
  decay: float = 0.9,
  erase: float = 0.2,
  preconditioner: optax.GradientTransformation | None = None,
  dimension_numbers: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Computes the momentum of `delta_momentum`.

  Args:
    form: See `delta_momentum`.
    decay: See `delta_momentum`.
    erase: See `delta_momentum`.
    preconditioner: See `delta_momentum`.
    dimension_numbers: See `delta_momentum`.

  Returns:
    An optax gradient transformation.

  Raises:
    ValueError: See `delta_momentum`.
  """
  settings.check_choice(_FORMS, form=form)
  settings.check_decay(decay=decay)
  settings.check_rate(erase=erase)
  stable = form == 'stable'
  known = settings.is_known(erase) and settings.is_known(decay)
  if stable and known and erase > 1 + decay:
    raise ValueError(
      f'{erase=} is above 1 + decay = {1 + decay}, where the momentum grows '
      'without bound; about 0.2 is usual.'
    )

  def find_axes(params):
    if dimension_numbers is None:
      return jax.tree.map(_default_axes, params)
    return axes_lib.find(dimension_numbers, params)

  def remember(m, g, value, axes):
    erased = 0.0
    if axes is not None:  # of a kernel
      key = _normalize(g, axes.matrix) if stable else g
      erased = _project(key, m, axes)
    if stable:
      return decay * m - erase * erased + (1 - decay) * value
    return decay * m - erased + value

  return _scale_by_momentum(remember, preconditioner, find_axes)


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
  forgotten, and the iterate oscillates forever. The rate is applied to the
  momentum and not inside it, which is the same for a constant rate. Eq. 41
  prints P_{t+1} on both sides; its right side is read as P_t.

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
  settings.check_rate(learning_rate=learning_rate)
  direction = scale_by_preconditioned_momentum(
    form=form,
    decay=decay,
    preconditioner=preconditioner,
    preconditioner_decay=preconditioner_decay,
  )
  return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def scale_by_preconditioned_momentum(
  *,
  form: str = 'stable',
  decay: float = 0.9,
  preconditioner: optax.GradientTransformation | None = None,
  preconditioner_decay: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
  """Computes the momentum of `preconditioned_momentum`.

  Args:
    form: See `preconditioned_momentum`.
    decay: See `preconditioned_momentum`.
    preconditioner: See `preconditioned_momentum`.
    preconditioner_decay: See `preconditioned_momentum`.

  Returns:
    An optax gradient transformation.

  Raises:
    ValueError: See `preconditioned_momentum`.
  """
  settings.check_choice(_FORMS, form=form)
  settings.check_decay(decay=decay, preconditioner_decay=preconditioner_decay)
  if preconditioner is None:
    preconditioner = settings.allow_promotion(
      optax.scale_by_rms(
        preconditioner_decay, eps_in_sqrt=False, bias_correction=True
      )
    )

  def remember(m, g, value, axes):
    del g, axes
    if form == 'paper':
      return m + value
    return decay * m + (1 - decay) * value

  no_axes = lambda params: jax.tree.map(lambda _: None, params)
  return _scale_by_momentum(remember, preconditioner, no_axes)


def _scale_by_momentum(remember, preconditioner, find_axes):
  """Makes a transformation from a rule for the momentum.

  Args:
    remember: Function of (momentum, gradient, value, axes) of a leaf, arrays of
      the momentum's type, that returns the new momentum.
    preconditioner: Transformation of gradients to values; None: identity.
    find_axes: Function of the parameters that returns the axes of each.

  Returns:
    An optax gradient transformation.
  """
  if preconditioner is None:
    preconditioner = optax.identity()
  settings.check_transformation(preconditioner=preconditioner)
  make_values = optax.with_extra_args_support(preconditioner)

  def init_fn(params):
    settings.check_params(params)
    find_axes(params)  # Checks them.
    return MomentumState(trees.zeros(params), make_values.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    trees.check_like(updates, state.trace)
    values, inner = make_values.update(
      updates, state.preconditioner, params, **extra_args
    )

    def leaf(m, g, value, axes):
      g, value = g.astype(m.dtype), value.astype(m.dtype)
      return remember(m, g, value, axes).astype(m.dtype)

    gradients, structure = jax.tree.flatten(updates)
    columns = map(structure.flatten_up_to, (values, find_axes(updates)))
    trace = structure.unflatten(
      map(leaf, jax.tree.leaves(state.trace), gradients, *columns)
    )
    return optax.tree.cast_like(trace, updates), MomentumState(trace, inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _default_axes(leaf):
  """Returns the last two axes as those of a kernel; a vector has one output."""
  if leaf.ndim < 2:
    return axes_lib.Axes((), tuple(range(leaf.ndim)), ())
  return axes_lib.last_two(leaf.ndim)


def _project(key, m, axes):
  """Computes key key^T m for every kernel of a parameter."""
  letters = string.ascii_lowercase[: m.ndim]
  # The outputs of the key are not those of the momentum.
  outputs = ''.join(letters[axis] for axis in axes.output)
  renamed = letters.translate(str.maketrans(outputs, outputs.upper()))
  inputs = ''.join(letters[axis] for axis in axes.reduction)
  kept = ''.join(letter for letter in letters if letter not in inputs)
  held = placement.einsum(
    f'{renamed},{letters}->{kept}{outputs.upper()}', key, m
  )
  return placement.einsum(
    f'{renamed},{kept}{outputs.upper()}->{letters}', key, held
  )


def _normalize(kernel, axes):
  """Divides every matrix by its Frobenius norm; zero stays zero."""
  # By the largest entry first: squares of entries beyond 1e19 overflow, and
  # squares of entries below 1e-19 vanish. The two divisors may be multiplied by
  # the compiler, so that neither is tiny where the other is.
  tiny = jnp.finfo(kernel.dtype).tiny
  largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True, initial=0)
  kernel = kernel / jnp.where(largest > tiny, largest, 1)
  square = jnp.sum(jnp.square(kernel), axis=axes, keepdims=True)
  return kernel * jax.lax.rsqrt(jnp.maximum(square, 1))  # 1 is its largest.
