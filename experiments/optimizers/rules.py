"""The optimisers that the experiments compare, and how each is run and tuned.

Every optimiser gets the same search: one grid of learning rates, the same
initial parameters and the same batches. All rates of one optimiser run side by
side, under `jax.vmap`.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers

# Embeddings, biases and norms under DGD, where the rate found for maps means
# nothing: Adam at a rate of its own.
_FALLBACK_RATE = 3e-3

_TABLES = ('embed', 'lm_head', 'logits', 'vocab')


def _muon_axes(params):
  """Which leaves Muon treats as matrices: those that M3 does."""

  def axes(path, leaf):
    name = jax.tree_util.keystr(path).lower()
    if leaf.ndim < 2 or any(table in name for table in _TABLES):
      return None
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

  return jax.tree_util.tree_map_with_path(axes, params)


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
    muon_weight_dimension_numbers=_muon_axes,
  ),
  'M3': optimizers.m3,
  'M3, no second moment': lambda rate: optimizers.m3(rate, second_decay=None),
}
# Weights of the erasing term: the paper's, and a light one.
DGD = {'DGD': 1.0, 'DGD, erase 0.01': 0.01}
NAMES = (*RULES, *DGD)


class Sweep(NamedTuple):
  """What one optimiser did at every rate and with every seed.

  Attributes:
    rates: [rate]
    losses: [rate, seed, step], the loss before each step.
    params: The parameters after the last step; leaves [rate, seed, ...].
    path: The parameters before each step, [rate, seed, step, ...], if asked
      for; else None.
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
  """Trains with one optimiser at all rates, each decayed linearly to zero.

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
  first = jax.tree.map(lambda leaf: leaf[0], batches)
  one_seed = jax.tree.map(lambda leaf: leaf[0], params)

  def train(rate, params):
    value_and_grad, tx = make_rule(
      name,
      loss_fn,
      one_seed,
      first,
      optax.linear_schedule(rate, 0.0, num_steps),
    )

    def step(carry, batch):
      params, state = carry
      loss, gradients, extra = value_and_grad(params, batch)
      updates, state = tx.update(gradients, state, params, **extra)
      report = loss, params if keep_path else None
      return (optax.apply_updates(params, updates), state), report

    carry = params, tx.init(params)
    (params, _), (losses, path) = jax.lax.scan(step, carry, batches)
    return losses, params, path

  over_seeds = jax.vmap(train, in_axes=(None, 0))
  run = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))
  losses, params, path = run(jnp.array(rates), params)
  return Sweep(np.array(rates), np.array(losses), params, path)


def make_rule(name, loss_fn, params, batch, rate):
  """Makes an optimiser and the gradients that it wants.

  Args:
    name: One of `NAMES`.
    loss_fn: Function of (params, batch).
    params: Example parameters.
    batch: Example batch.
    rate: Learning rate or schedule.

  Returns:
    A function from (params, batch) to (loss, gradients, extra arguments), and
    the optax transformation.
  """
  if name in DGD:
    return optimizers.dgd_for_model(
      loss_fn,
      params,
      batch,
      learning_rate=rate,
      erase=DGD[name],
      fallback=optax.adam(_FALLBACK_RATE, 0.9, 0.95),
    )

  def value_and_grad(params, batch):
    return *jax.value_and_grad(loss_fn)(params, batch), {}

  return value_and_grad, RULES[name](rate)


def best(scores: np.ndarray) -> int:
  """Index of the lowest score; a run that diverged never wins."""
  return int(np.argmin(np.where(np.isfinite(scores), scores, math.inf)))
