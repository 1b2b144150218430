"""Finds what optimisers need to know of a model's matrices.

That is their axes, and their inputs for Delta Gradient Descent. The loss is
traced on the shapes of a micro-batch, so that nothing is computed.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax

from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning import parameters
from nested_learning.optimizers.tracing import capture
from nested_learning.training import config as config_lib
from nested_learning.training import make_workload
from nested_learning.training import workload as workload_lib


@functools.lru_cache(maxsize=8)
def dimension_numbers(config: config_lib.ExperimentConfig) -> Any:
  """Returns the dimension numbers of the matrices of a model.

  Args:
    config: The experiment.

  Returns:
    A tree like the parameters of `optax.contrib.MuonDimensionNumbers`, None for
    parameters that are no matrices; see `optimizers.dimension_numbers`.

  Raises:
    errors.UserError: The model has no matrix, or one of two kinds.
  """
  # Without levels that learn inside a row: there, every row has a copy of their
  # weights, which a trace cannot follow.
  model = models.make_model(config.model, head=config.head)
  try:
    return optimizers.dimension_numbers(*_make_loss(config, model))
  except ValueError as error:
    raise errors.UserError(str(error)) from error


@functools.lru_cache(maxsize=8)
def find_maps(config: config_lib.ExperimentConfig) -> Any:
  """Returns which parameters Delta Gradient Descent can update as maps.

  Args:
    config: The experiment.

  Returns:
    A tree of bools like the parameters.

  Raises:
    errors.UserError: A level with `Dgd` learns inside a row, or has no map.
  """
  _check_levels_in_rows(config)
  model = make_workload.make_step_spec(config).model
  found, lost = capture.trace_maps(*_make_loss(config, model))
  labels = models.level_labels(config.model, model.table)
  with_maps = {
    label
    for label, is_map in zip(
      jax.tree.leaves(labels), jax.tree.leaves(found), strict=True
    )
    if is_map
  }
  for label in sorted(set(jax.tree.leaves(labels)) - with_maps):
    if isinstance(config.rules[label], optimizers.configs.Dgd):
      listed = '; '.join(f'{path} ({", ".join(o)})' for path, o in lost.items())
      of_lost = f' (matrices were lost in operations: {listed})' if lost else ''
      raise errors.UserError(
        f'Delta Gradient Descent finds no linear map in level {label!r}'
        f'{of_lost}; set {config.rule_field(label)}=adamw.'
      )
  return found


@functools.lru_cache(maxsize=8)
def energies(config: config_lib.ExperimentConfig) -> Any:
  """Returns shapes of the energies of a step: a tree like the parameters."""
  model = make_workload.make_step_spec(config).model
  loss_fn, *arguments = _make_loss(config, model)
  delta_grad = make_delta_grad(config, model)(loss_fn)
  return jax.eval_shape(delta_grad, *arguments)[2]['energy']


def make_delta_grad(
  config: config_lib.ExperimentConfig, model: models.Model
) -> Callable[..., Any] | None:
  """Makes the function for `delta_grad` of `make_update`.

  Args:
    config: The experiment.
    model: Its model.

  Returns:
    `optimizers.value_and_delta_grad` that captures inputs of the levels with
    Delta Gradient Descent alone; None if there are none.
  """
  rules = {
    label: rule
    for label, rule in config.rules.items()
    if isinstance(rule, optimizers.configs.Dgd)
  }
  if not rules:
    return None
  labels = models.level_labels(config.model, model.table)
  target, erase = (
    jax.tree.map(
      lambda label, f=field, e=otherwise: getattr(rules.get(label), f, e),
      labels,
    )
    for field, otherwise in (('target', None), ('erase', 1.0))
  )
  return functools.partial(
    optimizers.value_and_delta_grad, target=target, erase=erase
  )


def _make_loss(config, model) -> tuple[Any, ...]:
  """Returns the loss of a micro-batch, and the shapes of its arguments."""
  spec = make_workload.make_step_spec(config)
  loss_fn = workload_lib.make_loss(model, spec.token_loss)
  params = parameters.abstract(model.table)
  rows = config.micro_batch_size
  stream = None
  if config.carries_state:
    stream = jax.eval_shape(lambda p: model.init_state(p, rows), params)
  batch = {
    name: jax.ShapeDtypeStruct((rows, *shape), dtype)
    for name, (shape, dtype) in spec.row.items()
  }
  return (lambda *args: loss_fn(*args, 1.0)[0]), params, stream, batch


def _check_levels_in_rows(config) -> None:
  """Checks that no level with `Dgd` learns inside rows.

  A trace finds their weights in the blocks that do not learn, and loses them in
  the others, which every row has a copy of.
  """
  if not config.inner.is_on:
    return
  names = [level.name for level in config.model.levels]
  for level in levels.make_levels(config.inner, names):
    if isinstance(config.rules[level.name], optimizers.configs.Dgd):
      raise errors.UserError(
        f'level {level.name!r} learns inside every row, where each row has its '
        'own weights, and Delta Gradient Descent needs the inputs of shared '
        f'ones; set {config.rule_field(level.name)}=adamw.'
      )
