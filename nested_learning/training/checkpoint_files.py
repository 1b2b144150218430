"""Reads and checks the files of a checkpoint, on the host, array by array.

This needs no device and no more memory than the largest array, so a checkpoint
can be inspected while a run trains, and on a machine that cannot hold it.

A checkpoint is damaged if its manifest, the state of its data or one of its
arrays is missing, cannot be parsed, or differs from its checksum. Other errors
(permissions, memory, the network) say nothing about the files. They are raised
as they are.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import errno
import functools
import json
import logging as builtin_logging
import math
import os
import pathlib
import re
import sys
from typing import Any
import warnings
import zlib

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from nested_learning import errors
from nested_learning import parameters

FORMAT = 'nested_learning 3'
# Format 2 has no shapes of arrays, no counts of skipped steps and no checksum
# of the manifest: its parameters can be read, but training cannot resume.
_READABLE = (FORMAT, 'nested_learning 2')
# Fields that every manifest has.
_FIELDS = {
  'step': int,
  'config': str,
  'tokenizer_fingerprint': str,
  'train_seconds': (int, float),
  'checksums': dict,
}
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Statuses of TensorStore that mean that a file is missing or not as written.
# Where its checksum fits or is not reached, there is a message alone.
_DAMAGE = re.compile(
  'DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|NOT_FOUND|OUT_OF_RANGE|'
  '(?![A-Z_]+: ).*Error (decoding|parsing)',
  re.DOTALL,
)


class Damaged(Exception):
  """A checkpoint cannot be read as it was written."""


def home(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of a run's checkpoints.

  Args:
    workdir: The folder of the run.

  Returns:
    An absolute path; the folder may be missing.

  Raises:
    errors.UserError: The path holds characters that Orbax takes for a pattern,
      or something that is not a folder stands in its place.
  """
  folder = pathlib.Path(workdir).absolute() / 'checkpoints'
  # Orbax globs below this path without escaping it, and would find no arrays,
  # or those of another run. TensorStore reads a backslash as a slash.
  if found := sorted(set('*?[\\') & set(str(folder))):
    raise errors.UserError(
      f'--workdir={workdir}: checkpoints cannot be kept below a path with '
      f'{" ".join(found)}; choose another name.'
    )
  try:
    str(folder).encode()
  except UnicodeEncodeError as error:
    raise errors.UserError(
      f'--workdir={ascii(str(workdir))} is not UTF-8; choose another name.'
    ) from error
  if folder.exists() and not folder.is_dir():
    raise errors.UserError(
      f'{folder} is not a folder; move it away, or use another --workdir.'
    )
  return folder


def steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps at which a run has checkpoints, in order."""
  folder = home(workdir)
  if not folder.is_dir():
    return []
  names = [path.name for path in folder.iterdir() if path.is_dir()]
  # Not str.isdigit, which takes other digits than these, nor leading zeros.
  return sorted(int(n) for n in names if re.fullmatch('0|[1-9][0-9]*', n))


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Reads and checks the manifest of a checkpoint.

  Args:
    folder: The folder of one step, named by that step.

  Returns:
    The fields of the manifest.

  Raises:
    Damaged: The manifest is missing, cannot be parsed, was changed, or is that
      of another step.
    errors.UserError: Another version of this package wrote it.
  """
  manifest = _read_json(folder, 'manifest')
  if not isinstance(manifest, dict):
    raise Damaged(f'{folder} is damaged: its manifest is no JSON object')
  expected = manifest.pop('manifest_checksum', None)
  if expected is not None and expected != json_checksum(manifest):
    raise changed(folder, 'the manifest')
  written_as = manifest.get('format')
  if written_as not in _READABLE and expected is not None:
    raise errors.UserError(
      f'{folder} has the format {written_as!r}, and this version reads '
      f'{", ".join(map(repr, _READABLE))}; use the version that wrote it, or '
      'another --workdir.'
    )
  if written_as not in _READABLE or (written_as == FORMAT and expected is None):
    raise Damaged(f'{folder} is not a checkpoint of this trainer')
  wrong = _wrong_field(manifest)
  if wrong is not None:
    raise Damaged(f'{folder} is damaged: its manifest has a wrong {wrong}')
  if manifest['step'] != int(folder.name):
    raise Damaged(
      f'{folder} is damaged: it holds the checkpoint of step {manifest["step"]}'
    )
  return manifest


