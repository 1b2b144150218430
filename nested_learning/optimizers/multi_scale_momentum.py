"""Multi-scale Momentum Muon: momenta on several clocks, orthogonalised."""

from collections.abc import Callable, Sequence
import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning import newton_schulz
from nested_learning.optimizers import placement
from nested_learning.optimizers import settings

# RMS that Adam's updates have early in training; a Muon update scaled to it
# can use the same learning rate (Liu et al., arXiv:2502.16982).
_UPDATE_RMS = 0.2

# Matrices that are looked up by row, and so are no linear maps.
_TABLES = ('embed', 'lm_head', 'logits', 'vocab')


class SlowMomentum(NamedTuple):
  """One slow momentum, and its orthogonalised direction."""

  momentum: Any
  direction: Any


class M3State(NamedTuple):
  """State of `scale_by_m3`.

  Attributes:
    count: Steps taken so far, int32.
    momentum: The fast momentum, in float32 or wider.
    slow: One `SlowMomentum` per slow clock.
    second_moment: Mean (form 'ema') or sum of squared gradients; () if unused.
  """

  count: jax.Array
  momentum: Any
  slow: tuple[SlowMomentum, ...]
  second_moment: Any


def m3(
  learning_rate: optax.ScalarOrSchedule,
  *,
  form: str = 'ema',
  decay: float = 0.95,
  slow_decay: float = 0.9,
  second_decay: float | None = 0.95,
  damping: float = 1.0,
  slow_every: int | Sequence[int] = 16,
  slow_weight: float | Sequence[float] = 0.5,
  nesterov: bool = True,
  coefficients: str | Sequence[float] = 'quintic',
  num_steps: int = 5,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  adam_decays: tuple[float, float] = (0.9, 0.95),
  matrices: Callable[[str, Any], bool] | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Multi-scale Momentum Muon: momenta on different clocks, orthogonalised.

  Form 'ema', with K = slow_every, NS = Newton-Schulz and t counted from 1:

  .. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    s_t &= \beta_3 s_{t-1} + (1 - \beta_3) \tfrac1K \sum_{i=t-K+1}^{t} g_i,
      \quad S = NS(s_t) \quad\text{if } t \equiv 0 \pmod K \\
    o_t &= (NS(m_t) + \alpha S) / (1 + \alpha) \\
    d_t &= o_t / \left(\sqrt{\hat v_t}
      + \text{damping}\, \text{rms}(g)_t + \epsilon\right) \\
    W_t &= W_{t-1} - \text{lr}\, 0.2 \sqrt{\max(m, n)}\; d_t\;
      \text{rms}(o_t) / \text{rms}(d_t)

  where rms(g) is the root of the mean of v over the matrix. S is used from the
  step after its update on, and is left out of o_t before the first. m_t enters
  with Nesterov's look-ahead, as in Muon. Several slow clocks add one s, S and
  weight each. Without slow clocks and second moment, this is Muon with
  consistent_rms=0.2.

  Orthogonalising has already made all directions alike, so dividing by the
  root of v alone goes too far: entries whose gradients are almost always zero
  get most of the update. Damping bounds that.

  Form 'paper' is Algorithm 1 to the letter: m, s and v are sums (`decay`,
  `slow_decay` and `second_decay` are the factors beta_1, beta_3 and beta_2 of
  their terms), W_t = W_{t-1} - lr (NS(m_t) + alpha S) / (sqrt(v_t) + epsilon),
  without look-ahead, correction or matching. It reads the sum of line 3 as that
  of the K gradients of the last period (print has K + 1). An orthogonalised
  matrix has entries near 1 / sqrt(max(m, n)) whatever the gradient's size, so
  that division by sqrt(v) makes steps grow as gradients shrink: hence form
  'ema'. Eq. 75 disagrees with Algorithm 1 in sign and indices; Algorithm 1 is
  followed. Print gives no constants.

  Args:
    learning_rate: Step size, a scalar or an optax schedule (per step).
    form: 'ema' or 'paper'.
    decay: Decay of the fast momentum; NL writes beta_1.
    slow_decay: Decay of a slow momentum per update of it; NL writes beta_3.
    second_decay: Decay of the second moment, NL's beta_2; None leaves it out.
    damping: Share of the gradient's RMS that joins its root second moment
      (form 'ema'); 0 is the printed division.
    slow_every: Steps between updates of the slow momentum, NL's f; a sequence
      makes several slow clocks, an empty one none.
    slow_weight: Weight of the slow direction, NL's alpha; one for all clocks or
      one each.
    nesterov: Whether the fast momentum looks ahead (form 'ema').
    coefficients: Polynomial of Newton-Schulz: 'cubic', 'quintic' or (a, b, c).
    num_steps: Steps of Newton-Schulz; NL writes T.
    epsilon: Added to divisors.
    weight_decay: Decoupled weight decay of all parameters.
    adam_learning_rate: Step size of parameters that are no matrices. None:
      learning_rate.
    adam_decays: Decay rates of Adam, which updates them.
    matrices: Function of (path, leaf) that tells which leaves are matrices or
      stacks of them ([..., m, n]). None: rank 2 and more, except if the path
      contains 'embed', 'lm_head', 'logits' or 'vocab'. It is not called for
      leaves of lower rank or without entries.
    mesh: Devices to spread stacked matrices over. None: the mesh of
      `jax.set_mesh`.

  Returns:
    An optax gradient transformation. Under `optax.inject_hyperparams`, form,
    slow_every, coefficients, num_steps and adam_decays are static arguments.

  Raises:
    ValueError: If a setting is out of its range, or at `init` if a parameter is
      not of a floating type.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, Algorithm 1.
  """
  settings.check_rate(learning_rate=learning_rate, weight_decay=weight_decay)
  if adam_learning_rate is None:
    adam_learning_rate = learning_rate
  settings.check_rate(adam_learning_rate=adam_learning_rate)
  is_matrix = matrices or _is_matrix

  def label(path, leaf):
    path = jax.tree_util.keystr(path)
    could_be = leaf.ndim >= 2 and leaf.size
    return 'm3' if could_be and is_matrix(path, leaf) else 'adam'

  partition = optax.partition(
    {
      'm3': optax.chain(
        scale_by_m3(
          form=form,
          decay=decay,
          slow_decay=slow_decay,
          second_decay=second_decay,
          damping=damping,
          slow_every=slow_every,
          slow_weight=slow_weight,
          nesterov=nesterov,
          coefficients=coefficients,
          num_steps=num_steps,
          epsilon=epsilon,
          mesh=mesh,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
      ),
      'adam': optax.adamw(
        adam_learning_rate, *adam_decays, weight_decay=weight_decay
      ),
    },
    lambda params: jax.tree_util.tree_map_with_path(label, params),
  )

  def init_fn(params):
    settings.check_params(params)
    return partition.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, partition.update)


def scale_by_m3(
  *,
  form: str = 'ema',
  decay: float = 0.95,
  slow_decay: float = 0.9,
  second_decay: float | None = 0.95,
  damping: float = 1.0,
  slow_every: int | Sequence[int] = 16,
  slow_weight: float | Sequence[float] = 0.5,
  nesterov: bool = True,
  coefficients: str | Sequence[float] = 'quintic',
  num_steps: int = 5,
  epsilon: float = 1e-8,
  mesh: jax.sharding.Mesh | None = None,
) -> optax.GradientTransformation:
  """Computes the direction of `m3` for trees in which every leaf is a matrix.

  Args:
    form: See `m3`.
    decay: See `m3`.
    slow_decay: See `m3`.
    second_decay: See `m3`.
    damping: See `m3`.
    slow_every: See `m3`.
    slow_weight: See `m3`.
    nesterov: See `m3`.
    coefficients: See `m3`.
    num_steps: See `m3`.
    epsilon: See `m3`.
    mesh: See `m3`.

  Returns:
    An optax gradient transformation; leaves have shape [..., m, n].

  Raises:
    ValueError: If a setting is out of its range.
  """
  settings.check_choice(('ema', 'paper'), form=form)
  settings.check_decay(
    decay=decay, slow_decay=slow_decay, second_decay=second_decay
  )
  settings.check_rate(epsilon=epsilon, damping=damping)
  settings.check_period(num_steps=num_steps)
  if isinstance(coefficients, str):
    settings.check_choice(newton_schulz.COEFFICIENTS, coefficients=coefficients)
  periods, weights = _slow_clocks(slow_every, slow_weight)
  is_ema = form == 'ema'
  add = _average if is_ema else _sum
  function = functools.partial(
    newton_schulz.orthogonalize,
    coefficients=coefficients,
    num_steps=num_steps,
    epsilon=epsilon,
  )

  def orthogonalize(tree):
    return jax.tree.map(
      lambda leaf: placement.map_stack(function, leaf, mesh), tree
    )

  def init_fn(params):
    settings.check_params(params)
    # A function: an array that stands in the state twice cannot be donated.
    zeros = lambda: jax.tree.map(_zeros, params)
    return M3State(
      count=jnp.zeros((), jnp.int32),
      momentum=zeros(),
      slow=tuple(SlowMomentum(zeros(), zeros()) for _ in periods),
      second_moment=() if second_decay is None else zeros(),
    )

  def update_fn(updates, state, params=None):
    del params
    count, step = state.count, (state.count + 1).astype(jnp.float32)
    gradients = jax.tree.map(
      lambda g, m: g.astype(m.dtype), updates, state.momentum
    )
    momentum = add(decay, state.momentum, gradients)
    ahead = momentum
    if is_ema and nesterov:
      ahead = _look_ahead(decay, momentum, gradients, step)
    direction = orthogonalize(ahead)

    is_known = [count >= period for period in periods]
    direction, total = _add_slow(direction, state.slow, weights, is_known)
    second_moment = state.second_moment
    if second_decay is not None:
      squares = jax.tree.map(jnp.square, gradients)
      second_moment = add(second_decay, second_moment, squares)
      if is_ema:
        unbiased = 1 - second_decay**step
        divided = _divide(direction, second_moment, unbiased, damping, epsilon)
        direction = jax.tree.map(_match_rms, divided, direction)
      else:
        direction = _divide(direction, second_moment, jnp.ones(()), 0, epsilon)
    if is_ema:
      direction = jax.tree.map(
        lambda d: d * (_scale(d) / total).astype(d.dtype), direction
      )
    update_slow = functools.partial(
      _update_slow, gradients, count, slow_decay, is_ema, orthogonalize
    )
    slow = tuple(map(update_slow, state.slow, periods))
    count = optax.safe_increment(count)
    new_state = M3State(count, momentum, slow, second_moment)
    return optax.tree.cast_like(direction, updates), new_state

  return optax.GradientTransformation(init_fn, update_fn)


def _add_slow(direction, slow, weights, is_known):
  """Adds the slow directions; returns the sum, and the sum of its weights."""
  total = jnp.ones(())
  for part, weight, known in zip(slow, weights, is_known, strict=True):
    direction = jax.tree.map(
      lambda d, s, w=weight: d + w * s, direction, part.direction
    )
    total = total + weight * known  # A direction is zero before its first.
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
    orthogonalize: Function of a tree of matrices.
    slow: The `SlowMomentum`.
    period: Steps between updates.

  Returns:
    The new `SlowMomentum`.
  """
  is_first = (count % period == 0) & is_ema
  keep = jnp.where(is_first, decay, 1.0)
  share = (1 - decay) / period if is_ema else decay
  momentum = jax.tree.map(
    lambda m, g: keep.astype(m.dtype) * m + share * g, slow.momentum, gradients
  )
  direction = jax.lax.cond(
    (count + 1) % period == 0,
    lambda momentum, direction: orthogonalize(momentum),
    lambda momentum, direction: direction,
    momentum,
    slow.direction,
  )
  return SlowMomentum(momentum, direction)


def _average(decay, averages, values):
  return jax.tree.map(
    lambda m, x: decay * m + (1 - decay) * x, averages, values
  )


def _sum(factor, sums, values):
  return jax.tree.map(lambda m, x: m + factor * x, sums, values)


def _look_ahead(decay, momentum, gradients, step):
  """Returns Nesterov's momentum of the next step, corrected for its bias."""
  ahead = decay / (1 - decay ** (step + 1))
  now = (1 - decay) / (1 - decay**step)
  return jax.tree.map(
    lambda m, g: ahead.astype(m.dtype) * m + now.astype(m.dtype) * g,
    momentum,
    gradients,
  )


def _divide(direction, second_moment, unbiased, damping, epsilon):
  """Divides by the root of the second moment and its damping."""

  def leaf(d, v):
    v = v / unbiased.astype(v.dtype)
    mean = jnp.mean(v, axis=(-2, -1), keepdims=True)
    return d / (jnp.sqrt(v) + damping * jnp.sqrt(mean) + epsilon)

  return jax.tree.map(leaf, direction, second_moment)


def _match_rms(x, y):
  """Scales every matrix of x to the RMS of the one in y."""
  return x * (_rms(y) / jnp.maximum(_rms(x), jnp.finfo(x.dtype).tiny))


def _rms(x):
  return jnp.sqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True))


def _scale(x):
  # An orthogonal matrix has RMS 1 / sqrt(max(m, n)).
  return jnp.asarray(_UPDATE_RMS * max(x.shape[-2:]) ** 0.5)


def _slow_clocks(slow_every, slow_weight):
  """Returns the periods and weights of the slow clocks, checked."""
  if isinstance(slow_every, numbers.Number):
    slow_every = (slow_every,)
  periods = tuple(slow_every)
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


def _is_matrix(path, leaf):
  del leaf
  return not any(name in path.lower() for name in _TABLES)


def _zeros(leaf):
  # Averages over many steps lose small gradients in bfloat16.
  return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
