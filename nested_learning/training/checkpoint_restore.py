"""Restores the latest checkpoint that is not damaged."""

from collections.abc import Callable, Mapping
import functools
import re
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
from orbax import checkpoint as ocp

from nested_learning import configs
from nested_learning import distributed
from nested_learning import errors
from nested_learning import parameters
from nested_learning.training import checkpoint_files
from nested_learning.training import checkpoints
from nested_learning.training import config as config_lib

# Settings of the model that change neither its parameters nor its numbers.
_FREE = re.compile(r'max_length|remat|levels\.\d+\.optimizer(\..*)?')


class Restored(NamedTuple):
  """The contents of a checkpoint.

  Attributes:
    step: Optimiser steps done.
    state: The items asked for, by name.
    data: State of the data iterator.
    manifest: The fields of its manifest.
  """

  step: int
  state: Any
  data: Mapping[str, Any]
  manifest: Mapping[str, Any]


def restore(
  manager: checkpoints.Manager,
  abstract: Mapping[str, Any],
  *,
  config: config_lib.ExperimentConfig,
  tokenizer_fingerprint: str,
  base_fingerprint: str = '',
  step: int | None = None,
) -> Restored:
  """Restores a checkpoint: the latest of a run that is not damaged.

  A damaged one is passed over with a warning. If the manager may write, it is
  moved to `checkpoints_damaged`, so that its step can be saved again. So are
  older folders without a manifest, which the next save would delete. Errors
  that are no damage (permissions, memory, the network) are raised as they are,
  and the checkpoint stays where it is.

  Args:
    manager: A manager from `checkpoints.open_manager`.
    abstract: The items to read, `jax.ShapeDtypeStruct`s with shardings.
    config: The experiment that resumes from it.
    tokenizer_fingerprint: Fingerprint of the tokens in use.
    base_fingerprint: `trainable.fingerprint` of the parameters in use that are
      frozen.
    step: The only step to try; None tries all, the latest first.

  Returns:
    The contents of the checkpoint.

  Raises:
    errors.UserError: There is none, all are damaged, the arrays in it are not
      those asked for, or model or tokenizer differ from those that wrote it.
  """
  steps = sorted(manager.all_steps(), reverse=True) if step is None else [step]
  if not steps:
    raise errors.UserError(
      f'{manager.directory} holds no checkpoint; run --mode=train first, or '
      'give the --workdir of a run that has one.'
    )
  damaged = {}
  for candidate in steps:
    folder = manager.directory / str(candidate)
    try:
      look = functools.partial(_look, folder, abstract)
      with checkpoints.explain_failure(
        manager.directory.parent, f'Cannot read {folder}'
      ):
        manifest, data = _look_together(look)
        theirs = _check_origin(manifest, config, tokenizer_fingerprint, folder)
        _check_base(manifest, config, theirs, base_fingerprint, folder)
        if 'optimizer' in abstract:
          _check_optimizers(config, theirs, folder)
        _check_arrays(manifest, abstract, folder)
        state = _read(manager, candidate, manifest, abstract)
    except checkpoint_files.Damaged as damage:
      damaged[candidate] = str(damage)
      continue
    if damaged or not manager.is_read_only:
      _set_aside(manager, damaged, candidate)
    return Restored(candidate, state, data, manifest)
  raise errors.UserError(f'{damaged[steps[0]]}; {_way_out(steps, step)}')


def _look(folder, abstract) -> tuple[dict[str, Any], Any]:
  """Reads manifest and data; raises `Damaged` if they or arrays are damaged.

  Processes that read together must agree on the damage before they restore,
  since one that fails would leave the others waiting for it. So each reads a
  share of the arrays here. A single process compares them when it restores.
  """
  manifest = checkpoint_files.read_manifest(folder)
  data = checkpoint_files.read_data(folder, manifest)
  if distributed.is_together():
    names = _names(manifest, abstract)
    mine = names[jax.process_index() :: jax.process_count()]
    for damage in checkpoint_files.find_damages(
      folder, manifest, mine
    ).values():
      raise checkpoint_files.Damaged(damage)
  return manifest, data


def _look_together(look: Callable[[], Any]) -> Any:
  """Calls `look` in all processes; what one of them raises, all raise.

  An error that is no damage comes before damage, so that no process sets a
  checkpoint aside that another could not read.
  """
  if not distributed.is_together():
    return look()
  result, error = None, None
  try:
    result = look()
  except Exception as caught:  # to be raised again below
    error = caught
  is_damage = isinstance(error, checkpoint_files.Damaged)
  text = (
    '' if error is None else f'{"damage" if is_damage else "error"}:{error}'
  )
  said = distributed.gather('checkpoint', text)
  for kind in ('error:', 'damage:'):
    for index, other in enumerate(said):
      if not other.startswith(kind):
        continue
      if text.startswith(kind):
        raise error
      other = other.removeprefix(kind)
      if kind == 'damage:':
        raise checkpoint_files.Damaged(other)
      raise RuntimeError(f'process {index} cannot read a checkpoint: {other}')
  return result


def _names(manifest, abstract) -> list[str]:
  """Returns the paths of the arrays that are asked for."""
  return [n for n in manifest['checksums'] if n.partition('/')[0] in abstract]


def _read(manager, step, manifest, abstract) -> dict[str, Any]:
  """Reads items and compares them with their checksums."""
  folder = manager.directory / str(step)
  items = {
    name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()
  }
  try:
    restored = manager.restore(step, args=ocp.args.Composite(**items))
  except Exception:  # many types, of several packages
    # Either an array is damaged, or one of the files that Orbax alone reads,
    # or it was no damage: then this fails in the same way.
    return _read_on_host(folder, manifest, abstract)
  state = {name: restored[name] for name in abstract}
  for name, (checksum, _) in checkpoint_files.tree_checksums(state).items():
    if manifest['checksums'][name] != checksum:
      raise checkpoint_files.changed(folder, name)
  return state