def _wrong_field(manifest: Mapping[str, Any]) -> str | None:
  """Returns the first field of a manifest with a wrong value, or None."""
  for name, kind in _FIELDS.items():
    value = manifest.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
      return f'{name}={value!r:.40}'
  if not 0 <= manifest['train_seconds'] < math.inf:
    return f'train_seconds={manifest["train_seconds"]}'
  for name, checksum in manifest['checksums'].items():
    if type(checksum) is not int:
      return f'checksum {checksum!r:.40} of {name}'
  arrays = manifest.get('arrays', {})
  if not isinstance(arrays, dict):
    return f'arrays={arrays!r:.40}'
  for name, array in arrays.items():
    if not isinstance(array, dict) or not {'shape', 'dtype'} <= array.keys():
      return f'shape of {name}'
  try:
    config = json.loads(manifest['config'])
  except (ValueError, RecursionError):
    config = None
  return None if isinstance(config, dict) else 'config'


def read_data(folder: pathlib.Path, manifest: Mapping[str, Any]) -> Any:
  """Reads the state of the data iterator.

  Args:
    folder: The folder of one step.
    manifest: Its manifest.

  Returns:
    The state, as `save` got it.

  Raises:
    Damaged: It is missing, cannot be parsed or was changed.
  """
  data = _read_json(folder, 'data')
  expected = manifest.get('data_checksum')  # not before format 3
  if expected is not None and expected != json_checksum(data):
    raise changed(folder, "the data's state")
  return data


def read_arrays(
  folder: pathlib.Path, names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray | Damaged]]:
  """Reads arrays one after the other into the host's memory.

  Args:
    folder: The folder of one step.
    names: Paths of the arrays, the item first, as in 'params/embed'.

  Yields:
    Each name with its array, or with the damage that keeps it from being read.
  """
  for name in names:
    item, _, path = name.partition('/')
    # Without Orbax: its own files beside the arrays may be damaged.
    store = {
      'driver': 'ocdbt',
      'base': {'driver': 'file', 'path': f'{folder.absolute() / item}/'},
      'path': path.replace('/', '.'),
    }
    try:
      opened = tensorstore.open({'driver': 'zarr', 'kvstore': store}, read=True)
      array = opened.result().read().result()
    except ValueError as error:
      status = str(error)
      if status.startswith('PERMISSION_DENIED'):
        reason = os.strerror(errno.EACCES)
        raise PermissionError(errno.EACCES, reason, str(folder)) from error
      if not _DAMAGE.match(status):
        raise
      array = unreadable(folder, error)
    yield name, array


def find_damages(
  folder: pathlib.Path, manifest: Mapping[str, Any], names: Iterable[str]
) -> dict[str, str]:
  """Compares arrays with their checksums.

  Args:
    folder: The folder of one step.
    manifest: Its manifest.
    names: Paths of the arrays to read.

  Returns:
    A mapping from the path of each damaged array to its damage.
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
  """Returns the damage of an array that `read_arrays` gave, or None."""
  if isinstance(array, Damaged):
    return array
  if array_checksum(array) != manifest['checksums'][name]:
    return changed(folder, name)
  return None


def move_aside(folder: pathlib.Path) -> pathlib.Path:
  """Moves a step's folder to `checkpoints_damaged` and returns its new path.

  Raises:
    errors.UserError: It cannot be moved there.
  """
  there = folder.parents[1] / 'checkpoints_damaged'
  place, number = there / folder.name, 1
  try:
    there.mkdir(exist_ok=True)
    while place.exists():
      number += 1
      place = there / f'{folder.name}-{number}'
    return folder.rename(place)
  except OSError as error:
    raise errors.of_disk(error.errno)(
      f'{folder} is damaged and cannot be moved to {there}: {error.strerror}; '
      'move it away.'
    ) from error


def unreadable(folder: pathlib.Path, error: Exception) -> Damaged:
  """Returns the damage of a checkpoint that cannot be read."""
  first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return Damaged(f'{folder} cannot be read ({first_line[:200]})')


def changed(folder: pathlib.Path, name: str) -> Damaged:
  """Returns the damage of a checkpoint with a part that differs."""
  return Damaged(
    f'{folder} is damaged: the checksum of {name} differs from that of what '
    'was saved'
  )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Drops the messages of Orbax; its errors are raised as well."""
  _silence_threads()
  logger = logging.get_absl_logger()
  keep = lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


