"""The files of a checkpoint, read on the host, one array at a time.

Needs no device and no more memory than the largest array, so that a checkpoint
can be looked at while a run trains, and on a machine that could not hold it.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any

from absl import logging
import jax
import numpy as np
from orbax import checkpoint as ocp

from nested_learning import errors
from nested_learning import parameters
from nested_learning.training import checksums

FORMAT = 'nested_learning 3'
# Before 3 a checkpoint held neither the shapes of its arrays nor the guard's
# counts: its parameters can be read, and no training goes on from it.
_READABLE = (FORMAT, 'nested_learning 2')


class Damaged(Exception):
  """A checkpoint cannot be read as it was written."""


def steps(workdir: pathlib.Path) -> list[int]:
  """The steps of which a run has a checkpoint, first to last."""
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """What a checkpoint says of itself.

  Args:
    folder: Of one step.

  Raises:
    Damaged: It cannot be read.
    errors.UserError: It is not one of this trainer.
  """
  try:
    manifest = json.loads((folder / 'manifest' / 'metadata').read_text())
  except (OSError, ValueError) as error:
    raise unreadable(folder, error) from error
  if not isinstance(manifest, dict) or manifest.get('format') not in _READABLE:
    raise errors.UserError(
      f'{folder} is not a checkpoint of this trainer; use another --workdir.'
    )
  expected = manifest.pop('manifest_checksum', None)
  if manifest['format'] == FORMAT and expected != checksums.of_json(manifest):
    raise changed(folder, 'the manifest')
  return manifest


def check_data(
  folder: pathlib.Path, manifest: Mapping[str, Any], data: Any
) -> None:
  """Raises `Damaged` if the data's state is not the one that was saved."""
  expected = manifest.get('data_checksum')  # not before format 3
  if expected is not None and expected != checksums.of_json(data):
    raise changed(folder, "the data's state")


def read_arrays(
  folder: pathlib.Path, names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray | Damaged]]:
  """Reads arrays one after the other into the host's memory.

  Args:
    folder: Of one step.
    names: Paths of the arrays, the item first, as in 'params/embed'.

  Yields:
    Each name with its array, or with what is wrong with it.
  """
  metadata = {}
  handler = ocp.PyTreeCheckpointHandler()
  for name in names:
    item, _, path = name.partition('/')
    try:
      with quiet():
        if item not in metadata:
          metadata[item] = handler.metadata(folder / item).tree
        array = _read_array(handler, folder / item, metadata[item], path)
    except Exception as error:  # of several packages
      array = unreadable(folder, error)
    yield name, array


def find_damages(
  folder: pathlib.Path, manifest: Mapping[str, Any], names: Iterable[str]
) -> dict[str, str]:
  """Compares arrays with their checksums.

  Args:
    folder: Of one step.
    manifest: Its manifest.
    names: Paths of the arrays to read.

  Returns:
    From the name of each array that is damaged to what is wrong with it.
  """
  damages = {}
  for name, array in read_arrays(folder, names):
    damage = find_damage(folder, manifest, name, array)
    if damage:
      damages[name] = str(damage)
  return damages


def find_damage(
  folder: pathlib.Path,
  manifest: Mapping[str, Any],
  name: str,
  array: np.ndarray | Damaged,
) -> Damaged | None:
  """What is wrong with an array that `read_arrays` gave, if anything is."""
  if isinstance(array, Damaged):
    return array
  if checksums.of_numpy(array) != manifest['checksums'][name]:
    return changed(folder, name)
  return None


def move_aside(folder: pathlib.Path) -> pathlib.Path:
  """Moves a step's folder to `checkpoints_damaged`, and returns its place."""
  home = folder.parents[1] / 'checkpoints_damaged'
  home.mkdir(exist_ok=True)
  place, number = home / folder.name, 1
  while place.exists():
    number += 1
    place = home / f'{folder.name}-{number}'
  return folder.rename(place)


def unreadable(folder: pathlib.Path, error: Exception) -> Damaged:
  """What to raise where reading fails."""
  first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return Damaged(f'{folder} cannot be read ({first_line[:200]})')


def changed(folder: pathlib.Path, name: str) -> Damaged:
  """What to raise where something is not what was saved."""
  return Damaged(
    f'{folder} is damaged: the checksum of {name} differs from that of what '
    'was saved'
  )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps Orbax from logging at length what an error then says."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _read_array(handler, folder: pathlib.Path, metadata, path) -> np.ndarray:
  """Reads one array of an item, and none of the others."""
  names = [
    parameters.path_name(keys)
    for keys, _ in jax.tree.leaves_with_path(metadata)
  ]
  if path not in names:
    raise ValueError(f'{folder.name}/{path} is not there')
  structure = jax.tree.structure(metadata)
  wanted = [np.zeros(()) if name == path else ocp.PLACEHOLDER for name in names]
  restored = handler.restore(
    folder,
    args=ocp.args.PyTreeRestore(
      item=structure.unflatten(wanted),
      restore_args=structure.unflatten(
        [ocp.RestoreArgs(restore_type=np.ndarray)] * len(names)
      ),
    ),
  )
  return np.asarray(jax.tree.leaves(restored)[names.index(path)])
