"""Accumulates the gradients of one level, and updates it when it is due."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning.optimizers import trees


class LevelState(NamedTuple):
  """State of one level.

  Attributes:
    inner: State of the level's own optimiser.
    accumulated: Sum of the gradients since the last update, in float32 or
      wider; () if the level updates on every step.
    accumulated_extra: Sums of the accumulated extra arguments, by name.
    num_accumulated: Number of steps in these sums, int32.
    num_updates: Number of updates so far, int32.
    gradient_norm: Norm of the gradient of the last update.
    update_norm: Norm of the last update.
    update_ratio: Norm of the last update over the norm of the weights that it
      was added to; 0 if `update` was given no params.
  """

  inner: Any
  accumulated: Any
  accumulated_extra: Mapping[str, Any]
  num_accumulated: jax.Array
  num_updates: jax.Array
  gradient_norm: jax.Array
  update_norm: jax.Array
  update_ratio: jax.Array


def init(
  optimizer: optax.GradientTransformation, params: Any, extra: Any, period: int
) -> LevelState:
  """Returns the state of a level before its first step.

  Args:
    optimizer: The level's own optimiser.
    params: Its parameters.
    extra: Zeros like its accumulated extra arguments, by name.
    period: Steps between two updates.
  """
  return LevelState(
    inner=optimizer.init(params),
    accumulated=trees.zeros(params) if period > 1 else (),
    accumulated_extra=extra,
    num_accumulated=jnp.zeros((), jnp.int32),
    num_updates=jnp.zeros((), jnp.int32),
    gradient_norm=jnp.zeros((), jnp.float32),
    update_norm=jnp.zeros((), jnp.float32),
    update_ratio=jnp.zeros((), jnp.float32),
  )


def update(
  optimizer: optax.GradientTransformationExtraArgs,
  gradients: Any,
  state: LevelState,
  params: Any,
  extra_args: Mapping[str, Any],
) -> tuple[Any, LevelState]:
  """Takes one step of a level's optimiser and records its telemetry.

  Args:
    optimizer: The level's own optimiser.
    gradients: Gradients of its parameters.
    state: Its state.
    params: Its parameters, or None.
    extra_args: Extra arguments of the optimiser, by name.

  Returns:
    The updates and the new state.
  """
  updates, inner = optimizer.update(
    gradients, state.inner, params, **extra_args
  )
  update_norm = _norm(updates)
  if params is None:
    update_ratio = jnp.zeros((), jnp.float32)
  else:
    # The ratio is undefined for a level at zero; the floor keeps it finite.
    update_ratio = update_norm / jnp.maximum(_norm(params), 1e-12)
  return updates, state._replace(
    inner=inner,
    num_updates=optax.safe_increment(state.num_updates),
    gradient_norm=_norm(gradients),
    update_norm=update_norm,
    update_ratio=update_ratio,
  )


def update_if_due(
  optimizer: optax.GradientTransformationExtraArgs,
  due: jax.Array,
  reduce: str,
  gradients: Any,
  state: LevelState,
  params: Any,
  extra_args: Mapping[str, Any],
) -> tuple[Any, LevelState]:
  """Adds a gradient to a level's sums and, if it is due, updates.

  Args:
    optimizer: See `update`.
    due: Whether the level updates on this step, bool.
    reduce: 'mean' or 'sum' of the gradients since the last update.
    gradients: See `update`.
    state: See `update`.
    params: See `update`.
    extra_args: See `update`.

  Returns:
    The updates, zero if the level is not due, and the new state.
  """
  own_extra = {key: extra_args[key] for key in state.accumulated_extra}
  state = state._replace(
    accumulated=_add(state.accumulated, gradients),
    accumulated_extra=_add(state.accumulated_extra, own_extra),
    num_accumulated=state.num_accumulated + 1,
  )

  def step(state, gradients):
    divisor = state.num_accumulated if reduce == 'mean' else 1
    reduced, reduced_extra = jax.tree.map(
      # Back to the gradients' type, which the optimiser's state was made for.
      lambda total, g: (total / jnp.asarray(divisor, total.dtype)).astype(
        g.dtype
      ),
      (state.accumulated, state.accumulated_extra),
      (gradients, own_extra),
    )
    updates, new_state = update(
      optimizer, reduced, state, params, {**extra_args, **reduced_extra}
    )
    # Both branches of a cond must return the same types. Some optimisers widen
    # a scalar of their state, or make it strongly typed, on the first update.
    inner = jax.tree.map(
      lambda new, old: jnp.asarray(new, jnp.asarray(old).dtype),
      new_state.inner,
      state.inner,
    )
    return updates, new_state._replace(
      inner=inner,
      accumulated=jax.tree.map(jnp.zeros_like, state.accumulated),
      accumulated_extra=jax.tree.map(jnp.zeros_like, state.accumulated_extra),
      num_accumulated=jnp.zeros_like(state.num_accumulated),
    )

  # Updates may be of another type than gradients.
  types, _ = jax.eval_shape(step, state, gradients)

  def skip(state, gradients):
    zeros = jax.tree.map(
      lambda g, kind: jnp.zeros_like(g, dtype=kind.dtype), gradients, types
    )
    return zeros, state

  # Gradients are operands, so that zeros like them have their sharding.
  return jax.lax.cond(due, step, skip, state, gradients)


def _add(totals, tree):
  return jax.tree.map(
    lambda total, leaf: total + leaf.astype(total.dtype), totals, tree
  )


def _norm(tree):
  """Returns the norm of a tree, summed in float32 whatever its types."""
  return jnp.asarray(optax.tree.norm(optax.tree.cast(tree, jnp.float32)))
