"""Checkpoints: the whole training state, the data's position, a manifest.

Orbax writes them in the background, each in a folder that gets its name only
when it is complete: a process killed in the middle of a save leaves the one
before. The manifest holds shape, type and checksum of every array, since
neither Orbax nor a file system notices all damage. Where the latest checkpoint
is damaged, the one before is read.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import importlib.metadata
import pathlib
import subprocess
import time
from typing import Any, NamedTuple

from absl import logging
import jax
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

import nested_learning
from nested_learning import configs
from nested_learning import distributed
from nested_learning import errors
from nested_learning import parameters
from nested_learning.training import checkpoint_files
from nested_learning.training import checksums
from nested_learning.training import config as config_lib

# Settings of the model that change neither its parameters nor its numbers.
_FREE = frozenset({'max_length', 'remat'})


class Restored(NamedTuple):
  """What a checkpoint held."""

  step: int
  state: Any
  data: Mapping[str, Any]  # state of the data iterator
  manifest: Mapping[str, Any]


def open_manager(
  workdir: pathlib.Path, *, keep: int = 1, read_only: bool = False
) -> contextlib.AbstractContextManager[ocp.CheckpointManager]:
  """Opens the checkpoints of a run; leaving waits for the last save.

  Args:
    workdir: The run's folder; checkpoints are in `checkpoints` inside.
    keep: Latest checkpoints to keep, beside the best by its score.
    read_only: Whether the run's folder stays as it is.

  Returns:
    A context manager that gives an Orbax manager.
  """
  policy = checkpoint_managers.AnyPreservationPolicy(
    [
      checkpoint_managers.LatestN(keep),
      checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: metrics['score'],
        reverse=True,
        n=1,
        keep_checkpoints_without_metrics=False,
      ),
    ]
  )
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  with checkpoint_files.quiet():
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    manager = _Manager(folder, options=options)
  return contextlib.closing(manager)


class _Manager(ocp.CheckpointManager):
  """A manager that leaves it to the trainer to ask whether to stop.

  Orbax's would ask for its statistics, with numbers of its own and from its own
  thread. JAX takes the last number for the place where a process is, and might
  settle on one that another process has passed.
  """

  @property
  def is_read_only(self) -> bool:
    return self._options.read_only

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: Mapping[str, Any],
  *,
  data: Mapping[str, Any],
  config: config_lib.ExperimentConfig,
  tokenizer_fingerprint: str,
  train_seconds: float = 0.0,
  score: float | None = None,
) -> None:
  """Starts a save, and returns while it is being written.

  Args:
    manager: From `open_manager`.
    step: Optimiser steps done.
    state: Items by name; each a tree of arrays with at least one leaf.
    data: State of the data iterator, JSON-able.
    config: The experiment, for the manifest.
    tokenizer_fingerprint: Of what the tokens stand for that it was trained on.
    train_seconds: Time spent training so far.
    score: On the validation split at this step, if it was measured; the least
      is the best.

  Raises:
    FloatingPointError: A number in the state is not finite; nothing is written.
  """
  if manager.latest_step() == step:
    return
  found = checksums.inspect(state)
  bad = [name for name, (_, is_finite) in found.items() if not is_finite]
  if bad:
    raise FloatingPointError(f'{bad[0]} is not finite after step {step}')
  manifest = {
    'format': checkpoint_files.FORMAT,
    'step': step,
    'config': configs.to_json(config),
    'tokenizer_fingerprint': tokenizer_fingerprint,
    'train_seconds': train_seconds,
    'score': score,
    'time': time.strftime('%Y-%m-%d %H:%M:%S'),
    **_software(),
    'checksums': {name: checksum for name, (checksum, _) in found.items()},
    'arrays': _arrays(state),
    'data_checksum': checksums.of_json(data),
  }
  manifest['manifest_checksum'] = checksums.of_json(manifest)
  items = {name: ocp.args.StandardSave(tree) for name, tree in state.items()}
  metrics = None
  if score is not None:
    metrics = {'score': score}
  manager.save(
    step,
    metrics=metrics,
    force=True,
    args=ocp.args.Composite(
      data=ocp.args.JsonSave(data),
      manifest=ocp.args.JsonSave(manifest),
      **items,
    ),
  )


def restore(
  manager: ocp.CheckpointManager,
  abstract: Mapping[str, Any],
  *,
  config: config_lib.ExperimentConfig,
  tokenizer_fingerprint: str,
  step: int | None = None,
) -> Restored:
  """Reads a checkpoint; of a run's, the latest that is not damaged.

  A damaged one is passed over with a warning. Where the manager may write, it
  is moved to `checkpoints_damaged`, so that its step can be saved again.

  Args:
    manager: From `open_manager`.
    abstract: The items to read, `jax.ShapeDtypeStruct`s with shardings.
    config: The experiment that goes on from it.
    tokenizer_fingerprint: Of what the tokens in use stand for.
    step: Which one, and no other; None is the latest.

  Returns:
    The items and the rest.

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
      manifest = checkpoint_files.read_manifest(folder)
      _check_files(folder, manifest, abstract)
      _check_origin(manifest, config, tokenizer_fingerprint, folder)
      _check_arrays(manifest, abstract, folder)
      restored = _read(manager, candidate, manifest, abstract)
    except checkpoint_files.Damaged as damage:
      damaged[candidate] = str(damage)
      continue
    if damaged:
      _set_aside(manager, damaged, candidate)
    return restored
  raise errors.UserError(f'{damaged[steps[0]]}; {_way_out(manager, step)}')


