"""Delta Gradient Descent: every linear map regresses on a target output."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning.optimizers import settings
from nested_learning.optimizers import trees


class DgdState(NamedTuple):
  """State of `scale_by_dgd`.

  Attributes:
    count: Steps taken so far, int32.
  """

  count: jax.Array


def dgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  target: str = 'corrected',
  erase: float = 1.0,
  maps: Any | Callable[[Any], Any] | None = None,
  fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Delta Gradient Descent: a map regresses on a target for its inputs.

  For a linear map W with one input x, and e = dL/dy the gradient of the loss at
  its output, one step solves

  .. math::
    W_{t+1} = \operatorname*{argmin}_W \tfrac12 |W x - u|^2
      + \tfrac{1}{2\, \text{lr}} |W - W_t|^2 .

  Target 'corrected' is the output after a gradient step on it,
  :math:`u = W_t x - e`. With D = W - W_t, the derivative vanishes at
  :math:`D (x x^\top + I / \text{lr}) = -e x^\top`. x is an eigenvector of the
  matrix in brackets, with eigenvalue :math:`|x|^2 + 1 / \text{lr}`, so that

  .. math::
    W_{t+1} = W_t - \frac{\text{lr}}{1 + \text{lr}\, |x|^2}\, e x^\top ,

  which is normalised least mean squares. The step is zero where the gradient
  e x^T is: the fixed points are those of the loss.

  Target 'printed' is the paper's :math:`u = -e`, which also erases the output:

  .. math::
    W_{t+1} = W_t - \frac{\text{lr}}{1 + \text{lr}\, \text{erase}\, |x|^2}
      \left(\text{erase}\; W_t x x^\top + e x^\top\right) ,

  with erase 1. It descends the loss plus erase / 2 |W x|^2 per map: its fixed
  point is W x = -e / erase, not a minimum of the loss.

  With N samples, x x^T and e x^T are means over samples, and |x|^2 is the
  energy, the mean of |x_s|^2. The exact solution has
  :math:`(I + \text{lr}\, C)^{-1}` in place of one over 1 + lr |x|^2, where C is
  the mean of x_s x_s^T. The energy is the trace of C and bounds its largest
  eigenvalue. So the step is shorter than the exact one in every direction, and
  no direction is pulled past its target.

  Use 'corrected' to train: it is gradient descent whose step adapts to the size
  of each map's inputs. The output for a single input moves by less than its
  gradient e, however large the learning rate. Use 'printed' to reproduce the
  paper, or as a strong regulariser that keeps outputs small; a lower `erase`
  weakens it.

  The gradients passed to `update` are those of `dgd_for_model` or
  `value_and_delta_grad` with the same target, and the extra argument `energy`
  is theirs. With target 'printed' and plain gradients, pass the extra argument
  `projection`, the W x x^T of every map, as well. Gradients may be averaged
  over batches if the extra arguments are, too: see `accumulate` of
  `multi_timescale` (`optax.MultiSteps` passes on those of the last batch
  alone).

  Deviations from print (target 'printed'): NL eq. 57 has lr / (1 + lr), which
  is exact at |x| = 1 only; NL 114 prints u with the other sign, and 119-120 the
  norm of x where its square is meant.

  Args:
    learning_rate: Step size lr, a scalar or an optax schedule (per step).
    target: 'corrected' or 'printed'.
    erase: Weight of the erasing term of target 'printed', as given to the
      capture; 0 is plain gradient descent.
    maps: Tree of bools that marks the parameters with captured inputs, or a
      function from the parameters to one. None: those of rank 2 or more. Used
      with a fallback alone.
    fallback: Rule for all other parameters. None: `optax.sgd(learning_rate)`,
      which is the rule at energy 0.

  Returns:
    An optax gradient transformation with the extra arguments `energy` (tree
    like the parameters: for each a scalar, an array over its leading axes, or
    an array of its shape) and, if the gradients do not contain it,
    `projection`.

  Raises:
    ValueError: If a rate is negative, the target is unknown, erase is set for
      target 'corrected', a parameter is not of a floating type, or `update` is
      called without `energy` or with one of another tree.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 56-57 and
    112-121.
  """
  settings.check_rate(learning_rate=learning_rate)
  rule = optax.chain(
    scale_by_dgd(learning_rate, target=target, erase=erase),
    optax.scale_by_learning_rate(learning_rate),
  )
  if fallback is None:
    return settings.check_trees(rule)
  settings.check_transformation(fallback=fallback)

  def labels(params):
    marks = maps(params) if callable(maps) else maps
    if marks is None:
      marks = jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    else:
      marks = trees.match(marks, params, 'dgd: maps')
    return jax.tree.map(lambda mark: 'dgd' if mark else 'fallback', marks)

  partition = optax.partition({'dgd': rule, 'fallback': fallback}, labels)

  return settings.check_trees(partition)