@functools.cache
def _silence_threads() -> None:
  """Drops what a failed save prints later, from threads and at exit."""
  builtin_logging.getLogger('asyncio').addFilter(
    lambda record: f'{os.sep}orbax{os.sep}' not in record.getMessage()
  )
  warnings.filterwarnings(
    'ignore', 'coroutine .*(serialize|run_sync|Handler|cancellable)'
  )
  report = sys.unraisablehook

  def hook(unraisable):
    # The second is of an event loop that had no file to open.
    closed = any(
      text in str(unraisable.exc_value)
      for text in ('Event loop is closed', "no attribute '_ssock'")
    )
    if not closed and 'async_serialize' not in repr(unraisable.object):
      report(unraisable)

  sys.unraisablehook = hook


def _read_json(folder: pathlib.Path, item: str) -> Any:
  try:
    return json.loads((folder / item / 'metadata').read_text(encoding='utf-8'))
  except (*_MISSING, ValueError, RecursionError) as error:
    raise unreadable(folder, error) from error


# Checksums. A checksum is the sum modulo 2^32 of an array's words times odd
# weights made from their indices. A change of any one word changes it, and as
# integer arithmetic it is the same on one device, on any mesh and in NumPy.


def tree_checksums(tree: Any) -> dict[str, tuple[int, bool]]:
  """Computes checksums on the devices that hold the arrays.

  Args:
    tree: Arrays of floating, integer or boolean types.

  Returns:
    A mapping from the path of each array to its checksum, and whether all its
    numbers are finite.
  """
  names = [
    parameters.path_name(path) for path, _ in jax.tree.leaves_with_path(tree)
  ]
  values = jax.device_get(_inspect(jax.tree.leaves(tree)))
  return {
    name: (int(checksum), bool(finite))
    for name, (checksum, finite) in zip(names, values, strict=True)
  }


def array_checksum(x: np.ndarray) -> int:
  """Computes the checksum of `tree_checksums` without a device."""
  if x.dtype == np.bool_:
    x = x.astype(np.uint8)
  word = np.dtype(_word(x.dtype))
  words = np.ascontiguousarray(x).reshape(*x.shape, 1).view(word)
  if x.dtype.itemsize <= word.itemsize:
    words = words[..., 0]
  # The weights are a product over axes, so one axis is summed at a time.
  total = words.astype(np.uint32)
  for axis in reversed(range(words.ndim)):
    index = np.arange(words.shape[axis], dtype=np.uint32)
    total = np.matmul(total, 2 * (index * _factor(axis)) + 1)
  return int(total)


def json_checksum(value: Any) -> int:
  """Computes the checksum of a JSON value, whatever its spacing."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _inspect(leaves):
  return [(_checksum(x), jnp.all(jnp.isfinite(x))) for x in leaves]


def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:  # bools cannot be bitcast
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, _word(x.dtype)).astype(jnp.uint32)
  weights = jnp.ones(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    weights *= 2 * (index * _factor(axis)) + 1
  return jnp.sum(words * weights, dtype=jnp.uint32)


def _word(dtype):
  return {1: jnp.uint8, 2: jnp.uint16}.get(dtype.itemsize, jnp.uint32)


def _factor(axis: int) -> np.uint32:
  """Returns an odd number for every axis, so every word's weight is odd."""
  return np.uint32(zlib.crc32(bytes([axis])) | 1)
