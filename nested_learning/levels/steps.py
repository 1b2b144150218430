"""The steps that levels take inside a sequence, row by row."""

from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning.levels import partition
from nested_learning.levels import stream


class Steps(NamedTuple):
  """How levels begin and learn.

  Attributes:
    init: `init(params, num_rows)` gives a `stream.LevelState` by level.
    learn: `learn(params, states, gradients, num_targets, num_segments, active)`
      adds the gradients of a segment, [b, ...] by level, in the active rows,
      and takes the steps that are due after so many segments [b].
  """

  init: Callable[[Any, int], dict[str, stream.LevelState]]
  learn: Callable[..., dict[str, stream.LevelState]]


class StepConfig(NamedTuple):
  """What all levels do alike; see `in_context.make_reader`."""

  reduce: str
  nested: bool
  max_drift: float


def make_steps(
  levels: Sequence[Any],
  periods: Mapping[str, int],
  labels: Any,
  config: StepConfig,
) -> Steps:
  """Makes the functions by which levels begin and learn.

  Args:
    levels: `optimizers.Level`s, fastest first.
    periods: Segments between two steps, by level.
    labels: A tree of level names with the structure of the parameters.
    config: What all levels do alike.

  Returns:
    `Steps`.
  """

  def start_of(params, num_rows):
    """Weights and optimisers as every row starts with them."""
    repeat = lambda x: jnp.broadcast_to(x, (num_rows, *jnp.shape(x)))
    weights = {
      name: jax.tree.map(repeat, partition.select(params, labels, name))
      for name in periods
    }
    optimizers = {
      x.name: jax.vmap(x.optimizer.init)(weights[x.name]) for x in levels
    }
    return weights, optimizers

  def init(params, num_rows):
    weights, optimizers = start_of(params, num_rows)
    number = lambda dtype: jnp.zeros((num_rows,), dtype)
    return {
      name: stream.LevelState(
        params=weights[name],
        optimizer=optimizers[name],
        accumulated=jax.tree.map(_zeros, weights[name]) if period > 1 else (),
        num_targets=number(jnp.float32),
        num_updates=number(jnp.int32),
        gradient_norm=number(jnp.float32),
        update_norm=number(jnp.float32),
        drift=number(jnp.float32),
        frozen=number(bool),
      )
      for name, period in periods.items()
    }

  def learn(params, states, gradients, num_targets, num_segments, active):
    weights, optimizers = start_of(params, active.shape[0])
    states, due = dict(states), {}
    for level in levels:
      name = level.name
      due[name] = active & (num_segments % periods[name] == 0)
      start = weights[name], optimizers[name]
      if periods[name] == 1:
        states[name] = _step(
          level,
          config,
          states[name],
          gradients[name],
          num_targets,
          start,
          due[name],
        )
      else:
        states[name] = _add(states[name], gradients[name], num_targets, active)
        states[name] = _step_if_due(
          level, config, states[name], start, due[name]
        )
    for faster, slower in itertools.pairwise(periods if config.nested else ()):
      anew = lambda new, old, rows=due[slower]: partition.where(rows, new, old)
      states[faster] = states[faster]._replace(
        params=anew(weights[faster], states[faster].params),
        optimizer=anew(optimizers[faster], states[faster].optimizer),
        drift=anew(jnp.zeros_like(num_targets), states[faster].drift),
      )
    return states

  return Steps(init, learn)


def _add(state, gradients, num_targets, active):
  """Adds what a segment says to what a level has heard since its last step."""
  total = jax.tree.map(
    lambda total, g: total + g.astype(total.dtype), state.accumulated, gradients
  )
  count = state.num_targets + num_targets
  return state._replace(
    accumulated=partition.where(active, total, state.accumulated),
    num_targets=partition.where(active, count, state.num_targets),
  )


def _step_if_due(level, config, state, start, due):
  """A step on what was accumulated, which begins anew."""

  def update(state):
    state = _step(
      level, config, state, state.accumulated, state.num_targets, start, due
    )
    zero = lambda x: partition.where(due, jnp.zeros_like(x), x)
    return state._replace(
      accumulated=jax.tree.map(zero, state.accumulated),
      num_targets=zero(state.num_targets),
    )

  return jax.lax.cond(jnp.any(due), update, lambda state: state, state)


def _step(level, config, state, gradients, num_targets, start, due):
  """One step of a level's optimiser in the rows where it is due."""
  weights, optimizer = start
  divisor = jnp.maximum(num_targets, 1) if config.reduce == 'mean' else 1.0
  gradients = jax.tree.map(
    lambda g, w: (g / _like(divisor, g)).astype(w.dtype),
    gradients,
    state.params,
  )
  updates, new_optimizer = jax.vmap(level.optimizer.update)(
    gradients, state.optimizer, state.params
  )
  params = optax.apply_updates(state.params, updates)
  gradient_norm, update_norm = map(partition.norm, (gradients, updates))
  distance = partition.norm(jax.tree.map(jnp.subtract, params, weights))
  drift = distance / jnp.maximum(partition.norm(weights), 1e-12)
  sound = jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
  sound &= drift <= config.max_drift
  stepped = due & sound & ~state.frozen
  diverged = due & ~sound & ~state.frozen
  take = lambda new, old: partition.where(stepped, new, old)
  give_up = lambda new, old: partition.where(diverged, new, old)
  seen = due & ~state.frozen
  return state._replace(
    params=give_up(weights, take(params, state.params)),
    optimizer=give_up(optimizer, take(new_optimizer, state.optimizer)),
    num_updates=state.num_updates + stepped,
    gradient_norm=partition.where(seen, gradient_norm, state.gradient_norm),
    update_norm=partition.where(seen, update_norm, state.update_norm),
    drift=give_up(jnp.zeros_like(drift), take(drift, state.drift)),
    frozen=state.frozen | diverged,
  )


def _like(divisor, x):
  """A divisor of whole rows, or a number, for x [b, ...]."""
  if jnp.ndim(divisor) == 0:
    return divisor
  return divisor.reshape(divisor.shape + (1,) * (x.ndim - 1))


def _zeros(x):
  return jnp.zeros_like(x, dtype=jnp.promote_types(x.dtype, jnp.float32))
