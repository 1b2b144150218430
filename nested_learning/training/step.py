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
from nested_learning.training import guard as guard_lib
from nested_learning.training import matrices
from nested_learning.training import trainable
from nested_learning.training import workload as workload_lib


class TrainState(NamedTuple):
  """The state of training between two steps.

  Attributes:
    params: The parameters that are trained.
    optimizer: State of the optimiser.
    stream: The model's state, one per micro-batch along a leading axis; None if
      every batch starts streams of its own.
    guard: Counts of the steps taken and skipped.
    frozen: The model's other parameters; None if all are trained.
  """

  params: Any
  optimizer: Any
  stream: Any
  guard: guard_lib.Guard
  frozen: Any = None

  @property
  def all_params(self) -> Any:
    """All parameters of the model."""
    return trainable.combine(self.params, self.frozen)


def make_init(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  optimizer: optax.GradientTransformation,
) -> Callable[[jax.Array], TrainState]:
  """Makes `init(key, base=None) -> TrainState`; what base lacks is drawn."""

  def init(key, base=None):
    params, frozen = trainable.start(config, model, key, base)
    stream = None
    if config.carries_state:
      num_micro = config.train.accumulate
      start = model.init_state(
        trainable.combine(params, frozen), config.data.batch_size // num_micro
      )
      stream = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_micro, *x.shape)), start
      )
    return TrainState(
      params, optimizer.init(params), stream, guard_lib.init_guard(), frozen
    )

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
    delta_grad=matrices.make_delta_grad(config, model),
  )


def make_update(
  model: models.Model,
  optimizer: optax.GradientTransformation,
  token_loss: Callable[..., jax.Array] = evaluation.cross_entropy,
  *,
  num_micro: int = 1,
  carries_state: bool = False,
  spike_factor: float | None = None,
  delta_grad: Callable[..., Any] | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """Makes `step(state, batch) -> (state, metrics)`.

  The loss is the mean over the targets of the whole batch, whatever the number
  of micro-batches. No gradient flows from a step into the steps before it: the
  state of a stream that continues is a constant, but for the parameters that
  its levels began with (`models.follow`).

  A step that `guard.check_step` refuses returns the state unchanged, but for
  its counts.

  Args:
    model: The model.
    optimizer: Its optimiser.
    token_loss: `token_loss(outputs, targets)` is the loss [b, t].
    num_micro: Micro-batches of a batch, computed one after the other.
    carries_state: Whether rows without a reset at their first token continue
      those of the batch before.
    spike_factor: See `guard.check_step`.
    delta_grad: `optimizers.value_and_delta_grad`, with settings, for an
      optimiser with levels of Delta Gradient Descent. Its samples are the
      targets of the whole batch. None: the gradient alone.

  Returns:
    A function to be jitted. Batches hold tokens and targets int [b, t], mask
    [b, t] of bools or of weights, and reset bool [b, t]; metrics are float32
    scalars.
  """
  compute = _make_gradients(
    model, token_loss, num_micro, carries_state, delta_grad
  )

  def step(state, batch):
    combine = lambda params: trainable.combine(params, state.frozen)
    loss, gradients, extra, stream = compute(
      state.params, combine, state.stream, batch
    )
    norm = optax.tree.norm(gradients)
    sound, guard = guard_lib.check_step(
      state.guard, loss=loss, gradient_norm=norm, spike_factor=spike_factor
    )

    def take():
      updates, opt_state = optimizer.update(
        gradients, state.optimizer, state.params, **extra
      )
      params = optax.apply_updates(state.params, updates)
      both = map(combine, (state.params, params))
      carried = models.follow(model, stream, *both)
      return params, opt_state, carried

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
    return TrainState(params, opt_state, stream, guard, state.frozen), metrics

  return step


def _make_gradients(model, token_loss, num_micro, carries_state, delta_grad):
  """Makes `compute`, which returns loss, gradients, extra and stream."""
  loss_fn = workload_lib.make_loss(model, token_loss)

  def split(x):
    # Row i goes to micro-batch i mod num_micro, so no row changes device.
    return jnp.swapaxes(x.reshape(-1, num_micro, *x.shape[1:]), 0, 1)

  def compute(params, combine, stream, batch):
    num_targets = jnp.maximum(jnp.sum(batch['mask']), 1)  # avoids 0 / 0

    def micro_loss(params, stream, micro):
      params = combine(params)
      if carries_state:
        constant = jax.lax.stop_gradient(params)
        stream = models.follow(model, stream, constant, params)
        stream = models.restart(model, params, stream, micro['reset'][:, 0])
      loss, stream = loss_fn(params, stream, micro, num_targets)
      return loss, stream if carries_state else None

    def add_micro(total, stream_and_micro):
      if delta_grad is None:
        (loss, stream), gradients = jax.value_and_grad(
          micro_loss, has_aux=True
        )(params, *stream_and_micro)
        extra = {}
      else:
        (loss, stream), gradients, extra = delta_grad(
          micro_loss, num_samples=num_targets, has_aux=True
        )(params, *stream_and_micro)
      total = jax.tree.map(jnp.add, total, (loss, gradients))
      return total, (stream, extra)

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    (loss, gradients), (stream, extra) = jax.lax.scan(
      add_micro, zero, (stream, jax.tree.map(split, batch))
    )
    # Each is a sum over a micro-batch, divided by the targets of all.
    extra = jax.tree.map(lambda x: jnp.sum(x, axis=0), extra)
    return loss, gradients, extra, stream

  return compute