def _read_on_host(folder, manifest, abstract) -> dict[str, Any]:
  """Reads items without Orbax, each array whole in every process."""
  leaves = []
  for path, like in jax.tree.leaves_with_path(abstract):
    name = parameters.path_name(path)
    ((_, array),) = checkpoint_files.read_arrays(folder, [name])
    damage = checkpoint_files.find_damage(folder, manifest, name, array)
    if damage:
      raise damage
    part = lambda index, array=array: np.asarray(array[index])
    leaves.append(jax.make_array_from_callback(like.shape, like.sharding, part))
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _set_aside(manager, damaged: Mapping[int, str], good: int) -> None:
  """Warns of damaged checkpoints and moves them out of the way.

  Orbax takes every folder with a number for a checkpoint, and deletes those
  that are too old to keep, whatever is in them.
  """

  def move():
    for step, damage in damaged.items():
      moved = ''
      if not manager.is_read_only:
        place = checkpoint_files.move_aside(manager.directory / str(step))
        moved = f'; moved to {place}'
      logging.warning('%s%s. Going on from step %d.', damage, moved, good)
    if manager.is_read_only:
      return
    for step in checkpoint_files.steps(manager.directory.parent):
      folder = manager.directory / str(step)
      if not (folder / 'manifest').is_dir():
        place = checkpoint_files.move_aside(folder)
        logging.warning('%s is no checkpoint; moved to %s.', folder, place)

  distributed.first_does('damaged', move)
  for step in damaged:
    manager.scores.pop(step, None)
  manager.reload()


def _check_origin(manifest, config, tokenizer_fingerprint, folder):
  """Returns the config; raises a UserError if tokens or model are others."""
  if manifest['tokenizer_fingerprint'] != tokenizer_fingerprint:
    raise errors.UserError(
      f'{folder} was trained on other tokens (fingerprint '
      f'{manifest["tokenizer_fingerprint"]}) than those of this config '
      f'({tokenizer_fingerprint}); set data.tokenizer or data.task to that of '
      'the run, or use another --workdir.'
    )
  theirs = configs.from_json(manifest['config'])
  if not isinstance(theirs, config_lib.ExperimentConfig):
    raise errors.UserError(
      f'{folder} is of a {type(theirs).__name__}, not of an ExperimentConfig; '
      'use another --workdir.'
    )
  differing = {
    path: pair
    for path, pair in configs.differences(config.model, theirs.model).items()
    if not _FREE.fullmatch(path)
  }
  for path, (ours, saved) in differing.items():
    raise errors.UserError(
      f'{folder} was written with model.{path}={saved!r}, and this config has '
      f'{ours!r}; use the config.json of that run, or another --workdir.'
    )
  return theirs


def _check_base(manifest, ours, theirs, fingerprint: str, folder) -> None:
  """Raises a UserError if other parameters were frozen."""
  trainable, saved = ours.train.trainable, theirs.train.trainable
  if trainable != saved:
    raise errors.UserError(
      f'{folder} was written with train.trainable={saved!r}, and this config '
      f'has {trainable!r}; use the config.json of that run, or another '
      '--workdir.'
    )
  written = manifest.get('base_fingerprint', '')
  if written != fingerprint:
    raise errors.UserError(
      f'{folder} was trained on another base (fingerprint {written}) than '
      f'base={ours.base} ({fingerprint}); set base to the model that it was '
      'trained on.'
    )


def _check_optimizers(
  ours: config_lib.ExperimentConfig,
  theirs: config_lib.ExperimentConfig,
  folder,
) -> None:
  """Raises a UserError if a level was trained by another optimiser."""
  for level, rule in ours.rules.items():
    saved = theirs.rules[level]
    if type(rule) is not type(saved):
      raise errors.UserError(
        f'{folder} was written with {ours.rule_field(level)}={saved.NAME}, and '
        f'this config has {rule.NAME}; use the config.json of that run, or '
        'another --workdir.'
      )


def _check_arrays(manifest, abstract, folder):
  """Raises a UserError if the arrays are not those asked for."""
  saved = {
    name: manifest.get('arrays', {}).get(name) for name in manifest['checksums']
  }
  wanted = checkpoints.array_specs(abstract)
  for name in [*wanted, *saved]:
    if name.split('/')[0] not in abstract:
      continue
    if name not in saved or name not in wanted:
      has, lacks = folder, 'this config has not'
      if name in wanted:
        has, lacks = 'this config', f'{folder} has not'
      raise errors.UserError(
        f'{has} has an array {name}, which {lacks}; use the version of the '
        'code and the config.json of that run, or another --workdir.'
      )
    if saved[name] is not None and saved[name] != wanted[name]:
      theirs, ours = (
        f'{array["dtype"]}{array["shape"]}'
        for array in (saved[name], wanted[name])
      )
      raise errors.UserError(
        f'{folder} holds {name} as {theirs}, and this config needs {ours}; use '
        'the config.json of that run, or another --workdir.'
      )


def _way_out(steps, step: int | None) -> str:
  if step is not None:
    return 'read another step.'
  if len(steps) > 1:
    return (
      f'all {len(steps)} checkpoints are damaged: start again in another '
      '--workdir.'
    )
  return 'there is no other checkpoint: start again in another --workdir.'
