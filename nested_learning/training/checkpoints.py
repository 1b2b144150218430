"""Checkpoints: the whole training state, the data's position, a manifest.

Orbax writes them in the background, each in a folder that gets its name only
when it is complete: a process killed in the middle of a save leaves the one
before. The manifest holds a checksum per array, since neither Orbax nor a file
system notices all damage.
"""

from collections.abc import Iterator, Mapping
import contextlib
import pathlib
import time
from typing import Any, NamedTuple
import zlib

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from orbax import checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from nested_learning import configs
from nested_learning import errors
from nested_learning import parameters
from nested_learning.training import config as config_lib

_FORMAT = 'nested_learning 2'
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
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    cleanup_tmp_directories=not read_only,
    read_only=read_only,
  )
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  with _quiet():
    manager = _Manager(folder, options=options)
  return contextlib.closing(manager)


class _Manager(ocp.CheckpointManager):
  """A manager that leaves it to the trainer to ask whether to stop.

  It would ask for its statistics, with numbers of its own and from its own
  thread. JAX takes the last number for the place where a process is, and might
  settle on one that another process has passed.
  """

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
  checksums, finite = {}, {}
  for name, tree in state.items():
    for path, (checksum, is_finite) in inspect(tree).items():
      checksums[f'{name}/{path}'] = checksum
      finite[f'{name}/{path}'] = is_finite
  bad = [name for name, is_finite in finite.items() if not is_finite]
  if bad:
    raise FloatingPointError(f'{bad[0]} is not finite after step {step}')
  manifest = {
    'format': _FORMAT,
    'step': step,
    'config': configs.to_json(config),
    'tokenizer_fingerprint': tokenizer_fingerprint,
    'train_seconds': train_seconds,
    'time': time.strftime('%Y-%m-%d %H:%M:%S'),
    'jax': jax.__version__,
    'checksums': checksums,
  }
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
  """Reads a checkpoint, and refuses one that is damaged or not this run's.

  Args:
    manager: From `open_manager`.
    abstract: The items to read, `jax.ShapeDtypeStruct`s with shardings.
    config: The experiment that goes on from it.
    tokenizer_fingerprint: Of what the tokens in use stand for.
    step: Which one; None is the latest.

  Returns:
    The items and the rest.

  Raises:
    errors.UserError: There is none, it cannot be read whole, an array's
      checksum differs, or model or tokenizer differ from those that wrote it.
  """
  step = manager.latest_step() if step is None else step
  if step is None:
    raise errors.UserError(
      f'{manager.directory} holds no checkpoint; run --mode=train first, or '
      'give the --workdir of a run that has one.'
    )
  folder = manager.directory / str(step)
  manifest = _restore(
    manager, step, {'manifest': ocp.args.JsonRestore()}, folder
  )['manifest']
  if not isinstance(manifest, dict) or manifest.get('format') != _FORMAT:
    raise errors.UserError(
      f'{folder} is not a checkpoint of this trainer; use another --workdir.'
    )
  _check_origin(manifest, config, tokenizer_fingerprint, folder)
  items = {
    name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()
  }
  restored = _restore(
    manager, step, {'data': ocp.args.JsonRestore(), **items}, folder
  )
  state = {name: restored[name] for name in abstract}
  for name, tree in state.items():
    for path, (checksum, _) in inspect(tree).items():
      if manifest['checksums'].get(f'{name}/{path}') != checksum:
        raise errors.UserError(
          f'{folder} is damaged: the checksum of {name}/{path} differs from '
          f'that of the array that was saved; {_way_out(manager, step)}'
        )
  return Restored(step, state, restored['data'], manifest)


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
      'raise train.warmup_steps, and run again.'
    ) from error


def inspect(tree: Any) -> dict[str, tuple[int, bool]]:
  """The checksum of every array of a tree, and whether it is all finite.

  The checksum is a sum modulo 2^32 of the array's words times odd weights made
  from their places. It is integer arithmetic on the devices that hold the
  array, so it is the same on any mesh, and any one changed word changes it.

  Args:
    tree: Arrays of floating, integer or boolean types.

  Returns:
    From path to checksum and finiteness.
  """
  names = [
    parameters.path_name(path) for path, _ in jax.tree.leaves_with_path(tree)
  ]
  values = jax.device_get(_inspect(jax.tree.leaves(tree)))
  return {
    name: (int(checksum), bool(finite))
    for name, (checksum, finite) in zip(names, values, strict=True)
  }


@jax.jit
def _inspect(leaves):
  return [(_checksum(x), jnp.all(jnp.isfinite(x))) for x in leaves]


def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  weights = jnp.ones(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    # An odd factor per axis, so that every word's weight is odd.
    factor = np.uint32(zlib.crc32(bytes([axis])) | 1)
    index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    weights *= 2 * (index * factor) + 1
  return jnp.sum(words * weights, dtype=jnp.uint32)


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


def _restore(manager, step, args, folder):
  """Reads items, with what goes wrong in one line."""
  try:
    # Orbax logs at length what the error then says.
    with _quiet():
      return manager.restore(step, args=ocp.args.Composite(**args))
  except Exception as error:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise errors.UserError(
      f'{folder} cannot be read ({first_line[:200]}); {_way_out(manager, step)}'
    ) from error


def _way_out(manager, step: int) -> str:
  earlier = [s for s in manager.all_steps() if s < step]
  if not earlier:
    return 'there is no earlier one: start again in another --workdir.'
  return f'move that folder away to go on from step {max(earlier)}.'


@contextlib.contextmanager
def _quiet():
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)
