"""Saves and restores the training state, the data's position and a manifest.

Orbax writes a checkpoint in the background, into a folder that gets its name
when it is complete: a process that is killed during a save leaves the one
before. The manifest holds shape, type and checksum of every array, since
neither Orbax nor a file system notices all damage. If the latest checkpoint is
damaged, the one before is restored.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import errno
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

import nested_learning
from nested_learning import configs
from nested_learning import distributed
from nested_learning import errors
from nested_learning import files
from nested_learning import parameters
from nested_learning.training import checkpoint_files
from nested_learning.training import config as config_lib

# Settings of the model that change neither its parameters nor its numbers.
_FREE = frozenset({'max_length', 'remat'})
_SCORES = 'scores.json'  # beside the checkpoints: from step to score
# Errors that the user can mend where the files are.
_DISK = (
  errno.EACCES,
  errno.EDQUOT,
  errno.EIO,
  errno.ENOENT,
  errno.ENOSPC,
  errno.ENOTDIR,
  errno.EPERM,
  errno.EROFS,
  errno.ESTALE,
)


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


@contextlib.contextmanager
def open_manager(
  workdir: pathlib.Path, *, keep: int = 1, read_only: bool = False
) -> Iterator['Manager']:
  """Opens the checkpoints of a run; leaving waits for the last save.

  Args:
    workdir: The run's folder; checkpoints are in `checkpoints` inside.
    keep: Number of latest checkpoints to keep, beside the one with the best
      score.
    read_only: Whether the run's folder stays as it is.

  Yields:
    An Orbax manager that also keeps scores.

  Raises:
    errors.UserError: Checkpoints cannot be kept there.
  """
  folder = checkpoint_files.home(workdir)
  scores = {} if read_only else read_scores(workdir)
  policy = checkpoint_managers.AnyPreservationPolicy(
    [checkpoint_managers.LatestN(keep), _Best(scores)]
  )
  with checkpoint_files.quiet():
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    with explain_failure(workdir, 'Cannot open the checkpoints'):
      manager = Manager(folder, options=options)
    manager.scores = scores
    try:
      yield manager
      wait(manager)
    finally:
      # After an error the last save may fail in the same way once more.
      with contextlib.suppress(Exception):
        manager.close()


class Manager(ocp.CheckpointManager):
  """An Orbax manager that leaves it to the trainer to ask whether to stop.

  Orbax would ask for its statistics, with numbers of its own and from its own
  thread. JAX takes the last number for the place where a process is, and might
  agree on one that another process has passed.

  Attributes:
    scores: Scores of the steps that were evaluated, lower is better.
  """

  scores: dict[int, float]

  @property
  def is_read_only(self) -> bool:
    """Whether the run's folder stays as it is."""
    return self._options.read_only

  def reached_preemption(self, step: int) -> bool:
    """Returns False: the trainer asks by itself."""
    del step
    return False


class _Best(checkpoint_managers.PreservationPolicy):
  """Keeps the checkpoint with the lowest score, if any has one."""

  def __init__(self, scores: Mapping[int, float]):
    self._scores = scores

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [info.step for info in checkpoints]
    scored = [step for step in steps if step in self._scores]
    best = min(scored, key=self._scores.__getitem__, default=None)
    return [step == best for step in steps]


def save(
  manager: Manager,
  step: int,
  state: Mapping[str, Any],
  *,
  data: Mapping[str, Any],
  config: config_lib.ExperimentConfig,
  tokenizer_fingerprint: str,
  train_seconds: float = 0.0,
) -> None:
  """Starts a save, and returns while it is being written.

  Args:
    manager: A manager from `open_manager`.
    step: Optimiser steps done.
    state: Items by name; each a tree of arrays with at least one leaf.
    data: State of the data iterator, JSON-able.
    config: The experiment, for the manifest.
    tokenizer_fingerprint: Fingerprint of the tokens that it was trained on.
    train_seconds: Time spent training so far.

  Raises:
    FloatingPointError: A number in the state is not finite; nothing is written.
    errors.UserError: The disk is full, read-only or gone; so it may have been
      for the save before, which was written until now.
  """
  if manager.latest_step() == step:
    return
  found = checkpoint_files.tree_checksums(state)
  bad = [name for name, (_, is_finite) in found.items() if not is_finite]
  if bad:
    raise FloatingPointError(f'{bad[0]} is not finite after step {step}')
  manifest = {
    'format': checkpoint_files.FORMAT,
    'step': step,
    'config': configs.to_json(config),
    'tokenizer_fingerprint': tokenizer_fingerprint,
    'train_seconds': train_seconds,
    'time': time.strftime('%Y-%m-%d %H:%M:%S'),
    **_software(),
    'checksums': {name: checksum for name, (checksum, _) in found.items()},
    'arrays': _arrays(state),
    'data_checksum': checkpoint_files.json_checksum(data),
  }
  manifest['manifest_checksum'] = checkpoint_files.json_checksum(manifest)
  items = {name: ocp.args.StandardSave(tree) for name, tree in state.items()}
  arguments = ocp.args.Composite(
    data=ocp.args.JsonSave(data),
    manifest=ocp.args.JsonSave(manifest),
    **items,
  )
  with explain_failure(manager.directory.parent, f'Cannot save step {step}'):
    manager.save(step, force=True, args=arguments)