def _check_files(folder, manifest, abstract) -> None:
  """Raises `Damaged` in all processes if one of them finds damage.

  Processes that read together must agree before, since one that fails would
  leave the others waiting for it. Each reads some of the arrays for that. A
  single process notices while it restores.
  """
  if not distributed.is_together():
    return
  names = [
    name for name in manifest['checksums'] if name.split('/')[0] in abstract
  ]
  mine = names[jax.process_index() :: jax.process_count()]
  damages = checkpoint_files.find_damages(folder, manifest, mine)
  found = distributed.gather('damage', next(iter(damages.values()), ''))
  for damage in filter(None, found):
    raise checkpoint_files.Damaged(damage)


def _read(manager, step, manifest, abstract) -> Restored:
  """Reads data and items, and compares the items' checksums."""
  folder = manager.directory / str(step)
  items = {
    name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()
  }
  arguments = ocp.args.Composite(data=ocp.args.JsonRestore(), **items)
  try:
    with checkpoint_files.quiet():
      restored = manager.restore(step, args=arguments)
  except Exception as error:
    raise checkpoint_files.unreadable(folder, error) from error
  checkpoint_files.check_data(folder, manifest, restored['data'])
  state = {name: restored[name] for name in abstract}
  for name, (checksum, _) in checksums.inspect(state).items():
    if manifest['checksums'][name] != checksum:
      raise checkpoint_files.changed(folder, name)
  return Restored(step, state, restored['data'], manifest)


def _set_aside(manager, damaged: Mapping[int, str], good: int) -> None:
  """Says what is damaged, and moves it out of the way of later saves."""

  def move():
    for step, damage in damaged.items():
      moved = ''
      if not manager.is_read_only:
        place = checkpoint_files.move_aside(manager.directory / str(step))
        moved = f'; moved to {place}'
      logging.warning('%s%s. Going on from step %d.', damage, moved, good)

  distributed.first_does('damaged', move)
  manager.reload()


@contextlib.contextmanager
def explain_divergence(manager: ocp.CheckpointManager) -> Iterator[None]:
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
  """Refuses a checkpoint of other tokens or another model."""
  if manifest['tokenizer_fingerprint'] != tokenizer_fingerprint:
    raise errors.UserError(
      f'{folder} was trained on other tokens (fingerprint '
      f'{manifest["tokenizer_fingerprint"]}) than those of this config '
      f'({tokenizer_fingerprint}); set data.tokenizer or data.task to that of '
      'the run, or use another --workdir.'
    )
  theirs = configs.from_json(manifest['config'])
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
  """Refuses a checkpoint whose arrays are not those asked for."""
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
  """Shape and type of every array of a tree, by path."""
  return {
    parameters.path_name(path): {
      'shape': list(x.shape),
      'dtype': str(x.dtype),
    }
    for path, x in jax.tree.leaves_with_path(tree)
  }


@functools.cache
def _software() -> dict[str, str | None]:
  """The versions that a checkpoint is written by, and the code's commit."""
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


def _way_out(manager, step: int | None) -> str:
  if step is not None:
    return 'read another step.'
  others = len(manager.all_steps()) - 1
  also = f', and so are the {others} before it' if others else ''
  return f'there is no earlier one{also}: start again in another --workdir.'
