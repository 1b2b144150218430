"""Multi-scale Momentum Muon of whole models; Adam for what is no matrix."""

from collections.abc import Callable
from typing import Any
import warnings

import jax
import optax

from nested_learning.optimizers import axes as axes_lib
from nested_learning.optimizers import multi_scale_momentum
from nested_learning.optimizers import settings
from nested_learning.optimizers import trees
from nested_learning.optimizers.tracing import matrices


def m3(
  learning_rate: optax.ScalarOrSchedule,
  *,
  beta: jax.typing.ArrayLike = 0.95,
  slow_every: int | None = 16,
  slow_weight: jax.typing.ArrayLike = 0.5,
  slow_decay: jax.typing.ArrayLike = 0.9,
  second_decay: jax.typing.ArrayLike | None = 0.95,
  ns_steps: jax.typing.ArrayLike = 5,
  eps: jax.typing.ArrayLike = 1e-8,
  nesterov: bool = True,
  consistent_rms: jax.typing.ArrayLike | None = 0.2,
  mu_dtype: jax.typing.DTypeLike | None = None,
  weight_decay: jax.typing.ArrayLike = 0.0,
  weight_decay_mask: Any | Callable[[Any], Any] | None = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  adam_b1: jax.typing.ArrayLike = 0.9,
  adam_b2: jax.typing.ArrayLike = 0.999,
  adam_eps_root: jax.typing.ArrayLike = 0.0,
  adam_weight_decay: jax.typing.ArrayLike = 0.0,
  dimension_numbers: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Multi-scale Momentum Muon: momenta on different clocks, orthogonalised.

  With K = slow_every, NS = Newton-Schulz, t counted from 1, and a parameter
  seen as the matrix [fan_in, fan_out] that its dimension numbers describe:

  .. math::
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
    s_t &= \beta_3 s_{t-1} + (1 - \beta_3) \tfrac1K \sum_{i=t-K+1}^{t} g_i,
      \quad S = NS(s_t) \quad\text{if } t \equiv 0 \pmod K \\
    o_t &= (NS(m_t) + \alpha S) / (1 + \alpha) \\
    d_t &= o_t / \left(\sqrt{\hat v_t} + \text{rms}(g)_t + \epsilon\right) \\
    W_t &= W_{t-1} - \text{lr}\; \text{consistent_rms}
      \sqrt{\max(\text{fan_in}, \text{fan_out})}\; d_t\;
      \text{rms}(o_t) / \text{rms}(d_t)

  where rms(g) is the root of the mean of v over the matrix. S is used from the
  step after its update on, and is left out of o_t before the first. m_t enters
  with Nesterov's look-ahead, as in Muon. With slow_every=None and
  second_decay=None, this is `optax.contrib.muon` with consistent_rms=0.2, whose
  arguments have the same names here.

  `scale_by_m3` has further settings, and the form of the paper.

  Args:
    learning_rate: Step size, a scalar or an optax schedule (per step).
    beta: Decay of the fast momentum; NL writes beta_1.
    slow_every: Steps between updates of the slow momentum, NL's f; None leaves
      the slow momentum out.
    slow_weight: Weight of the slow direction, NL's alpha.
    slow_decay: Decay of the slow momentum per update of it; NL writes beta_3.
    second_decay: Decay of the second moment, NL's beta_2; None leaves it out.
    ns_steps: Steps of Newton-Schulz; NL writes T.
    eps: Added to divisors, of Adam as well.
    nesterov: Whether momenta look ahead, that of Adam as well.
    consistent_rms: Root mean square of an update at a learning rate of 1; with
      0.2, learning rates of AdamW fit. None scales by the root of
      max(1, fan_out / fan_in) instead.
    mu_dtype: Type of the momenta and the second moment. The slow momentum
      stays in float32: it adds shares of 1 / K, which bfloat16 would lose. Use
      bfloat16 with decays of at most 0.99. None: float32, or the parameter's
      type if it is wider.
    weight_decay: Decoupled weight decay of matrices.
    weight_decay_mask: Tree of bools (or a prefix of one) that marks the
      parameters that decay, or a function from the parameters to one. None:
      all. It holds for `adam_weight_decay` as well.
    adam_learning_rate: Step size of Adam, which updates parameters that are no
      matrices. None: learning_rate.
    adam_b1: Decay of Adam's momentum.
    adam_b2: Decay of Adam's second moment.
    adam_eps_root: Added under Adam's root.
    adam_weight_decay: Decoupled weight decay of parameters with Adam.
    dimension_numbers: Tree of `optax.contrib.MuonDimensionNumbers` (or a prefix
      of one), None for parameters that get Adam; or a function from the
      parameters to one. See `optimizers.dimension_numbers` and `m3_for_model`.
      None: parameters of rank 2 called 'kernel' are matrices.

  Returns:
    An optax gradient transformation. Under `optax.inject_hyperparams`,
    functions other than schedules must be static arguments.

  Raises:
    ValueError: If a setting is out of its range, or at `init` if dimension
      numbers or the mask do not fit the parameters or a parameter is not of a
      floating type.

  Warns:
    UserWarning: At `init`, if dimension_numbers is None and Adam updates
      parameters of rank 2 or more.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, Algorithm 1.
    Liu et al., Muon is Scalable for LLM Training, arXiv:2502.16982, 2025
    (consistent_rms).
  """
  if adam_learning_rate is None:
    adam_learning_rate = learning_rate
  settings.check_rate(
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    adam_learning_rate=adam_learning_rate,
    adam_eps_root=adam_eps_root,
    adam_weight_decay=adam_weight_decay,
  )
  settings.check_decay(adam_b1=adam_b1, adam_b2=adam_b2)
  numbers = dimension_numbers
  if numbers is None:
    numbers = axes_lib.default_numbers

  def labels(params):
    # Parameters without entries are no matrices.
    return jax.tree.map(
      lambda leaf, axes: 'm3' if axes is not None and leaf.size else 'adam',
      params,
      axes_lib.find(numbers, params),
    )

  partition = optax.partition(
    {
      'm3': optax.chain(
        multi_scale_momentum.scale_by_m3(
          beta=beta,
          slow_every=slow_every,
          slow_weight=slow_weight,
          slow_decay=slow_decay,
          second_decay=second_decay,
          ns_steps=ns_steps,
          eps=eps,
          nesterov=nesterov,
          consistent_rms=consistent_rms,
          mu_dtype=mu_dtype,
          dimension_numbers=numbers,
        ),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
      ),
      'adam': settings.allow_promotion(
        optax.adamw(
          adam_learning_rate,
          b1=adam_b1,
          b2=adam_b2,
          eps=eps,
          eps_root=adam_eps_root,
          mu_dtype=mu_dtype,
          weight_decay=adam_weight_decay,
          mask=weight_decay_mask,
          nesterov=nesterov,
        )
      ),
    },
    labels,
  )

  checked = settings.check_trees(partition)

  def init_fn(params):
    settings.check_params(params)
    if weight_decay_mask is not None and jax.tree.leaves(params):
      is_function = callable(weight_decay_mask)
      mask = weight_decay_mask(params) if is_function else weight_decay_mask
      trees.broadcast(mask, params, 'weight_decay_mask')
    if dimension_numbers is None:
      _warn_of_unknown(params, labels(params))
    return checked.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, checked.update)


def m3_for_model(
  loss_fn: Callable[..., Any],
  params: Any,
  *args,
  learning_rate: optax.ScalarOrSchedule,
  **m3_settings,
) -> optax.GradientTransformationExtraArgs:
  """Makes `m3` for a model of Linen, NNX or plain JAX; finds its matrices.

    tx = m3_for_model(loss_fn, params, batch, learning_rate=1e-3)
    opt_state = tx.init(params)

  With an NNX module:

    tx = m3_for_model(loss_fn, module, batch, learning_rate=1e-3)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

  `parameter_report` lists what it finds. Under `optax.inject_hyperparams`, use
  `m3` with `dimension_numbers` instead.

  Args:
    loss_fn: Function of (params, *args), or of (module, *args) for an NNX
      module; its outputs may be anything.
    params: Tree of parameters or of their shapes, or an NNX module.
    *args: Further arguments of loss_fn: arrays or shapes.
    learning_rate: Step size, a scalar or an optax schedule (per step).
    **m3_settings: Further arguments of `m3`.

  Returns:
    An optax gradient transformation.

  Raises:
    ValueError: If no parameter is a matrix, or one is used as two different
      ones, or a setting is out of its range.
  """
  numbers = matrices.dimension_numbers(loss_fn, params, *args)
  return m3(learning_rate, dimension_numbers=numbers, **m3_settings)


def _warn_of_unknown(params, labels):
  """Warns of parameters that Adam updates because nothing is known of them."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  names = [
    trees.path_name(path)
    for (path, leaf), label in zip(leaves, jax.tree.leaves(labels), strict=True)
    if leaf.ndim >= 2 and leaf.size and label == 'adam'
  ]
  if not names:
    return
  shown = ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')
  warnings.warn(
    'm3: without dimension_numbers, parameters of rank 2 called kernel are '
    f'matrices and all others get Adam. {len(names)} of them have rank 2 or '
    f'more: {shown}. Use m3_for_model(loss_fn, params, *args, '
    'learning_rate=...), or give dimension_numbers.',
    stacklevel=3,
  )
