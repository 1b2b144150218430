"""Skips steps that are not sound, and counts them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The running mean of the gradient norm is a plain mean until this many steps,
# then it forgets exponentially. No norm counts as a spike before.
NUM_STEPS = 50


class Guard(NamedTuple):
  """Counts of the steps so far; every field is a scalar.

  Attributes:
    num_taken: int32, steps that were taken.
    num_skipped: int32, steps that were skipped.
    num_in_a_row: int32, steps skipped since the last one that was taken.
    usual_norm: float32, running mean of the gradient norm of the steps taken.
  """

  num_taken: jax.Array
  num_skipped: jax.Array
  num_in_a_row: jax.Array
  usual_norm: jax.Array


def init_guard() -> Guard:
  """Returns the guard before the first step."""
  zero = jnp.zeros((), jnp.int32)
  return Guard(zero, zero, zero, jnp.zeros((), jnp.float32))


def check_step(
  guard: Guard,
  *,
  loss: jax.Array,
  gradient_norm: jax.Array,
  spike_factor: float | None,
) -> tuple[jax.Array, Guard]:
  """Decides whether to take a step.

  Steps with a loss or gradient norm that is not finite, or a gradient norm
  above `spike_factor` times the running mean, are skipped and counted.

  Args:
    guard: The guard before the step.
    loss: Loss of the batch, a scalar.
    gradient_norm: Norm of the whole gradient, before clipping.
    spike_factor: Largest norm, in running means; None allows any finite norm.

  Returns:
    Whether to take the step, a bool scalar, and the guard after it.
  """
  sound = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
  if spike_factor is not None:
    known = guard.num_taken >= NUM_STEPS
    sound &= ~known | (gradient_norm <= spike_factor * guard.usual_norm)
  taken = sound.astype(jnp.int32)
  num_taken = guard.num_taken + taken
  rate = 1 / jnp.clip(num_taken, 1, NUM_STEPS)
  usual = guard.usual_norm + rate * (gradient_norm - guard.usual_norm)
  return sound, Guard(
    num_taken=num_taken,
    num_skipped=guard.num_skipped + 1 - taken,
    num_in_a_row=(guard.num_in_a_row + 1) * (1 - taken),
    usual_norm=jnp.where(sound, usual, guard.usual_norm),
  )
