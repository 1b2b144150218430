"""Multi-scale momentum: momenta on several clocks, orthogonalised."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning import newton_schulz
from nested_learning.optimizers import axes as axes_lib
from nested_learning.optimizers import settings
from nested_learning.optimizers import spreading
from nested_learning.optimizers import trees


class SlowMomentum(NamedTuple):
  """One slow momentum, and its orthogonalised direction."""

  momentum: Any
  direction: Any


class M3State(NamedTuple):
  """State of `scale_by_m3`.

  Attributes:
    count: Steps taken so far, int32.
    momentum: The fast momentum, in `mu_dtype`.
    slow: One `SlowMomentum` per slow clock. Its momentum is in float32 or
      wider, its direction in `mu_dtype`.
    second_moment: Mean (form 'ema') or sum of squared gradients, in `mu_dtype`
      (bfloat16 instead of float16); () if unused.
  """

  count: jax.Array
  momentum: Any
  slow: tuple[SlowMomentum, ...]
  second_moment: Any


def scale_by_m3(
  *,
  form: str = 'ema',
  beta: jax.typing.ArrayLike = 0.95,
  slow_every: int | Sequence[int] | None = 16,
  slow_weight: jax.typing.ArrayLike | Sequence[float] = 0.5,
  slow_decay: jax.typing.ArrayLike = 0.9,
  second_decay: jax.typing.ArrayLike | None = 0.95,
  damping: jax.typing.ArrayLike = 1.0,
  ns_coeffs: str | Sequence[float] = 'quintic',
  ns_steps: jax.typing.ArrayLike = 5,
  eps: jax.typing.ArrayLike = 1e-8,
  nesterov: bool = True,
  consistent_rms: jax.typing.ArrayLike | None = 0.2,
  mu_dtype: jax.typing.DTypeLike | None = None,
  dimension_numbers: Any | Callable[[Any], Any] | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformation:
  r"""Computes the direction of `m3` for trees in which every leaf is a matrix.

  Form 'ema' is that of `m3`, with `damping` before rms(g). Orthogonalising has
  already made all directions alike, so dividing by the root of v alone goes too
  far: entries whose gradients are almost always zero get most of the update.
  Damping bounds that.

  Form 'paper' is Algorithm 1 to the letter: m, s and v are sums (`beta`,
  `slow_decay` and `second_decay` are the factors beta_1, beta_3 and beta_2 of
  their terms), the direction is (NS(m_t) + alpha S) / (sqrt(v_t) + eps),
  without look-ahead, correction or scale. It reads the sum of line 3 as that of
  the K gradients of the last period (print has K + 1). An orthogonalised matrix
  has entries near 1 / sqrt(max(m, n)) whatever the gradient's size, so that
  division by sqrt(v) makes steps grow as gradients shrink: hence form 'ema'.
  Eq. 75 disagrees with Algorithm 1 in sign and indices; Algorithm 1 is
  followed. Print gives no constants.

  Args:
    form: 'ema' or 'paper'.
    beta: See `m3`.
    slow_every: See `m3`; a sequence makes several slow clocks, each with an s,
      an S and a weight of its own.
    slow_weight: See `m3`; one for all clocks or one each.
    slow_decay: See `m3`.
    second_decay: See `m3`.
    damping: Share of the gradient's RMS that joins its root second moment
      (form 'ema'); 0 is the printed division.
    ns_coeffs: Polynomial of Newton-Schulz: 'cubic', 'quintic' or (a, b, c).
    ns_steps: See `m3`.
    eps: See `m3`.
    nesterov: See `m3`; form 'ema'.
    consistent_rms: See `m3`; form 'ema'.
    mu_dtype: See `m3`.
    dimension_numbers: See `m3`. None: the last two axes of every leaf make a
      matrix.
    mesh: Devices to spread matrices over. None: the mesh of `jax.set_mesh`.

  Returns:
    An optax gradient transformation; apply the learning rate by
    `optax.scale_by_learning_rate`.

  Raises:
    ValueError: If a setting is out of its range, or dimension numbers do not
      fit the parameters.
  """
  settings.check_choice(('ema', 'paper'), form=form)
  settings.check_decay(beta=beta, slow_decay=slow_decay)
  settings.check_rate(eps=eps, damping=damping)
  if second_decay is not None:
    settings.check_decay(second_decay=second_decay)
  if consistent_rms is not None:
    settings.check_rate(consistent_rms=consistent_rms)
  settings.check_dtype(mu_dtype=mu_dtype)
  settings.check_period(ns_steps=ns_steps)
  if isinstance(ns_coeffs, str):
    settings.check_choice(newton_schulz.COEFFICIENTS, ns_coeffs=ns_coeffs)
  periods, weights = _slow_clocks(slow_every, slow_weight)
  is_ema = form == 'ema'
  add = _average if is_ema else _sum
  iterate = functools.partial(
    newton_schulz.orthogonalize,
    coefficients=ns_coeffs,
    num_steps=ns_steps,
    epsilon=eps,
  )

  def init_fn(params):
    settings.check_params(params)
    _find_axes(dimension_numbers, params)
    # A function: an array that stands in the state twice cannot be donated.
    zeros = lambda *dtypes: jax.tree.map(
      lambda leaf: jnp.zeros_like(leaf, dtype=_state_dtype(leaf, *dtypes)),
      params,
    )
    return M3State(
      count=jnp.zeros((), jnp.int32),
      momentum=zeros(mu_dtype),
      slow=tuple(SlowMomentum(zeros(), zeros(mu_dtype)) for _ in periods),
      second_moment=()
      if second_decay is None
      else zeros(_square_dtype(mu_dtype)),
    )

  def update_fn(updates, state, params=None):
    del params
    trees.check_like(updates, state.momentum)
    axes = _find_axes(dimension_numbers, updates)
    orthogonalize = lambda tree, like: spreading.map_matrices(
      iterate, tree, axes, like=like, mesh=mesh
    )
    # bfloat16 would lose small gradients in the sums of a step.
    gradients = jax.tree.map(lambda g: g.astype(_wide(g)), updates)
    count = state.count
    momentum = add(beta, state.momentum, gradients)
    ahead = momentum
    if is_ema:
      ahead = _correct(beta, momentum, gradients, count + 1, nesterov)
    direction = orthogonalize(ahead, state.momentum)

    is_known = [count >= period for period in periods]
    direction, total = _add_slow(direction, state.slow, weights, is_known)
    second_moment = state.second_moment
    if second_decay is not None:
      squares = jax.tree.map(jnp.square, gradients)
      second_moment = add(second_decay, second_moment, squares)
      if is_ema:
        divide = functools.partial(
          _divide_and_match, second_decay, count + 1, damping, eps
        )
        direction = jax.tree.map(divide, direction, second_moment, axes)
      else:
        direction = jax.tree.map(
          lambda d, v: d / (_sqrt(v) + _like(eps, v)), direction, second_moment
        )
    if is_ema:
      direction = jax.tree.map(
        lambda d, its: _scale(d, its, consistent_rms) / _like(total, d),
        direction,
        axes,
      )
    update_slow = functools.partial(
      _update_slow, gradients, count, slow_decay, is_ema, orthogonalize
    )
    new_state = M3State(
      count=optax.safe_increment(count),
      momentum=optax.tree.cast_like(momentum, state.momentum),
      slow=tuple(map(update_slow, state.slow, periods)),
      second_moment=optax.tree.cast_like(second_moment, state.second_moment),
    )
    return optax.tree.cast_like(direction, updates), new_state

  return optax.GradientTransformation(init_fn, update_fn)


def _add_slow(direction, slow, weights, is_known):
  """Adds the slow directions; returns the sum, and the sum of its weights."""
  total = jnp.ones((), jnp.float32)
  for part, weight, known in zip(slow, weights, is_known, strict=True):
    direction = jax.tree.map(
      lambda d, s, w=weight: d + _like(w, d) * s.astype(d.dtype),
      direction,
      part.direction,
    )
    # A direction is zero before its first.
    total = total + _like(weight, total) * known.astype(total.dtype)
  return direction, total


def _update_slow(gradients, count, decay, is_ema, orthogonalize, slow, period):
  """Adds gradients to a slow momentum; orthogonalises it if it is due.

  A slow momentum is not read between its updates, so that it can hold the sum
  of its next period as well: it decays on the first step of a period, and the
  gradients are added one by one. That saves a buffer.

  Args:
    gradients: Gradients of this step.
    count: Steps taken before this one.
    decay: The `slow_decay` of `m3`.
    is_ema: Whether the form is 'ema'.
    orthogonalize: Function of a tree of matrices, and of one laid out alike.
    slow: The `SlowMomentum`.
    period: Steps between updates.

  Returns:
    The new `SlowMomentum`.
  """
  is_first = (count % period == 0) & is_ema

  def add(m, g):
    fraction = _like(decay, g)
    keep = jnp.where(is_first, fraction, jnp.ones_like(fraction))
    share = (1 - fraction) / _like(period, g) if is_ema else fraction
    return keep * m.astype(g.dtype) + share * g

  momentum = jax.tree.map(add, slow.momentum, gradients)
  direction = jax.lax.cond(
    (count + 1) % period == 0,
    lambda momentum, direction: optax.tree.cast_like(
      orthogonalize(momentum, direction), direction
    ),
    lambda momentum, direction: direction,
    momentum,
    slow.direction,
  )
  return SlowMomentum(optax.tree.cast_like(momentum, slow.momentum), direction)


def _average(decay, averages, values):
  def leaf(m, x):
    fraction = _like(decay, x)
    return fraction * m.astype(x.dtype) + (1 - fraction) * x

  return jax.tree.map(leaf, averages, values)


def _sum(factor, sums, values):
  return jax.tree.map(
    lambda m, x: m.astype(x.dtype) + _like(factor, x) * x, sums, values
  )


def _correct(decay, momentum, gradients, step, nesterov):
  """Corrects a momentum for its bias; with Nesterov, that of the next step."""

  def leaf(m, g):
    unbiased = lambda step: 1 - _like(decay, g) ** _like(step, g)
    if not nesterov:
      return m / unbiased(step)
    ahead = _like(decay, g) / unbiased(step + 1)
    return ahead * m + (1 - _like(decay, g)) / unbiased(step) * g

  return jax.tree.map(leaf, momentum, gradients)


def _divide_and_match(
  decay, step, damping, eps, direction, second_moment, axes
):
  """Divides by the damped root of the second moment, and restores the RMS."""
  v = second_moment / (1 - _like(decay, direction) ** _like(step, direction))
  mean = jnp.mean(v, axis=axes.matrix, keepdims=True)
  # Relative to its RMS, which cancels below: the numbers stay near 1 for
  # gradients of any size. Squares that overflow make an update of zero.
  rms = jnp.minimum(_sqrt(mean), jnp.finfo(v.dtype).max) + _like(eps, v)
  divisor = _sqrt(v) + _like(damping, v) * rms + _like(eps, v)
  divided = direction * (rms / divisor)
  old, new = _rms(direction, axes), _rms(divided, axes)
  return divided * (old / jnp.maximum(new, jnp.finfo(v.dtype).tiny))


def _rms(x, axes):
  return _sqrt(jnp.mean(jnp.square(x), axis=axes.matrix, keepdims=True))


def _sqrt(x):
  """Computes the root, with a derivative of zero at zero."""
  is_positive = x > 0
  root = jnp.sqrt(jnp.where(is_positive, x, jnp.ones_like(x)))
  return jnp.where(is_positive, root, jnp.zeros_like(x))


def _scale(x, axes, consistent_rms):
  """Scales orthogonalised matrices by their shape, as `optax.contrib.muon`."""
  fan_in, fan_out = axes.sides(x.shape)
  if consistent_rms is None:
    return x * max(1.0, fan_out / max(fan_in, 1)) ** 0.5
  # An orthogonal matrix has RMS 1 / sqrt(max(m, n)).
  return x * (_like(consistent_rms, x) * max(fan_in, fan_out) ** 0.5)


def _like(value, x):
  """Returns a number or a scalar in the type of x."""
  return jnp.asarray(value).astype(x.dtype)


def _wide(leaf):
  return leaf.dtype if jnp.finfo(leaf.dtype).bits > 16 else jnp.float32


def _state_dtype(leaf, dtype=None):
  return _wide(leaf) if dtype is None else jnp.dtype(dtype)


def _square_dtype(dtype):
  # Squares of small gradients vanish in float16.
  is_half = dtype is not None and jnp.dtype(dtype) == jnp.float16
  return jnp.bfloat16 if is_half else dtype


def _find_axes(dimension_numbers, params):
  """Returns the axes of parameters that are all matrices."""
  axes = axes_lib.find(dimension_numbers, params)
  items, treedef = jax.tree_util.tree_flatten_with_path(params)
  for (path, _), its in zip(items, treedef.flatten_up_to(axes), strict=True):
    if its is None:
      raise ValueError(
        f'scale_by_m3: parameter {trees.path_name(path)} is no matrix, since '
        'its dimension numbers are None: use m3, which gives it to Adam.'
      )
  return axes


def _slow_clocks(slow_every, slow_weight):
  """Returns the periods and weights of the slow clocks, checked."""
  if slow_every is None:
    slow_every = ()
  is_many = isinstance(slow_every, Sequence)
  periods = tuple(slow_every) if is_many else (slow_every,)
  for period in periods:
    settings.check_period(slow_every=period)
  if isinstance(slow_weight, Sequence):
    weights = tuple(slow_weight)
  else:
    weights = (slow_weight,) * len(periods)
  if len(weights) != len(periods):
    raise ValueError(
      f'{slow_weight=} has {len(weights)} weights for {len(periods)} slow '
      f'clocks ({slow_every=}): give one number, or one per clock.'
    )
  for weight in weights:
    settings.check_rate(slow_weight=weight)
  return periods, weights
