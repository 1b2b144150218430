"""The optimisers that keep optax's contract, with rates that converge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers


def timescales(learning_rate, rule=optax.adam):
  """Makes two levels, the slow one on every second step."""
  return optimizers.multi_timescale(
    [
      optimizers.Level('fast', 1, rule(learning_rate)),
      optimizers.Level('slow', 2, rule(learning_rate)),
    ],
    lambda params: jax.tree.map(
      lambda leaf: 'slow' if leaf.ndim == 2 else 'fast', params
    ),
  )


def m3(learning_rate):
  """Makes M3 with the last two axes as matrices; the slow momentum is used."""
  numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
  return optimizers.m3(
    learning_rate,
    slow_every=2,
    ns_steps=2,
    adam_b2=0.95,
    dimension_numbers=lambda params: jax.tree.map(
      lambda leaf: numbers if leaf.ndim >= 2 else None, params
    ),
  )


# Name: factory of a learning rate, and a rate that converges.
OPTIMIZERS = {
  'dgd': (optimizers.dgd, 5e-4),
  'm3': (m3, 3e-3),
  'delta_momentum': (optimizers.delta_momentum, 1e-3),
  'preconditioned_momentum': (optimizers.preconditioned_momentum, 1e-3),
  'deep_momentum': (optimizers.deep_momentum, 1e-3),
  'multi_timescale': (timescales, 3e-3),
}
NAMES = tuple(OPTIMIZERS)
# DGD takes the energy of every map's inputs; nothing erased is energy 0.
NEEDS_ENERGY = ('dgd',)


def make(name, learning_rate=None):
  factory, rate = OPTIMIZERS[name]
  return factory(rate if learning_rate is None else learning_rate)


def extra(name, params):
  zeros = lambda leaf: jnp.zeros((), jnp.promote_types(leaf.dtype, jnp.float32))
  return {'energy': jax.tree.map(zeros, params)} if name in NEEDS_ENERGY else {}


def make_params(dtype=jnp.float32):
  return {
    'kernel': jnp.linspace(-1.0, 1.0, 24, dtype=dtype).reshape(4, 6),
    'stack': jnp.linspace(1.0, 2.0, 12, dtype=dtype).reshape(2, 2, 3),
    'bias': jnp.arange(1.0, 4.0, dtype=dtype),
    'scale': jnp.ones((), dtype),
  }


def make_gradients(params):
  return jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)


def types(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float64), np.asarray(b, np.float64), tolerance, tolerance
    ),
    actual,
    expected,
  )