def wait(manager: Manager) -> None:
  """Waits until the last save is written.

  Raises:
    errors.UserError: The disk is full, read-only or gone.
  """
  folder = manager.directory.parent
  with explain_failure(folder, f'Cannot save step {manager.latest_step()}'):
    manager.wait_until_finished()


def record_score(manager: Manager, step: int, score: float) -> None:
  """Records the score of a step, so that the best checkpoint is kept.

  Args:
    manager: A manager from `open_manager`.
    step: Optimiser steps done.
    score: Score on the validation split, lower is better.

  Raises:
    errors.UserError: It cannot be written.
  """
  manager.scores[step] = score
  kept = {*manager.all_steps(), step}
  text = json.dumps({s: x for s, x in manager.scores.items() if s in kept})
  if jax.process_index() == 0:
    files.write_whole(manager.directory / _SCORES, text)


def read_scores(workdir: pathlib.Path) -> dict[int, float]:
  """Reads the scores of a run's checkpoints; the same in all processes.

  Args:
    workdir: The run's folder.

  Returns:
    A mapping from step to score, lower is better.
  """

  def read() -> str:
    path = checkpoint_files.home(workdir) / _SCORES
    if not path.exists():  # manifests held them before
      return json.dumps(_manifests_scores(workdir))
    try:
      found = json.loads(path.read_text(encoding='utf-8'))
      scores = {int(step): float(score) for step, score in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
      scores = {}  # they are measured again at the next evaluation
    return json.dumps({s: x for s, x in scores.items() if math.isfinite(x)})

  with explain_failure(workdir, 'Cannot read the checkpoints'):
    text = distributed.first_does('scores', read)
  return {int(step): score for step, score in json.loads(text or '{}').items()}


def _manifests_scores(workdir: pathlib.Path) -> dict[int, float]:
  scores = {}
  for step in checkpoint_files.steps(workdir):
    folder = checkpoint_files.home(workdir) / str(step)
    with contextlib.suppress(checkpoint_files.Damaged, errors.UserError):
      score = checkpoint_files.read_manifest(folder).get('score')
      if isinstance(score, float):
        scores[step] = score
  return scores


def restore(
  manager: Manager,
  abstract: Mapping[str, Any],
  *,
  config: config_lib.ExperimentConfig,
  tokenizer_fingerprint: str,
  step: int | None = None,
) -> Restored:
  """Restores a checkpoint: the latest of a run that is not damaged.

  A damaged one is passed over with a warning. If the manager may write, it is
  moved to `checkpoints_damaged`, so that its step can be saved again. Errors
  that are no damage (permissions, memory, the network) are raised as they are,
  and the checkpoint stays where it is.

  Args:
    manager: A manager from `open_manager`.
    abstract: The items to read, `jax.ShapeDtypeStruct`s with shardings.
    config: The experiment that goes on from it.
    tokenizer_fingerprint: Fingerprint of the tokens in use.
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
      with explain_failure(manager.directory.parent, f'Cannot read {folder}'):
        manifest, data = _look_together(look)
        _check_origin(manifest, config, tokenizer_fingerprint, folder)
        _check_arrays(manifest, abstract, folder)
        state = _read(manager, candidate, manifest, abstract)
    except checkpoint_files.Damaged as damage:
      damaged[candidate] = str(damage)
      continue
    if damaged:
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
  """Warns of damaged checkpoints and moves them out of the way."""

  def move():
    for step, damage in damaged.items():
      moved = ''
      if not manager.is_read_only:
        place = checkpoint_files.move_aside(manager.directory / str(step))
        moved = f'; moved to {place}'
      logging.warning('%s%s. Going on from step %d.', damage, moved, good)

  distributed.first_does('damaged', move)
  for step in damaged:
    manager.scores.pop(step, None)
  manager.reload()


@contextlib.contextmanager
def explain_failure(workdir: Any, what: str) -> Iterator[None]:
  """Turns errors of the disk into UserErrors; others pass unchanged.

  Args:
    workdir: The run's folder.
    what: The beginning of the message, as in 'Cannot save step 3'.

  Yields:
    Nothing.
  """
  try:
    yield
  except (errors.UserError, checkpoint_files.Damaged, FloatingPointError):
    raise
  except Exception as error:  # of several packages, which wrap the system's
    reason = _disk_reason(error)
    if reason is None:
      raise
    try:
      steps = checkpoint_files.steps(workdir)
    except (OSError, errors.UserError):
      steps = []
    left = f'checkpoints stay of {steps}' if steps else 'no checkpoint is there'
    raise errors.UserError(
      f'{what} in {workdir}/checkpoints: {reason}; {left}. Mend that and run '
      'the same command again.'
    ) from error


def _disk_reason(error: BaseException | None) -> str | None:
  """Returns the disk's reason in an error or one that it came from, or None."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in _DISK:
      return os.strerror(error.errno)
    if str(error).startswith('NOT_FOUND'):  # TensorStore's
      return os.strerror(errno.ENOENT)
    for number in _DISK:
      if os.strerror(number) in str(error):
        return os.strerror(number)
    error = error.__cause__ or error.__context__
  return None


@contextlib.contextmanager
def explain_divergence(manager: Manager) -> Iterator[None]:
  """Turns a FloatingPointError into a UserError with the way out."""
  try:
    yield
  except FloatingPointError as error:
    step = manager.latest_step()
    left = 'there is no checkpoint yet'
    if step is not None:
      left = f'the checkpoint of step {step} stays in {manager.directory}'
    raise errors.UserError(
      f'{error}; {left}. Lower train.learning_rate or train.clip_norm, or '
      'raise train.warmup_steps, in another --workdir.'
    ) from error


def _check_origin(manifest, config, tokenizer_fingerprint, folder):
  """Raises a UserError if tokens or model are others."""
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
    if path not in _FREE
  }
  for path, (ours, saved) in differing.items():
    raise errors.UserError(
      f'{folder} was written with model.{path}={saved!r}, and this config has '
      f'{ours!r}; use the config.json of that run, or another --workdir.'
    )


