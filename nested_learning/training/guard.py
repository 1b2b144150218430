"""Steps that would harm the model: noticed on the devices, and left out.

A step whose loss or gradient is not finite, or whose gradient is many times as
long as usual, changes nothing: parameters, optimiser, clocks and stream stay
as they were, as if its batch had not been there. What is counted is part of the
training state, so that a resumed run judges as the uninterrupted one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Steps that the usual norm is a mean of: all until there are so many, then
# exponentially fewer of older ones. No norm is a spike before.
NUM_STEPS = 50


class Guard(NamedTuple):
  """What is known of the steps so far; every field is a scalar.

  Attributes:
    num_taken: int32, steps that were taken.
    num_skipped: int32, steps that were left out.
    num_in_a_row: int32, of these the ones since the last step that was taken.
    usual_norm: float32, the gradient's norm in the steps that were taken.
  """

  num_taken: jax.Array
  num_skipped: jax.Array
  num_in_a_row: jax.Array
  usual_norm: jax.Array


def init_guard() -> Guard:
  """What is known before the first step."""
  zero = jnp.zeros((), jnp.int32)
  return Guard(zero, zero, zero, jnp.zeros((), jnp.float32))


def judge(
  guard: Guard,
  *,
  loss: jax.Array,
  gradient_norm: jax.Array,
  spike_factor: float | None,
) -> tuple[jax.Array, Guard]:
  """Whether to take a step.

  Args:
    guard: What is known of the steps before.
    loss: Of the batch, a scalar.
    gradient_norm: Of the whole gradient, before it is clipped.
    spike_factor: Times the usual norm, above which a step is left out; None
      leaves out no gradient that is finite.

  Returns:
    A bool scalar, and what is known then.
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
