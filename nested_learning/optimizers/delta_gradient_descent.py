"""Delta Gradient Descent: every linear map regresses on a target output."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from nested_learning.optimizers import capture
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
    return rule

  def labels(params):
    marks = maps(params) if callable(maps) else maps
    if marks is None:
      marks = jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    else:
      marks = trees.match(marks, params, 'dgd: maps')
    return jax.tree.map(lambda mark: 'dgd' if mark else 'fallback', marks)

  partition = optax.partition({'dgd': rule, 'fallback': fallback}, labels)

  def init_fn(params):
    settings.check_params(params)
    return partition.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, partition.update)


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
      dtype = trees.wide(g.dtype)
      # Energies count stacked maps along the leading axes, if any.
      e = jnp.reshape(e, jnp.shape(e) + (1,) * (g.ndim - jnp.ndim(e)))
      scale = jnp.asarray(size * pull, dtype) * e.astype(dtype)
      return (g.astype(dtype) / (1 + scale)).astype(g.dtype)

    return jax.tree.map(shorten, updates, energy), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def dgd_for_model(
  loss_fn: Callable[..., Any],
  model: Any,
  *args,
  learning_rate: optax.ScalarOrSchedule,
  target: str = 'corrected',
  erase: float = 1.0,
  fallback: optax.GradientTransformation | None = None,
  num_samples: int | Callable[..., Any] | None = None,
  has_aux: bool = False,
) -> tuple[Callable[..., Any], optax.GradientTransformationExtraArgs]:
  """Sets up Delta Gradient Descent for a model of Linen, NNX or plain JAX.

  With any function of a tree of parameters:

    value_and_grad, tx = dgd_for_model(loss_fn, params, batch, learning_rate=1.)
    loss, grads, extra = value_and_grad(params, batch)
    updates, state = tx.update(grads, state, params, **extra)

  With Linen's TrainState, whose own method passes no extra arguments:

    value_and_grad, tx = dgd_for_model(loss_fn, params, batch, learning_rate=1.)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    loss, grads, extra = value_and_grad(state.params, batch)
    state = apply_gradients(state, grads, extra)

  With an NNX module:

    value_and_grad, tx = dgd_for_model(loss_fn, model, batch, learning_rate=1.)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss, grads, extra = value_and_grad(model, batch)
    optimizer.update(model, grads, **extra)

  Args:
    loss_fn: Scalar function of (params, *args) or (module, *args).
    model: The parameters (or their shapes), or an NNX module.
    *args: Example arguments, arrays or shapes; used to find the maps.
    learning_rate: Step size, a scalar or an optax schedule.
    target: 'corrected' to train, 'printed' for the paper's rule; see `dgd`.
    erase: Weight of the erasing term of target 'printed'; 1 is the paper's.
    fallback: Rule for parameters that are not maps; see `dgd`.
    num_samples: See `value_and_delta_grad`.
    has_aux: Whether loss_fn returns (loss, anything).

  Returns:
    A function of (model, *args) that returns the loss, gradients and extra
    arguments, and the optax transformation that takes them.

  Raises:
    ValueError: If a rate is negative, or no parameter is found that multiplies
      data.

  Warns:
    UserWarning: If matrices enter operations through which their inputs cannot
      be captured (`custom_vjp`, `shard_map`, arithmetic between parameters);
      it names them. They get the fallback rule.
  """
  options = {
    'target': target,
    'erase': erase,
    'num_samples': num_samples,
    'has_aux': has_aux,
  }
  if isinstance(model, nnx.Module):
    value_and_grad = _nnx_value_and_grad(loss_fn, options)
    pure, params, rest = _nnx_pure(loss_fn, model, has_aux)
    args = (rest, *args)
  else:
    value_and_grad = capture.value_and_delta_grad(loss_fn, **options)
    pure, params = loss_fn, model
  found, lost = capture.trace_maps(pure, params, *args)
  listed = '; '.join(f'{path} ({", ".join(ops)})' for path, ops in lost.items())
  if not any(jax.tree.leaves(found)):
    if lost:
      raise ValueError(
        'dgd_for_model: no parameter could be followed to a product with data. '
        f'Matrices were lost in the operations in brackets: {listed}. Move '
        'these out of loss_fn, or use optax.sgd.'
      )
    raise ValueError(
      'dgd_for_model: loss_fn has no matrix product or convolution of a '
      'parameter with data, so there is nothing to erase; use optax.sgd.'
    )
  if lost:
    warnings.warn(
      'dgd_for_model: these matrices were not followed to a product with data, '
      'and get the fallback rule; in brackets the operations in which they '
      f'were lost: {listed}.',
      stacklevel=2,
    )
  # By path, so that the rules apply to any part of the parameters.
  known = {
    trees.path_name(path): mark
    for path, mark in jax.tree_util.tree_leaves_with_path(found)
  }

  def is_map(path, _):
    name = trees.path_name(path)
    if name not in known:
      raise ValueError(
        f'dgd_for_model did not get the parameter {name}; it got '
        f'{sorted(known)}: give it the tree that is trained.'
      )
    return known[name]

  maps = functools.partial(jax.tree_util.tree_map_with_path, is_map)
  tx = dgd(
    learning_rate, target=target, erase=erase, maps=maps, fallback=fallback
  )
  return value_and_grad, tx


def apply_gradients(state: Any, gradients: Any, extra: Any, **changes) -> Any:
  """Calls `TrainState.apply_gradients` with extra arguments for the rule.

  Args:
    state: A `flax.training.train_state.TrainState`, or one derived from it.
    gradients: As for its `apply_gradients`.
    extra: Extra arguments of its `tx`, by name.
    **changes: Further attributes to replace, as for its `apply_gradients`.

  Returns:
    The next state.
  """
  tx = state.tx
  update = functools.partial(tx.update, **extra)
  # Its own method calls tx.update without extra arguments.
  bound = state.replace(tx=optax.GradientTransformation(tx.init, update))
  return bound.apply_gradients(grads=gradients, **changes).replace(tx=tx)


def dgd_report(
  loss_fn: Callable[..., Any], model: Any, *args
) -> dict[str, str]:
  """Lists which rule of `dgd_for_model` each parameter gets.

  Args:
    loss_fn: As for `dgd_for_model`.
    model: As for `dgd_for_model`.
    *args: As for `dgd_for_model`.

  Returns:
    'dgd' or 'fallback' by the parameter's path.
  """
  if isinstance(model, nnx.Module):
    loss_fn, model, rest = _nnx_pure(loss_fn, model, False)
    args = (rest, *args)
  found = capture.find_maps(loss_fn, model, *args)
  return {
    jax.tree_util.keystr(path): 'dgd' if mark else 'fallback'
    for path, mark in jax.tree_util.tree_leaves_with_path(found)
  }


def _nnx_pure(loss_fn, model, has_aux):
  """Returns the loss as a function of (params, rest, *args), and both trees."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def pure(params, rest, *args):
    module = nnx.merge(graph, params, rest)
    outputs = loss_fn(module, *args)
    value, aux = outputs if has_aux else (outputs, None)
    return value, (aux, nnx.state(module, nnx.Not(nnx.Param)))

  return pure, params, rest


def _nnx_value_and_grad(loss_fn, options):
  """Returns `value_and_delta_grad` for a loss of an NNX module."""
  has_aux, num_samples = options['has_aux'], options['num_samples']
  if callable(num_samples):
    options = {**options, 'num_samples': lambda _, *args: num_samples(*args)}

  def value_and_grad(model, *args):
    pure, params, rest = _nnx_pure(loss_fn, model, has_aux)
    (value, (aux, rest)), gradients, extra = capture.value_and_delta_grad(
      pure, **{**options, 'has_aux': True}
    )(params, rest, *args)
    nnx.update(model, rest)
    return (value, aux) if has_aux else value, gradients, extra

  return value_and_grad
