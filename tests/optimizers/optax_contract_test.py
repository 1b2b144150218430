"""Runs optax's own tests of optimisers over all of ours, unchanged.

The source of each test file is read from the installed package. Its lists of
optimisers are replaced by ours before its test class is made.
"""

import ast
import importlib.util
import pathlib
from unittest import mock

from absl.testing import absltest
import jax
import jax.numpy as jnp
import optax

from nested_learning import optimizers


def with_energy(
  factory,
):
  """Passes the energy of every map to DGD, as optax's tests do for sophia."""

  def make(learning_rate: optax.ScalarOrSchedule):
    tx = factory(learning_rate)

    def update(updates, state, params=None, **extra_args):
      energy = jax.tree.map(lambda g: jnp.ones((), jnp.float32), updates)
      return tx.update(updates, state, params, energy=energy, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)

  return make


def slow_level(learning_rate: optax.ScalarOrSchedule):
  """Makes a level that updates on every second step."""
  level = optimizers.Level('slow', 2, optax.adam(learning_rate))
  return optimizers.multi_timescale([level], 'slow')


def m3_of_matrices(learning_rate: optax.ScalarOrSchedule):
  """Makes M3 that orthogonalises all parameters of rank 2 or more."""
  numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
  return optimizers.m3(
    learning_rate,
    dimension_numbers=lambda params: jax.tree.map(
      lambda leaf: numbers if leaf.ndim >= 2 else None, params
    ),
  )


FACTORIES = {
  'm3': optimizers.m3,
  'm3_of_matrices': m3_of_matrices,
  'dgd': with_energy(optimizers.dgd),
  'delta_momentum': optimizers.delta_momentum,
  'preconditioned_momentum': optimizers.preconditioned_momentum,
  'deep_momentum': optimizers.deep_momentum,
  'multi_timescale': slow_level,
}
# The rate of optax's own Muon, and 1e-3 for gradient descent on a curvature of
# 1,000. There are no other settings: all are at their defaults.
RATES = dict.fromkeys(FACTORIES, 1e-2) | {'dgd': 1e-3}
# As in optax's list.
LISTED = tuple(
  {
    'opt_name': name,
    'opt_kwargs': {'learning_rate': rate},
    'wrapper_name': None,
    'wrapper_kwargs': None,
  }
  for name, rate in RATES.items()
)


def load(name, **replaced):
  """Executes a test module of optax with other optimisers.

  Args:
    name: Its name.
    **replaced: Values by the global name that they replace; set before the
      first class, which is made from them.

  Returns:
    Its test classes, by name.
  """
  path = pathlib.Path(importlib.util.find_spec(name).origin)
  body = ast.parse(path.read_text(), str(path)).body
  first = next(i for i, x in enumerate(body) if isinstance(x, ast.ClassDef))
  names = {'__name__': f'{__name__}.{path.stem}', '__file__': str(path)}
  for nodes, values in ((body[:first], replaced), (body[first:], {})):
    exec(compile(ast.Module(nodes, []), str(path), 'exec'), names)
    assert set(values) <= set(names), f'{name} has other globals now.'
    names.update(values)
  return {
    key: value
    for key, value in names.items()
    if isinstance(value, type) and issubclass(value, absltest.TestCase)
  }


ContribTest = load(
  'optax.contrib._common_test',
  _MAIN_OPTIMIZERS_UNDER_TEST=LISTED,
  _ALL_OPTIMIZERS_UNDER_TEST=LISTED,
  _get_opt_factory=FACTORIES.__getitem__,
)['ContribTest']


class ShardingTest(
  load(
    'optax._src.sharding_test',
    OPTIMIZERS={name: make(RATES[name]) for name, make in FACTORIES.items()},
  )['ShardingTest']
):
  def setUp(self):
    super().setUp()
    # Versions are compared as text there: '0.10' is below '0.7.2', and skipped.
    self.enter_context(mock.patch.object(jax, '__version__', '0.9'))
