"""Sets up Delta Gradient Descent for models of Linen, NNX and plain JAX."""

from collections.abc import Callable
import functools
from typing import Any
import warnings

from flax import nnx
import jax
import optax

from nested_learning.optimizers import delta_gradient_descent
from nested_learning.optimizers.tracing import capture
from nested_learning.optimizers.tracing import interpreter


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
  else:
    value_and_grad = capture.value_and_delta_grad(loss_fn, **options)
  pure, params, rest = interpreter.as_pure(loss_fn, model, has_aux)
  found, lost = capture.trace_maps(pure, params, *rest, *args)
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
  tx = delta_gradient_descent.dgd(
    learning_rate, target=target, erase=erase, maps=found, fallback=fallback
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


def _nnx_value_and_grad(loss_fn, options):
  """Returns `value_and_delta_grad` for a loss of an NNX module."""
  has_aux, num_samples = options['has_aux'], options['num_samples']
  if callable(num_samples):
    options = {**options, 'num_samples': lambda _, *args: num_samples(*args)}

  def value_and_grad(model, *args):
    pure, params, rest = interpreter.as_pure(loss_fn, model, has_aux)
    (value, (aux, after)), gradients, extra = capture.value_and_delta_grad(
      pure, **{**options, 'has_aux': True}
    )(params, *rest, *args)
    nnx.update(model, after)
    return (value, aux) if has_aux else value, gradients, extra

  return value_and_grad
