"""Optimiser steps of levels inside a sequence, row by row.

In a nested chain, a level restarts from its parameters whenever a slower one
steps. Member k of the chain has its faster levels at their parameters, so that
it changes on the clock of level k. Level k learns from the losses of member k,
which faster levels cannot explain away: it learns what it would learn if these
were at rest. After its step the whole chain is this member.
"""

from collections.abc import Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class LearningLevel(optimizers.Level):
  """A level that learns inside a sequence.

  Attributes:
    objective: Its loss, see `InnerLevelConfig`.
    dgd: Settings of Delta Gradient Descent, if that is the optimiser: it takes
      the extra argument `energy`. None for an optimiser of gradients alone.
  """

  objective: str = 'next_token'
  dgd: optimizers.configs.Dgd | None = None


class Sums(NamedTuple):
  """Sums over the predictions of one level in every row.

  Attributes:
    gradient: Gradients, with the erasing term of Delta Gradient Descent; a tree
      like the weights.
    energy: Squared norms of the inputs of each map, a tree like the weights of
      scalars or of arrays over blocks; () without Delta Gradient Descent.
  """

  gradient: Any
  energy: Any = ()


class InnerLevel(NamedTuple):
  """State of one level in every row; all leaves begin with the rows [b].

  Attributes:
    params: Weights of the level.
    optimizer: State of its optimiser.
    accumulated: `Sums` since the last step, in float32 or wider; () if the
      level steps after every segment.
    num_targets: float32, predictions in these sums.
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
    levels: `LearningLevel`s with clocks in tokens of a row, fastest first. An
      optimiser is any optax transformation; only that of Delta Gradient Descent
      gets an extra argument.
    labels: Tree of level names with the structure of the parameters.
    reduce: 'mean' or 'sum' of the gradients of the tokens between two steps.
    nested: Whether levels restart at every step of a slower level, and learn
      from the losses of their own members.
    max_drift: Largest drift, see `InnerLevel`. A level that goes further, or
      whose step is not finite, has diverged.
    resting_size: Tokens of a segment where no level learns; otherwise, clocks
      say it.
  """

  levels: Sequence[LearningLevel]
  labels: Any
  reduce: str = 'mean'
  nested: bool = False
  max_drift: float = 1.0
  resting_size: int | None = None

  def __post_init__(self):
    names = [level.name for level in self.levels]
    if not names and self.resting_size is None:
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
    self.segment_size  # noqa: B018, checks the clocks

  @functools.cached_property
  def segment_size(self) -> int:
    """Tokens of a segment."""
    return segment_size(self.levels) if self.levels else self.resting_size

  @functools.cached_property
  def periods(self) -> dict[str, int]:
    """Segments between two steps, by level, fastest first."""
    return {x.name: x.every // self.segment_size for x in self.levels}

  @functools.cached_property
  def by_name(self) -> dict[str, LearningLevel]:
    """The levels by name, fastest first."""
    return {x.name: x for x in self.levels}


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
      f'inner.levels, with update_every={clocks}, have no common divisor of '
      'at least 2 tokens, which a next-token loss needs; make all multiples of '
      'one number.'
    )
  return size


def members(
  spec: StepSpec, params: Any, states: Mapping[str, InnerLevel]
) -> list[dict[str, Any]]:
  """Returns the weights of the levels by name, for each member of the chain.

  Args:
    spec: The levels.
    params: Parameters of the model, where levels start.
    states: `InnerLevel`s by name.

  Returns:
    One member for each level of a nested chain, that of the fastest first; one
    with the weights of all levels otherwise.
  """
  weights = {name: state.params for name, state in states.items()}
  if not spec.nested:
    return [weights]
  (num_rows,) = next(iter(states.values())).frozen.shape
  first, _ = start(spec, params, num_rows)
  faster = lambda k: {name: first[name] for name in list(weights)[:k]}
  return [weights | faster(k) for k in range(len(weights))]


