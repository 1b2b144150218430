"""Errors for settings and parameters that no optimiser can work with."""

import numbers

import jax
import jax.numpy as jnp


def check_rate(**settings):
  """Refuses a negative step size or weight, by its name.

  Schedules and traced values (as under `optax.inject_hyperparams`) pass: their
  values are not known yet.

  Args:
    **settings: Values by name.

  Raises:
    ValueError: If a number is negative or not finite.
  """
  for name, value in settings.items():
    if _is_known(value) and not 0 <= value < float('inf'):
      raise ValueError(f'{name}={value} must be a finite number of at least 0.')


def check_decay(**settings):
  """Refuses a decay rate outside [0, 1), by its name.

  Args:
    **settings: Values by name.

  Raises:
    ValueError: If a number is outside [0, 1).
  """
  for name, value in settings.items():
    if _is_known(value) and not 0 <= value < 1:
      raise ValueError(
        f'{name}={value} must be at least 0 and below 1; 0.9 is usual.'
      )


def check_period(**settings):
  """Refuses periods and counts that are not whole numbers from 1 up.

  Args:
    **settings: Values by name.

  Raises:
    ValueError: If one is not an integer or below 1.
  """
  for name, value in settings.items():
    if not isinstance(value, numbers.Integral) or value < 1:
      raise ValueError(f'{name}={value} must be a whole number of at least 1.')


def check_choice(choices, **settings):
  """Refuses a setting that is not one of the choices.

  Args:
    choices: The allowed values.
    **settings: Values by name.

  Raises:
    ValueError: If one is not among them.
  """
  for name, value in settings.items():
    if value not in choices:
      raise ValueError(f'{name}={value!r} is not one of {sorted(choices)}.')


def check_params(params):
  """Refuses parameters that are not of a real floating type.

  Args:
    params: Tree of arrays.

  Raises:
    ValueError: If one is integer, boolean or complex.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        f'Parameter {jax.tree_util.keystr(path)} has dtype {leaf.dtype}; only '
        'real floating types can be trained: leave it out with optax.masked.'
      )


def _is_known(value):
  """Whether it is a number, rather than a schedule or a traced value."""
  if isinstance(value, jax.Array):
    return not isinstance(value, jax.core.Tracer) and value.ndim == 0
  return isinstance(value, numbers.Real)
