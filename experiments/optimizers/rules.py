"""Defines the optimisers that the experiments compare, and their search.

Every optimiser gets the same grid of learning rates, initial parameters and
batches.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from nested_learning import optimizers

# Rate of Adam for embeddings, biases and norms under DGD; the rate of the maps
# does not suit them.
_FALLBACK_RATE = 3e-3

_TABLES = ('embed', 'lm_head', 'logits', 'vocab')


def _dimension_numbers(params):
  """Returns the leaves that Muon and M3 treat as matrices."""

  def axes(path, leaf):
    name = jax.tree_util.keystr(path).lower()
    if leaf.ndim < 2 or any(table in name for table in _TABLES):
      return None
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

  return jax.tree_util.tree_map_with_path(axes, params)


_m3 = functools.partial(
  optimizers.m3, adam_b2=0.95, dimension_numbers=_dimension_numbers
)
RULES = {
  'gradient descent': optax.sgd,
  'momentum': lambda rate: optax.sgd(rate, momentum=0.9),
  'delta momentum': optimizers.delta_momentum,
  'preconditioned momentum': optimizers.preconditioned_momentum,
  'deep momentum': optimizers.deep_momentum,
  'Adam': lambda rate: optax.adam(rate, 0.9, 0.95),
  'Muon': lambda rate: optax.contrib.muon(
    rate,
    consistent_rms=0.2,
    adam_b2=0.95,
    muon_weight_dimension_numbers=_dimension_numbers,
  ),
  'M3': _m3,
  'M3, no second moment': functools.partial(_m3, second_decay=None),
}
# Weights of the erasing term: the paper's, and a light one.
DGD = {'DGD': 1.0, 'DGD, erase 0.01': 0.01}
NAMES = (*RULES, *DGD)


class Sweep(NamedTuple):
  """Trainings with one optimiser, at every rate and with every seed.

  Attributes:
    rates: [rate]
    losses: [rate, seed, step], the loss before each step.
    params: Parameters after the last step; leaves [rate, seed, ...].
    path: Parameters before each step, leaves [rate, seed, step, ...]; None
      unless requested.
  """

  rates: np.ndarray
  losses: np.ndarray
  params: Any
  path: Any


def sweep(
  name: str,
  loss_fn: Callable[[Any, Any], jax.Array],
  params: Any,
  batches: Any,
  *,
  rates: Sequence[float],
  keep_path: bool = False,
) -> Sweep:
  """Trains with one optimiser at all rates, decayed linearly to zero.

  Args:
    name: One of `NAMES`.
    loss_fn: Function of (params, batch).
    params: Initial parameters; leaves [seed, ...].
    batches: Leaves [step, ...].
    rates: Learning rates.
    keep_path: Whether to return the parameters of every step.

  Returns:
    The losses and parameters.
  """
  num_steps = jax.tree.leaves(batches)[0].shape[0]
  num_seeds = jax.tree.leaves(params)[0].shape[0]
  batches = [
    jax.tree.map(lambda x, i=i: x[i], batches) for i in range(num_steps)
  ]
  seeds = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(num_seeds)]

  def make(rate):
    schedule = optax.linear_schedule(rate, 0.0, num_steps)
    return make_optimizer(name, schedule, loss_fn, seeds[0], batches[0])

  value_and_grad = compile_gradient(name, loss_fn)
  init = jax.jit(lambda params: make(0.0).init(params))

  @functools.partial(jax.jit, donate_argnums=2)
  def update(rate, gradients, state, params, extra):
    updates, state = make(rate).update(gradients, state, params, **extra)
    return optax.apply_updates(params, updates), state

  def train(rate, params):
    state, losses, path = init(params), [], []
    for batch in batches:
      if keep_path:
        path.append(params)
      loss, gradients, extra = value_and_grad(params, batch)
      params, state = update(rate, gradients, state, params, extra)
      losses.append(loss)
    return np.array(losses), params, _stack(path) if keep_path else None

  runs = [_stack([train(rate, seed) for seed in seeds]) for rate in rates]
  losses, params, path = _stack(runs)
  return Sweep(np.array(rates), losses, params, path)


def measure(evaluate: Callable[[Any], Any], params: Any) -> Any:
  """Evaluates the parameters of a sweep.

  Args:
    evaluate: Compiled function from one model's parameters to a tree of
      numbers.
    params: Leaves [rate, seed, ...].

  Returns:
    The tree, with leaves [rate, seed].
  """
  num_rates, num_seeds = jax.tree.leaves(params)[0].shape[:2]

  def at(rate, seed):
    return evaluate(_at(params, (rate, seed)))

  rows = [[at(i, j) for j in range(num_seeds)] for i in range(num_rates)]
  return _stack([_stack(row) for row in rows])


def _at(tree, index):
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _stack(trees):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def compile_gradient(name: str, loss_fn: Callable[[Any, Any], jax.Array]):
  """Compiles the gradients for an optimiser; most of them share one program.

  Args:
    name: One of `NAMES`.
    loss_fn: Function of (params, batch).

  Returns:
    Function from (params, batch) to (loss, gradients, extra arguments).
  """
  return _compile_gradient(loss_fn, DGD.get(name))


@functools.lru_cache(maxsize=4)
def _compile_gradient(loss_fn, erase):
  if erase is not None:
    return jax.jit(
      optimizers.value_and_delta_grad(loss_fn, target='printed', erase=erase)
    )
  plain = jax.value_and_grad(loss_fn)
  return jax.jit(lambda params, batch: (*plain(params, batch), {}))


def make_optimizer(name, rate, loss_fn, params, batch):
  """Makes an optimiser.

  Args:
    name: One of `NAMES`.
    rate: Learning rate or schedule.
    loss_fn: Function of (params, batch), in which DGD finds the maps.
    params: Example parameters.
    batch: Example batch.

  Returns:
    An optax transformation.
  """
  if name not in DGD:
    return RULES[name](rate)
  return optimizers.dgd_for_model(
    loss_fn,
    params,
    batch,
    learning_rate=rate,
    target='printed',
    erase=DGD[name],
    fallback=optax.adam(_FALLBACK_RATE, 0.9, 0.95),
  )[1]


def best(scores: np.ndarray) -> int:
  """Returns the index of the lowest score; diverged runs never win."""
  return int(np.argmin(np.where(np.isfinite(scores), scores, math.inf)))
