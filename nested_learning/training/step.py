"""The training state and one training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning import evaluation
from nested_learning import models
from nested_learning import optimizers
from nested_learning.training import config as config_lib

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


class TrainState(NamedTuple):
  """The state of training between two steps.

  Attributes:
    params: The model's parameters.
    optimizer: State of the optimiser.
    stream: The model's state, one per micro-batch along a leading axis; None if
      every batch starts streams of its own.
    guard: Counts of the steps taken and skipped.
  """

  params: Any
  optimizer: Any
  stream: Any
  guard: Guard


def make_init(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  optimizer: optax.GradientTransformation,
) -> Callable[[jax.Array], TrainState]:
  """Makes `init(key) -> TrainState`."""

  def init(key):
    params = model.init_params(key)
    stream = None
    if config.carries_state:
      num_micro = config.train.accumulate
      start = model.init_state(params, config.data.batch_size // num_micro)
      stream = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_micro, *x.shape)), start
      )
    return TrainState(params, optimizer.init(params), stream, init_guard())

  return init


def make_step(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  optimizer: optax.GradientTransformation,
  token_loss: Callable[..., jax.Array] = evaluation.cross_entropy,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """Makes the step of an experiment; see `make_update`."""
  return make_update(
    model,
    optimizer,
    token_loss,
    num_micro=config.train.accumulate,
    carries_state=config.carries_state,
    spike_factor=config.train.spike_factor,
  )


def make_update(
  model: models.Model,
  optimizer: optax.GradientTransformation,
  token_loss: Callable[..., jax.Array] = evaluation.cross_entropy,
  *,
  num_micro: int = 1,
  carries_state: bool = False,
  spike_factor: float | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """Makes `step(state, batch) -> (state, metrics)`.

  The loss is the mean over the targets of the whole batch, whatever the number
  of micro-batches. No gradient flows from a step into the steps before it: the
  state of a stream that continues is a constant.

  A step that `check_step` refuses returns the state unchanged, but for its
  counts.

  Args:
    model: The model.
    optimizer: Its optimiser.
    token_loss: `token_loss(outputs, targets)` is the loss [b, t].
    num_micro: Micro-batches of a batch, computed one after the other.
    carries_state: Whether rows continue those of the batch before.
    spike_factor: See `check_step`.

  Returns:
    A function to be jitted. Batches hold tokens and targets int [b, t], mask
    [b, t] of bools or of weights, and reset bool [b, t]; metrics are float32
    scalars.
  """
  compute = _make_gradients(model, token_loss, num_micro, carries_state)

  def step(state, batch):
    loss, gradients, stream = compute(state.params, state.stream, batch)
    norm = optax.tree.norm(gradients)
    sound, guard = check_step(
      state.guard, loss=loss, gradient_norm=norm, spike_factor=spike_factor
    )

    def take():
      updates, opt_state = optimizer.update(
        gradients, state.optimizer, state.params
      )
      return optax.apply_updates(state.params, updates), opt_state, stream

    def skip():
      return state.params, state.optimizer, state.stream

    # Not jnp.where, which computes the update of a skipped step as well.
    params, opt_state, stream = jax.lax.cond(sound, take, skip)
    metrics = {
      'loss': loss,
      'gradient_norm': norm,
      'skipped': guard.num_skipped.astype(jnp.float32),
      'skipped_in_a_row': guard.num_in_a_row.astype(jnp.float32),
    }
    for name, value in optimizers.telemetry(opt_state).items():
      metrics[f'levels/{name}'] = value.astype(jnp.float32)
    return TrainState(params, opt_state, stream, guard), metrics

  return step


def _make_gradients(model, token_loss, num_micro, carries_state):
  """Makes `compute(params, stream, batch) -> (loss, gradients, stream)`."""

  def split(x):
    # Row i goes to micro-batch i mod num_micro, so no row changes device.
    return jnp.swapaxes(x.reshape(-1, num_micro, *x.shape[1:]), 0, 1)

  def compute(params, stream, batch):
    num_targets = jnp.maximum(jnp.sum(batch['mask']), 1)  # avoids 0 / 0

    def micro_loss(params, stream, micro):
      tokens, targets, reset = (
        micro[name] for name in ('tokens', 'targets', 'reset')
      )
      if model.losses is None:
        outputs, stream = model.forward(params, stream, tokens, reset=reset)
        loss = token_loss(outputs, targets)  # [b, t]
      else:  # levels that learn inside the row see targets as they go
        loss, stream = model.losses(
          params, stream, tokens, targets, token_loss, reset=reset
        )
      loss = jnp.sum(loss * micro['mask']) / num_targets
      return loss, stream if carries_state else None

    def add_micro(total, stream_and_micro):
      (loss, stream), gradients = jax.value_and_grad(micro_loss, has_aux=True)(
        params, *stream_and_micro
      )
      return jax.tree.map(jnp.add, total, (loss, gradients)), stream

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (loss, gradients), stream = jax.lax.scan(
      add_micro, zero, (stream, jax.tree.map(split, batch))
    )
    return loss, gradients, stream

  return compute
