"""Checks the settings and parameters of optimisers.

Errors are of type ValueError, as in optax.
"""

import numbers

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning.optimizers import trees


def rate_at(
  learning_rate: optax.ScalarOrSchedule, count: jax.Array
) -> jax.typing.ArrayLike:
  """Returns the learning rate after `count` steps."""
  return learning_rate(count) if callable(learning_rate) else learning_rate


def allow_promotion(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Lets a transformation of optax run under strict dtype promotion.

  Adam and RMSProp raise their decay to an int32 count, which
  `jax.numpy_dtype_promotion('strict')` refuses.

  Args:
    tx: A transformation without extra arguments.

  Returns:
    The transformation, under standard promotion.
  """
  standard = jax.numpy_dtype_promotion('standard')

  def init_fn(params):
    with standard:
      return tx.init(params)

  def update_fn(updates, state, params=None):
    with standard:
      return tx.update(updates, state, params)

  return optax.GradientTransformation(init_fn, update_fn)


def check_trees(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Checks the parameters and gradients that a transformation is given.

  Args:
    tx: The transformation.

  Returns:
    The transformation. Its `init` refuses parameters that are not of a real
    floating type, and its `update` gradients that are not like the parameters.
  """
  tx = optax.with_extra_args_support(tx)

  def init_fn(params):
    check_params(params)
    return tx.init(params)

  def update_fn(updates, state, params=None, **extra_args):
    if params is not None:
      trees.check_like(updates, params, 'the parameters')
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def is_known(value):
  """Returns whether a setting is a number, not a schedule or traced value.

  Under `optax.inject_hyperparams`, all numbers are traced.
  """
  if isinstance(value, jax.Array):
    return not isinstance(value, jax.core.Tracer) and value.ndim == 0
  return isinstance(value, numbers.Real)


def check_rate(**settings):
  """Checks that step sizes and weights are finite and not negative.

  Schedules and traced values pass, since their values are not known yet.

  Args:
    **settings: Values by name.

  Raises:
    ValueError: If one is no number, or negative, or not finite.
  """
  for name, value in settings.items():
    _check_number(name, value)
    if is_known(value) and not 0 <= value < float('inf'):
      raise ValueError(f'{name}={value} must be a finite number of at least 0.')


def check_decay(**settings):
  """Checks that decay rates are in [0, 1).

  Args:
    **settings: Values by name.

  Raises:
    ValueError: If one is no number, or outside [0, 1).
  """
  for name, value in settings.items():
    _check_number(name, value)
    if is_known(value) and not 0 <= value < 1:
      raise ValueError(
        f'{name}={value} must be at least 0 and below 1; 0.9 is usual.'
      )


def check_dtype(**settings):
  """Checks that types of a state are real floating types, or None.

  Args:
    **settings: Types, or their names, by name.

  Raises:
    ValueError: If one is another type, or no type.
  """
  for name, value in settings.items():
    try:
      fine = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
      fine = False
    if not fine:
      raise ValueError(
        f'{name}={value!r} must be a floating type, such as "bfloat16", or '
        'None.'
      )


def check_transformation(**settings):
  """Checks that settings are optax transformations.

  Args:
    **settings: Values by name.

  Raises:
    ValueError: If one has no `init` and `update`.
  """
  for name, value in settings.items():
    if not (hasattr(value, 'init') and hasattr(value, 'update')):
      raise ValueError(
        f'{name}={value!r} must be an optax transformation, such as '
        'optax.adam(1e-3).'
      )


def check_period(**settings):
  """Checks that periods and counts are whole numbers of at least 1.

  Traced values pass.

  Args:
    **settings: Values by name.

  Raises:
    ValueError: If one is not an integer or below 1.
  """
  for name, value in settings.items():
    if isinstance(value, jax.Array) and jnp.issubdtype(
      value.dtype, jnp.integer
    ):
      fine = not is_known(value) or value >= 1
    else:
      fine = isinstance(value, numbers.Integral) and value >= 1
    if not fine:
      raise ValueError(f'{name}={value} must be a whole number of at least 1.')


def check_choice(choices, **settings):
  """Checks that settings are among the allowed values.

  Args:
    choices: The allowed values.
    **settings: Values by name.

  Raises:
    ValueError: If one is not among them.
  """
  for name, value in settings.items():
    if value not in choices:
      raise ValueError(f'{name}={value!r} is not one of {sorted(choices)}.')


def check_target(target, erase):
  """Checks the target of Delta Gradient Descent, and the weight of its term.

  Args:
    target: The target.
    erase: Weight of the erasing term.

  Raises:
    ValueError: If the target is unknown, or the weight is negative or has no
      meaning for the target.
  """
  check_choice(('corrected', 'printed'), target=target)
  check_rate(erase=erase)
  if target == 'corrected' and is_known(erase) and erase != 1:
    raise ValueError(
      f'{erase=} weighs the erasing term, which target={target!r} does not '
      "have: give target='printed' as well, or leave erase out."
    )


def check_params(params):
  """Checks that parameters are of a real floating type.

  Args:
    params: Tree of arrays.

  Raises:
    ValueError: If one is integer, boolean or complex, or no array.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not hasattr(leaf, 'dtype'):
      raise ValueError(
        f'Parameter {trees.path_name(path)} is {leaf!r}, which is no array: '
        'make it one with jnp.asarray.'
      )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f'Parameter {trees.path_name(path)} has dtype {leaf.dtype}; only '
        'real floating types can be trained: leave it out with optax.masked.'
      )


def _check_number(name, value):
  """Refuses what is neither a number, an array nor a schedule."""
  is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
  if not (is_array or callable(value) or isinstance(value, numbers.Real)):
    raise ValueError(f'{name}={value!r} must be a number.')
