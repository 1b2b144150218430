"""The optimiser: AdamW for every level, on the clock of the level."""

from typing import Any

import jax
import optax

from nested_learning import models
from nested_learning import optimizers
from nested_learning import parameters
from nested_learning.training import config as config_lib

# Second-moment decay 0.95 rather than 0.999: the usual choice for language
# models, whose gradients change in size faster than 0.999 forgets.
_BETAS = (0.9, 0.95)


def make_schedule(config: config_lib.TrainConfig) -> optax.Schedule:
  """Makes a linear warm-up to the peak, then a cosine to a fraction of it.

  Step 0 already learns, at the rate peak / warmup_steps.

  Args:
    config: Peak, warm-up, length and final fraction.

  Returns:
    A schedule: `schedule(step)` is the learning rate after `step` steps.
  """
  warmup_steps = min(config.warmup_steps, config.num_steps)
  cosine = optax.cosine_decay_schedule(
    config.learning_rate,
    max(config.num_steps - warmup_steps, 1),
    alpha=config.final_fraction,
  )
  if not warmup_steps:
    return cosine
  first = config.learning_rate / warmup_steps
  warmup = optax.linear_schedule(
    first, config.learning_rate, max(warmup_steps - 1, 1)
  )
  return optax.join_schedules((warmup, cosine), (warmup_steps,))


def make_optimizer(
  config: config_lib.ExperimentConfig, table: parameters.Table
) -> optax.GradientTransformation:
  """Makes an optimiser that clips the whole gradient and updates by level.

  A level takes one AdamW step per train_every tokens, from the mean gradient of
  those tokens; parameters outside the chain take one at every step. All read
  one schedule in steps of training. The n-th update of a level that updates
  every `period` steps reads it at step n * period - 1, whatever the phase of
  the level: its own step differs from that by less than a period.

  Args:
    config: The experiment.
    table: The model's parameters.

  Returns:
    An optax transformation for parameters of that table.
  """
  schedule = make_schedule(config.train)
  decayed = {
    parameters.path_name(path): is_decayed
    for path, is_decayed in jax.tree.leaves_with_path(decay_mask(table))
  }

  def mask(params):  # one level's: the leaves of other levels are missing
    return jax.tree_util.tree_map_with_path(
      lambda path, _: decayed[parameters.path_name(path)], params
    )

  def make_level(name: str, train_every: int) -> optimizers.Level:
    period = train_every // config.batch_tokens
    optimizer = optax.adamw(
      lambda count: schedule((count + 1) * period - 1),
      *_BETAS,
      weight_decay=config.train.weight_decay,
      mask=mask,
    )
    return optimizers.Level(name, train_every, optimizer)

  chain = [
    make_level(level.name, level.train_every)
    for level in config.model.levels
    if level.train_every is not None
  ]
  return optax.chain(
    optax.clip_by_global_norm(config.train.clip_norm),
    optimizers.multi_timescale(
      [make_level('base', config.batch_tokens), *chain],
      models.level_labels(config.model, table),
      tokens_per_step=config.batch_tokens,
    ),
  )


def decay_mask(table: parameters.Table) -> Any:
  """Returns which parameters weight decay pulls to zero: `Param.decay`.

  Args:
    table: The model's parameters.

  Returns:
    A tree of bools with the table's structure.
  """
  return parameters.map_params(lambda param: param.decay, table)
