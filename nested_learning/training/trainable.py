"""Selects the parameters that are trained; the others stay as in the base.

Frozen parameters have no gradient, no state of the optimiser and no place in
checkpoints, and keep the type that they had in the pretrained model.
"""

from collections.abc import Callable
import fnmatch
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import subtrees
from nested_learning.training import checkpoint_files
from nested_learning.training import config as config_lib
from nested_learning.training import lora

_LORA = 'lora'  # of the parameters, beside those of the model


def is_partial(config: config_lib.ExperimentConfig) -> bool:
  """Returns whether some parameters are frozen."""
  return config.train.trainable != 'all'


def full_table(
  config: config_lib.ExperimentConfig, of_model: parameters.Table
) -> parameters.Table:
  """Returns the parameters of a model and of its low-rank changes."""
  if _LORA not in config.train.trainable.split('+'):
    return of_model
  return {**of_model, _LORA: lora.table(of_model, config.train.lora_rank)}


def make_filter(
  config: config_lib.ExperimentConfig, of_model: parameters.Table
) -> Callable[[str], bool]:
  """Makes `is_trained(path)` for the paths of `full_table`.

  Args:
    config: The experiment; `train.trainable` joins names and patterns by '+'.
    of_model: The parameters of its model.

  Raises:
    errors.UserError: A name or a pattern is that of no parameter.
  """
  if not is_partial(config):
    return lambda path: True
  paths = subtrees.paths(full_table(config, of_model), is_leaf=_is_param)
  trained = set()
  for part in config.train.trainable.split('+'):
    found = _find(config, of_model, part, paths)
    if not found:
      raise errors.UserError(
        f'train.trainable={config.train.trainable!r}: the model has no '
        f'parameter {part!r}; name all, memory (model.placement.memory), '
        'levels, lora or patterns such as blocks/*/norm, joined by +.'
      )
    trained |= found
  return trained.__contains__


def trained_table(
  config: config_lib.ExperimentConfig, of_model: parameters.Table
) -> parameters.Table:
  """Returns the parameters that are trained."""
  is_trained = make_filter(config, of_model)
  table = full_table(config, of_model)
  return subtrees.select(table, is_trained)


def start(
  config: config_lib.ExperimentConfig,
  model: models.Model,
  key: jax.Array,
  base: Any = None,
) -> tuple[Any, Any]:
  """Returns trained and frozen parameters at the start of a run.

  Args:
    config: The experiment.
    model: Its model.
    key: Draws what is not in the base.
    base: Parameters of the pretrained model, or None.

  Returns:
    Two trees; the second is None if all parameters are trained.
  """
  if base is None:
    params = model.init_params(key)
  else:
    params = models.complete(config.model, base, key)
  if not is_partial(config):
    return params, None
  is_trained = make_filter(config, model.table)
  table = full_table(config, model.table)
  if _LORA in table:
    drawn = parameters.init(key, {_LORA: table[_LORA]})
    params = subtrees.merge(params, drawn)
  widen = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
  trained = jax.tree.map(widen, subtrees.select(params, is_trained))
  return trained, subtrees.select(params, lambda path: not is_trained(path))


def combine(trained: Any, frozen: Any) -> Any:
  """Returns all parameters of the model, from the two trees of `start`."""
  if frozen is None:
    return trained
  params = subtrees.merge(frozen, trained)
  changes = params.pop(_LORA, None)
  return params if changes is None else lora.merge(params, changes)


def fingerprint(frozen: Any) -> str:
  """Returns what identifies frozen parameters; '' if there are none."""
  if frozen is None:
    return ''
  found = checkpoint_files.tree_checksums(frozen)
  sums = {name: checksum for name, (checksum, _) in found.items()}
  text = json.dumps(sums, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find(config, of_model, part: str, paths: list[str]) -> set[str]:
  """Returns the paths that a name or a pattern stands for."""
  if part == 'all':
    return {path for path in paths if not path.startswith(f'{_LORA}/')}
  if part == _LORA:
    return {path for path in paths if path.startswith(f'{_LORA}/')}
  if part == 'memory':
    return {path for path in paths if '/mixer/memory/' in path}
  if part == 'levels':
    labels = models.level_labels(config.model, of_model, of='chain')
    pairs = zip(subtrees.paths(labels), jax.tree.leaves(labels), strict=True)
    return {path for path, label in pairs if label != 'base'}
  return set(fnmatch.filter(paths, part))


def _is_param(x: Any) -> bool:
  return isinstance(x, parameters.Param)