def _check_arrays(manifest, abstract, folder):
  """Raises a UserError if the arrays are not those asked for."""
  saved = {
    name: manifest.get('arrays', {}).get(name) for name in manifest['checksums']
  }
  wanted = _arrays(abstract)
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


def _arrays(tree: Any) -> dict[str, dict[str, Any]]:
  """Returns shape and type of every array of a tree, by path."""
  return {
    parameters.path_name(path): {
      'shape': list(x.shape),
      'dtype': str(x.dtype),
    }
    for path, x in jax.tree.leaves_with_path(tree)
  }


@functools.cache
def _software() -> dict[str, str | None]:
  """Returns the versions of the software and the commit of the code."""
  root = pathlib.Path(nested_learning.__file__).parents[1]
  commit = None
  if (root / '.git').exists():
    command = 'git describe --always --dirty --abbrev=40 --exclude=*'
    try:
      done = subprocess.run(
        command.split(), cwd=root, capture_output=True, text=True, timeout=10
      )
      commit = done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
      pass  # no git here, or a file system that is slow today
  return {
    'version': nested_learning.__version__,
    'commit': commit,
    'jax': jax.__version__,
    'orbax': importlib.metadata.version('orbax-checkpoint'),
  }


def _way_out(steps, step: int | None) -> str:
  if step is not None:
    return 'read another step.'
  if len(steps) > 1:
    return (
      f'all {len(steps)} checkpoints are damaged: start again in another '
      '--workdir.'
    )
  return 'there is no other checkpoint: start again in another --workdir.'
