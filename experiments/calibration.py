"""A temperature and a bias over the vocabulary, learned online.

The control of experiments in which levels learn from a stream: what unigrams
and the sharpness of the predictions alone would give.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning import levels
from nested_learning.levels import inner as inner_lib


class Calibration(NamedTuple):
  """A calibration as pure functions.

  Attributes:
    start: `start(num_rows)` returns its state at a stream's start.
    read: `read(rate, state, logits, targets)` takes logits [b, t, v] and the
      tokens [b, t] that they predict, whole segments, and returns the
      calibrated logits and the state.
  """

  start: Callable[[int], Any]
  read: Callable[..., tuple[jax.Array, Any]]


def make(
  level: levels.InnerLevelConfig,
  vocab_size: int,
  *,
  learns: Sequence[str] = ('scale', 'bias'),
) -> Calibration:
  """Makes a calibration that takes the steps of a level inside a sequence.

  Logits become exp(scale) * logits + bias, and both start at 0.

  Args:
    level: Clock, clip and optimiser, whose updates are proportional to its
      rate; the loss is that of the next token.
    vocab_size: Tokens of the model.
    learns: Which of the two learn.
  """
  optimizer = inner_lib.make_optimizer(level)
  size = level.update_every

  def start(num_rows):
    zeros = {'scale': (num_rows,), 'bias': (num_rows, vocab_size)}
    params = {name: jnp.zeros(zeros[name]) for name in learns}
    return params, jax.vmap(optimizer.init)(params)

  def apply(params, logits):
    if 'scale' in params:
      logits = jnp.exp(params['scale']) * logits
    return logits + params['bias'] if 'bias' in params else logits

  def row_loss(params, logits, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      apply(params, logits), targets
    )
    # As for a level, the last target is read after the step.
    return jnp.mean(losses[:-1])

  def row_step(rate, params, state, logits, targets):
    gradients = jax.grad(row_loss)(params, logits, targets)
    updates, state = optimizer.update(gradients, state, params)
    updates = jax.tree.map(lambda x: rate * x, updates)
    return apply(params, logits), optax.apply_updates(params, updates), state

  def read(rate, state, logits, targets):
    num_rows, num_tokens = targets.shape
    cut = lambda x: jnp.moveaxis(
      x.reshape(num_rows, num_tokens // size, size, *x.shape[2:]), 1, 0
    )

    def body(carry, inputs):
      step = jax.vmap(functools.partial(row_step, rate))
      logits, *carry = step(*carry, *inputs)
      return tuple(carry), logits

    state, found = jax.lax.scan(body, state, (cut(logits), cut(targets)))
    return jnp.moveaxis(found, 0, 1).reshape(logits.shape), state

  return Calibration(start, read)