def start(
  spec: StepSpec, params: Any, num_rows: int
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns where levels start.

  Args:
    spec: The levels.
    params: Parameters of the model.
    num_rows: Rows b.

  Returns:
    Weights and optimiser states by level, equal in every row.
  """
  repeat = lambda x: jnp.broadcast_to(x, (num_rows, *jnp.shape(x)))
  weights = {
    name: jax.tree.map(
      repeat, optimizers.select_level(params, spec.labels, name)
    )
    for name in spec.periods
  }
  optimizer_states = {
    x.name: jax.vmap(x.optimizer.init)(weights[x.name]) for x in spec.levels
  }
  return weights, optimizer_states


def init(
  spec: StepSpec, params: Any, num_rows: int, energies: Mapping[str, Any]
) -> dict[str, InnerLevel]:
  """Returns the state of every level at the start of streams.

  Args:
    spec: The levels.
    params: Parameters of the model.
    num_rows: Rows b.
    energies: Shapes of `Sums.energy`, by level; of levels with Delta Gradient
      Descent alone.

  Returns:
    `InnerLevel`s by name.
  """
  weights, optimizer_states = start(spec, params, num_rows)
  zeros = lambda dtype: jnp.zeros((num_rows,), dtype)  # [b]

  def accumulators(name):
    return Sums(
      jax.tree.map(lambda x: jnp.zeros_like(trees.widen(x)), weights[name]),
      jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), energies.get(name, ())
      ),
    )

  return {
    name: InnerLevel(
      params=weights[name],
      optimizer=optimizer_states[name],
      accumulated=accumulators(name) if period > 1 else (),
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
  sums: Mapping[str, Sums],
  num_targets: jax.Array,
  num_segments: jax.Array,
  active: jax.Array,
) -> dict[str, InnerLevel]:
  """Adds the sums of a segment and takes the steps that are due.

  Args:
    spec: The levels.
    params: Parameters of the model, where levels start.
    states: `InnerLevel`s by name.
    sums: Sums over the segment, [b, ...] by level.
    num_targets: float32 [b], predictions in the sums.
    num_segments: int32 [b], segments read so far, this one included.
    active: bool [b], rows that have read a segment.

  Returns:
    The new states.
  """
  weights, optimizer_states = start(spec, params, active.shape[0])
  states, due = dict(states), {}
  for level in spec.levels:
    name, period = level.name, spec.periods[level.name]
    due[name] = active & (num_segments % period == 0)
    first = weights[name], optimizer_states[name]
    if period == 1:
      states[name] = _step(
        spec, level, states[name], sums[name], num_targets, first, due[name]
      )
    else:
      states[name] = _add(states[name], sums[name], num_targets, active)
      states[name] = _step_if_due(spec, level, states[name], first, due[name])
  if spec.nested:
    for level, slower in itertools.pairwise(spec.levels):
      # Clocks are multiples: no level slower than the next one steps alone.
      states[level.name] = jax.lax.cond(
        jnp.any(due[slower.name]),
        _restart,
        lambda state, *_: state,
        states[level.name],
        (weights[level.name], optimizer_states[level.name]),
        due[slower.name],
      )
  return states


def _restart(state, first, rows):
  """Restarts a level from its weights and optimiser state at the start."""
  weights, optimizer = first
  restart = functools.partial(trees.where, rows)
  return state._replace(
    params=restart(weights, state.params),
    optimizer=restart(optimizer, state.optimizer),
    drift=restart(jnp.zeros_like(state.drift), state.drift),
  )


def _drift(params, start):
  """Returns the distance from the start over its norm, [b]."""
  distance = trees.norm(jax.tree.map(jnp.subtract, params, start))
  # The floor keeps the drift of a level that starts at zero finite.
  return distance / jnp.maximum(trees.norm(start), 1e-12)


def _add(state, sums, num_targets, active):
  """Adds the sums of a segment to those since the last step."""
  total = jax.tree.map(
    lambda total, x: total + x.astype(total.dtype), state.accumulated, sums
  )
  count = state.num_targets + num_targets
  return state._replace(
    accumulated=trees.where(active, total, state.accumulated),
    num_targets=trees.where(active, count, state.num_targets),
  )


def _step_if_due(spec, level, state, first, due):
  """Steps on the accumulated sums in the rows that are due, if any."""

  def update(state):
    state = _step(
      spec, level, state, state.accumulated, state.num_targets, first, due
    )
    reset = lambda x: trees.where(due, jnp.zeros_like(x), x)
    return state._replace(
      accumulated=jax.tree.map(reset, state.accumulated),
      num_targets=reset(state.num_targets),
    )

  # A slow level costs an addition between its steps, not an optimiser step.
  return jax.lax.cond(jnp.any(due), update, lambda state: state, state)


def _step(spec, level, state, sums, num_targets, first, due):
  """Takes one optimiser step in the rows that are due."""
  weights, optimizer = first
  # A segment without targets has a gradient of zero: its mean is zero as well.
  divisor = jnp.maximum(num_targets, 1) if spec.reduce == 'mean' else 1.0

  def reduced(x):
    per_row = divisor
    if spec.reduce == 'mean':
      per_row = divisor.reshape(divisor.shape + (1,) * (x.ndim - 1))
    return x / per_row

  gradients = jax.tree.map(
    lambda g, w: reduced(g).astype(w.dtype), sums.gradient, state.params
  )
  extra = {}
  if level.dgd is not None:
    extra['energy'] = jax.tree.map(reduced, sums.energy)
  updates, new_optimizer = jax.vmap(level.optimizer.update)(
    gradients, state.optimizer, state.params, **extra
  )
  params = optax.apply_updates(state.params, updates)
  gradient_norm, update_norm = map(trees.norm, (gradients, updates))
  drift = _drift(params, weights)
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
