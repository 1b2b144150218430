"""Saves the training state, the position of the data and a manifest.

Orbax writes a checkpoint in the background, into a folder that gets its name
when it is complete: a process that is killed during a save leaves the one
before. The manifest holds shape, type and checksum of every array, since
neither Orbax nor a file system notices all damage.
"""

from collections.abc import Iterator, Mapping
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
from typing import Any

import jax
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

_SCORES = 'scores.json'  # beside the checkpoints: from step to score
_END_SECONDS = 2  # for writes to end after one of them failed
# Errors that the user can mend where the files are.
_DISK = (
  errno.EACCES,
  errno.EDQUOT,
  errno.EIO,
  errno.EMFILE,
  errno.ENFILE,
  errno.ENOENT,
  errno.ENOSPC,
  errno.ENOTDIR,
  errno.EPERM,
  errno.EROFS,
  errno.ESTALE,
)
# Messages of TensorStore and of Orbax about a folder that was removed.
_REMOVED = (
  'NOT_FOUND',
  'No ArrayMetadata found',
  'Checkpoint directory does not exist',
)


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
  base_fingerprint: str = '',
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
    base_fingerprint: `trainable.fingerprint` of the parameters that are frozen
      and not in the state; '' if there are none.
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
    'base_fingerprint': base_fingerprint,
    'train_seconds': train_seconds,
    'time': time.strftime('%Y-%m-%d %H:%M:%S'),
    **_software(),
    'checksums': {name: checksum for name, (checksum, _) in found.items()},
    'arrays': array_specs(state),
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
    errors.UserError: The checkpoint or its score cannot be written.
  """
  wait(manager)  # a score is of a checkpoint that is there
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
    number = _disk_errno(error)
    if number is None and not pathlib.Path(workdir, 'checkpoints').is_dir():
      number = errno.ENOENT
    if number is None:
      raise
    # Lets the other writes of TensorStore end: at exit they would wait for an
    # interpreter that is gone, and it for them.
    time.sleep(_END_SECONDS)
    try:
      steps = checkpoint_files.steps(workdir)
    except (OSError, errors.UserError):
      steps = []
    kept = ', '.join(map(str, steps)) or 'none'
    raise errors.of_disk(number)(
      f'{what} in {workdir}/checkpoints: {os.strerror(number)}; '
      f'checkpoints kept: {kept}. '
      'Fix this and run the same command again.'
    ) from error


def _disk_errno(error: BaseException | None) -> int | None:
  """Returns the disk's errno in an error or one that it came from, or None."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in _DISK:
      return error.errno
    if str(error).startswith(_REMOVED):
      return errno.ENOENT
    for number in _DISK:
      if os.strerror(number) in str(error):
        return number
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


def array_specs(tree: Any) -> dict[str, dict[str, Any]]:
  """Returns shape and dtype of every array of a tree, by path."""
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