def scale_by_dgd(
  step_size: optax.ScalarOrSchedule,
  *,
  target: str = 'corrected',
  erase: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """Computes the direction of `dgd`: the step divided by its learning rate.

  The proximal step size is part of the rule, which divides by
  1 + step_size |x|^2; the learning rate is applied by
  `optax.scale_by_learning_rate`. With both alike, the two make `dgd`. Other
  transformations may stand between them, such as `optax.trace(0.9)` for
  momentum or `optax.scale_by_adam()`.

  Args:
    step_size: Step size lr of the proximal problem, a scalar or a schedule.
    target: See `dgd`.
    erase: See `dgd`.

  Returns:
    An optax gradient transformation with the extra arguments of `dgd`.
    Parameters with energy 0 keep their gradients.

  Raises:
    ValueError: See `dgd`.
  """
  settings.check_rate(step_size=step_size)
  settings.check_target(target, erase)
  pull = erase if target == 'printed' else 1.0

  def init_fn(params):
    settings.check_params(params)
    return DgdState(jnp.zeros((), jnp.int32))

  def update_fn(
    updates, state, params=None, *, energy=None, projection=None, **extra_args
  ):
    del params, extra_args
    size = settings.rate_at(step_size, state.count)
    state = DgdState(optax.safe_increment(state.count))
    if not jax.tree.leaves(updates):
      return updates, state
    if energy is None:
      raise ValueError(
        'dgd needs the extra argument energy=<mean of |x|^2 of every map>: '
        'take (loss, gradients, extra) from the value_and_grad of '
        'dgd_for_model and call tx.update(gradients, state, params, **extra), '
        'or apply_gradients(train_state, gradients, extra).'
      )
    # Wrappers such as optax.masked and optax.partition cut the updates to a
    # part of the parameters, and by default not the extra arguments.
    energy = trees.match(energy, updates, 'dgd: energy')
    if projection is not None:
      if target != 'printed':
        raise ValueError(
          f'dgd with {target=} erases nothing and takes no projection: leave '
          "it out, or give target='printed'."
        )
      projection = trees.match(projection, updates, 'dgd: projection')
      updates = jax.tree.map(
        lambda g, p: g + (erase * p).astype(g.dtype), updates, projection
      )

    def shorten(g, e):
      if jnp.shape(e) != g.shape[: jnp.ndim(e)]:
        raise ValueError(
          f'dgd: energy of shape {jnp.shape(e)} does not fit a parameter of '
          f'shape {g.shape}: give a number, or an array over its leading axes.'
        )
      dtype = trees.wide(g.dtype)
      # Energies count stacked maps along the leading axes, if any.
      e = jnp.reshape(e, jnp.shape(e) + (1,) * (g.ndim - jnp.ndim(e)))
      scale = jnp.asarray(size * pull, dtype) * e.astype(dtype)
      return (g.astype(dtype) / (1 + scale)).astype(g.dtype)

    return jax.tree.map(shorten, updates, energy), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
