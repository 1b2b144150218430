"""The optimiser: a rule for every level, on the clock of the level."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import optax

from nested_learning import models
from nested_learning import optimizers
from nested_learning import parameters
from nested_learning.training import config as config_lib
from nested_learning.training import matrices
from nested_learning.training import trainable


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
) -> optax.GradientTransformationExtraArgs:
  """Makes an optimiser that clips the whole gradient and updates by level.

  A level takes one step of its rule per train_every tokens, from the mean
  gradient of those tokens; parameters outside the chain take one at every step.
  All read one schedule in steps of training. The n-th update of a level that
  updates every `period` steps reads it at step n * period - 1, whatever the
  phase of the level: its own step differs from that by less than a period.

  Rules that treat parameters as matrices get their dimension numbers from a
  trace of the model's loss, which computes nothing.

  Args:
    config: The experiment.
    table: The model's parameters.

  Returns:
    An optax transformation for those parameters of the table that are trained.

  Raises:
    errors.UserError: Delta Gradient Descent finds no map in a level.
  """
  schedule = make_schedule(config.train)
  rules = config.rules
  own = trainable.trained_table(config, table)
  labels = _by_path(models.level_labels(config.model, table), 'base')
  labels = labels(parameters.abstract(own))
  mask = _by_path(decay_mask(own))
  traced, accumulate = {}, {}
  kinds = optimizers.configs
  of_matrices = kinds.Muon | kinds.M3 | kinds.DeltaMomentum | kinds.DeepMomentum
  if _has(rules, of_matrices):
    numbers = matrices.dimension_numbers(config)
    traced['dimension_numbers'] = _by_path(numbers)
  if _has(rules, optimizers.configs.Dgd):
    traced['maps'] = _by_path(matrices.find_maps(config))
    if any(
      (x.train_every or 0) > config.batch_tokens for x in config.model.levels
    ):
      accumulate['energy'] = matrices.energies(config)

  def make_level(name: str, train_every: int) -> optimizers.Level:
    period = train_every // config.batch_tokens
    optimizer = optimizers.configs.make(
      rules[name],
      lambda count: schedule((count + 1) * period - 1),
      weight_decay=config.train.weight_decay,
      mask=mask,
      **traced,
    )
    return optimizers.Level(name, train_every, optimizer)

  clocks = {'base': config.batch_tokens} | {
    level.name: level.train_every or config.batch_tokens
    for level in config.model.levels
  }
  present = set(jax.tree.leaves(labels))
  return optax.chain(
    optax.clip_by_global_norm(config.train.clip_norm),
    optimizers.multi_timescale(
      [make_level(*item) for item in clocks.items() if item[0] in present],
      labels,
      tokens_per_step=config.batch_tokens,
      accumulate=accumulate,
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


def _has(rules: Mapping[str, Any], kind: Any) -> bool:
  return any(isinstance(rule, kind) for rule in rules.values())


def _by_path(tree: Any, default: Any = None) -> Callable[[Any], Any]:
  """Returns a function that picks the values for some of the parameters.

  Optimisers of levels see trees in which the parameters of others are missing.

  Args:
    tree: A value per parameter; None is a value.
    default: Value of the parameters of low-rank changes, which have no other.
  """
  values = {
    parameters.path_name(path): value
    for path, value in jax.tree.leaves_with_path(tree, is_leaf=_is_value)
  }
  return functools.partial(
    jax.tree_util.tree_map_with_path,
    lambda path, _: values.get(parameters.path_name(path), default),
  )


def _is_value(x: Any) -> bool:
  return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
