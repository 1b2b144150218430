"""Optimiser steps of levels inside a sequence, row by row."""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning import errors
from nested_learning import optimizers
from nested_learning.levels import trees


class InnerLevel(NamedTuple):
  """State of one level in every row; all leaves begin with the rows [b].

  Attributes:
    params: Weights of the level.
    optimizer: State of its optimiser.
    accumulated: Sum of the gradients since the last step, in float32 or wider;
      () if the level steps after every segment.
    num_targets: float32, predictions in that sum.
    num_updates: int32, steps so far.
    gradient_norm: Norm of the gradient of the last step.
    update_norm: Norm of the last step.
    drift: Distance of the weights from their start over the norm of the start.
    frozen: bool, whether a step diverged: the weights are back at their start
      and stay there.
  """

  params: Any
  optimizer: Any
  accumulated: Any
  num_targets: jax.Array
  num_updates: jax.Array
  gradient_norm: jax.Array
  update_norm: jax.Array
  drift: jax.Array
  frozen: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class StepSpec:
  """Spec of the levels that take steps inside a sequence: which, when and how.

  Attributes:
    levels: `optimizers.Level`s with clocks in tokens of a row, fastest first.
      An optimiser is any optax transformation without extra arguments.
    labels: Tree of level names with the structure of the parameters.
    reduce: 'mean' or 'sum' of the gradients of the tokens between two steps.
    nested: Whether a level restarts, weights and optimiser, at every step of
      the next slower one.
    max_drift: Largest drift, see `InnerLevel`. A level that goes further, or
      whose step is not finite, has diverged.
  """

  levels: Sequence[optimizers.Level]
  labels: Any
  reduce: str = 'mean'
  nested: bool = False
  max_drift: float = 1.0

  def __post_init__(self):
    names = [level.name for level in self.levels]
    if not names:
      raise errors.UserError('no level learns; give at least one.')
    known = set(jax.tree.leaves(self.labels))
    for name in names:
      if name not in known:
        raise errors.UserError(
          f'no level {name!r}; there are {", ".join(sorted(known))}.'
        )
      if names.count(name) > 1:
        raise errors.UserError(f'level {name!r} is listed twice; list it once.')
    for faster, slower in itertools.pairwise(self.levels):
      if slower.every < faster.every:
        raise errors.UserError(
          f'level {slower.name!r} is listed after the slower {faster.name!r}; '
          'list levels fastest first.'
        )
      if self.nested and slower.every % faster.every:
        raise errors.UserError(
          f'level {slower.name!r} updates every {slower.every} tokens, no '
          f'multiple of the {faster.every} of level {faster.name!r} inside it; '
          'a nested chain needs multiples.'
        )
    segment_size(self.levels)

  @functools.cached_property
  def segment_size(self) -> int:
    """Tokens of a segment."""
    return segment_size(self.levels)

  @functools.cached_property
  def periods(self) -> dict[str, int]:
    """Segments between two steps, by level, fastest first."""
    return {x.name: x.every // self.segment_size for x in self.levels}


def segment_size(levels: Sequence[optimizers.Level]) -> int:
  """Returns the tokens of a segment: the greatest common divisor of the clocks.

  Args:
    levels: At least one level.

  Returns:
    Tokens.

  Raises:
    errors.UserError: It is less than 2 tokens.
  """
  clocks = [level.every for level in levels]
  size = math.gcd(*clocks)
  if size < 2:
    raise errors.UserError(
      f'inner.update_every={clocks} has no common divisor of at least 2 '
      'tokens, which a next-token loss needs; make all multiples of one number.'
    )
  return size


def init(spec: StepSpec, params: Any, num_rows: int) -> dict[str, InnerLevel]:
  """Returns the state of every level at the start of streams.

  Args:
    spec: The levels.
    params: Parameters of the model.
    num_rows: Rows b.

  Returns:
    `InnerLevel`s by name.
  """
  weights, optimizer_states = _start(spec, params, num_rows)
  zeros = lambda dtype: jnp.zeros((num_rows,), dtype)  # [b]
  accumulators = lambda tree: jax.tree.map(
    lambda x: jnp.zeros_like(trees.widen(x)), tree
  )
  return {
    name: InnerLevel(
      params=weights[name],
      optimizer=optimizer_states[name],
      accumulated=accumulators(weights[name]) if period > 1 else (),
      num_targets=zeros(jnp.float32),
      num_updates=zeros(jnp.int32),
      gradient_norm=zeros(jnp.float32),
      update_norm=zeros(jnp.float32),
      drift=zeros(jnp.float32),
      frozen=zeros(bool),
    )
    for name, period in spec.periods.items()
  }


def learn(
  spec: StepSpec,
  params: Any,
  states: dict[str, InnerLevel],
  gradients: dict[str, Any],
  num_targets: jax.Array,
  num_segments: jax.Array,
  active: jax.Array,
) -> dict[str, InnerLevel]:
  """Adds the gradients of a segment and takes the steps that are due.

  Args:
    spec: The levels.
    params: Parameters of the model, where levels start.
    states: `InnerLevel`s by name.
    gradients: Gradients summed over the segment, [b, ...] by level.
    num_targets: float32 [b], predictions in the sums.
    num_segments: int32 [b], segments read so far, this one included.
    active: bool [b], rows that have read a segment.

  Returns:
    The new states.
  """
  weights, optimizer_states = _start(spec, params, active.shape[0])
  states, due = dict(states), {}
  for level in spec.levels:
    name, period = level.name, spec.periods[level.name]
    due[name] = active & (num_segments % period == 0)
    start = weights[name], optimizer_states[name]
    if period == 1:
      states[name] = _step(
        spec,
        level,
        states[name],
        gradients[name],
        num_targets,
        start,
        due[name],
      )
    else:
      states[name] = _add(states[name], gradients[name], num_targets, active)
      states[name] = _step_if_due(spec, level, states[name], start, due[name])
  if spec.nested:
    for faster, slower in itertools.pairwise(spec.periods):
      restart = functools.partial(trees.where, due[slower])
      states[faster] = states[faster]._replace(
        params=restart(weights[faster], states[faster].params),
        optimizer=restart(optimizer_states[faster], states[faster].optimizer),
        drift=restart(jnp.zeros_like(num_targets), states[faster].drift),
      )
  return states


def _start(spec, params, num_rows):
  """Returns weights and optimiser states by level, equal in every row."""
  repeat = lambda x: jnp.broadcast_to(x, (num_rows, *jnp.shape(x)))
  weights = {
    name: jax.tree.map(repeat, trees.select(params, spec.labels, name))
    for name in spec.periods
  }
  optimizer_states = {
    x.name: jax.vmap(x.optimizer.init)(weights[x.name]) for x in spec.levels
  }
  return weights, optimizer_states


def _add(state, gradients, num_targets, active):
  """Adds the gradients of a segment to those since the last step."""
  total = jax.tree.map(
    lambda total, g: total + g.astype(total.dtype), state.accumulated, gradients
  )
  count = state.num_targets + num_targets
  return state._replace(
    accumulated=trees.where(active, total, state.accumulated),
    num_targets=trees.where(active, count, state.num_targets),
  )


def _step_if_due(spec, level, state, start, due):
  """Steps on the accumulated gradients in the rows that are due, if any."""

  def update(state):
    state = _step(
      spec, level, state, state.accumulated, state.num_targets, start, due
    )
    reset = lambda x: trees.where(due, jnp.zeros_like(x), x)
    return state._replace(
      accumulated=jax.tree.map(reset, state.accumulated),
      num_targets=reset(state.num_targets),
    )

  # A slow level costs an addition between its steps, not an optimiser step.
  return jax.lax.cond(jnp.any(due), update, lambda state: state, state)


def _step(spec, level, state, gradients, num_targets, start, due):
  """Takes one optimiser step in the rows that are due."""
  weights, optimizer = start
  # A segment without targets has a gradient of zero: its mean is zero as well.
  divisor = jnp.maximum(num_targets, 1) if spec.reduce == 'mean' else 1.0

  def reduced(g, w):
    per_row = divisor
    if spec.reduce == 'mean':
      per_row = divisor.reshape(divisor.shape + (1,) * (g.ndim - 1))
    return (g / per_row).astype(w.dtype)

  gradients = jax.tree.map(reduced, gradients, state.params)
  updates, new_optimizer = jax.vmap(level.optimizer.update)(
    gradients, state.optimizer, state.params
  )
  params = optax.apply_updates(state.params, updates)
  gradient_norm, update_norm = map(trees.norm, (gradients, updates))
  distance = trees.norm(jax.tree.map(jnp.subtract, params, weights))
  # The floor keeps the drift of a level that starts at zero finite.
  drift = distance / jnp.maximum(trees.norm(weights), 1e-12)
  sound = jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
  sound &= drift <= spec.max_drift
  seen = due & ~state.frozen
  take = functools.partial(trees.where, seen & sound)
  give_up = functools.partial(trees.where, seen & ~sound)
  return state._replace(
    params=give_up(weights, take(params, state.params)),
    optimizer=give_up(optimizer, take(new_optimizer, state.optimizer)),
    num_updates=state.num_updates + (seen & sound),
    gradient_norm=trees.where(seen, gradient_norm, state.gradient_norm),
    update_norm=trees.where(seen, update_norm, state.update_norm),
    drift=give_up(jnp.zeros_like(drift), take(drift, state.drift)),
    frozen=state.frozen | (seen & ~sound),
  )
