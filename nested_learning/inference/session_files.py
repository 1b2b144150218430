"""Files of sessions: safetensors with a checksum, written whole or not at all.

The arrays of a session are the tensors of its file. The metadata of the header
say which format, version, checkpoint, tokenizer and levels they belong to, and
hold a SHA-256 of the whole file. A file that comes from elsewhere is checked
against the model before anything of the size that it claims is allocated.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import typing
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from nested_learning import configs
from nested_learning import errors
from nested_learning import files
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning import parameters

VERSION = 6
_READABLE = ('5', '6')  # version 5 holds every array whole
_FORMAT = 'nested_learning session'
_MAGIC_BEFORE_3 = b'NLSESSN\n'  # what files of versions 1 and 2 begin with
_KEYS = ('format', 'version', 'model', 'tokenizer', 'inner', 'sha256')
_LENGTH = struct.Struct('<Q')  # of the header, at the beginning of a file
_LONGEST_HEADER = 100_000_000  # bytes, the limit of safetensors
_ZEROS = '0' * 64  # in place of the checksum while it is computed
_DTYPES = {
  'BOOL': np.bool_,
  'U8': np.uint8,
  'I8': np.int8,
  'U16': np.uint16,
  'I16': np.int16,
  'U32': np.uint32,
  'I32': np.int32,
  'U64': np.uint64,
  'I64': np.int64,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'F32': np.float32,
  'F64': np.float64,
}
# Names of the classes that the config of levels consists of.
_CONFIG_TYPES = frozenset(
  f'{cls.__module__}.{cls.__qualname__}'
  for cls in (
    levels.InnerConfig,
    levels.InnerLevelConfig,
    *typing.get_args(optimizers.OptimizerConfig),
  )
)


class Content(NamedTuple):
  """The content of a file.

  Attributes:
    metadata: Strings by name: model, tokenizer and inner; `read` adds sha256.
    arrays: Arrays by name.
  """

  metadata: Mapping[str, str]
  arrays: Mapping[str, np.ndarray]


class Seen(NamedTuple):
  """Files that a session was read from or written to.

  Attributes:
    checksums: By file, without symbolic links.
  """

  checksums: Mapping[str, str]

  def add(self, path: str | os.PathLike, checksum: str) -> 'Seen':
    """Returns the files with another one, or one as it is now."""
    return Seen({**self.checksums, str(resolve(path)): checksum})

  def check(self, path: str | os.PathLike) -> None:
    """Checks that a file is as it was seen, or is not there.

    Raises:
      errors.UserError: It holds what another session has learned.
    """
    found = read_checksum(path)
    known = self.checksums.get(str(resolve(path)))
    if found is None or found == known:
      return
    if known is None:
      raise errors.UserError(
        f'{path} already holds a session; load it, remove it, or save to '
        'another path.'
      )
    raise errors.UserError(
      f'the session {path} was changed by another program since it was read; '
      'load it again, or save to another path.'
    )


@contextlib.contextmanager
def lock(path: str | os.PathLike) -> Iterator[None]:
  """Holds a session's file for this process, so that no other one changes it.

  Args:
    path: The file, which need not exist; its folder is made.

  Yields:
    Nothing.

  Raises:
    errors.UserError: If another process holds it, or no file can be written
      there.
  """
  target = resolve(path)
  if target.exists() and not target.is_file():
    raise errors.UserError(
      f'the session {path} is a folder or a device; give the path of a file.'
    )
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.of_disk(error.errno)(
      f'the session {path} cannot be written ({error.strerror}); give another '
      'path.'
    ) from error
  with files.lock(target.with_name(f'.{target.name}.lock'), f'session {path}'):
    yield


def resolve(path: str | os.PathLike) -> pathlib.Path:
  """Returns the file that a path leads to through symbolic links.

  Raises:
    errors.UserError: If no file can have this path.
  """
  try:
    text = os.fspath(path)
    target = pathlib.Path(os.path.realpath(text))
    if not text or text.endswith(os.sep):
      raise errors.UserError(f'the session {text!r} has no name; give a path.')
    target.exists()  # fails on names that are too long, and on NUL
  except (OSError, ValueError) as error:
    if isinstance(error, errors.UserError):
      raise
    reason = getattr(error, 'strerror', None) or error
    raise errors.UserError(
      f'the session {os.fspath(path)!r} cannot be a file ({reason}); give '
      'another path.'
    ) from error
  return target


def write(path: str | os.PathLike, content: Content) -> str:
  """Writes a file: all of it takes the place of the old one, or nothing does.

  Args:
    path: The file. Only its owner may read it, for it holds what was read last.
    content: The content.

  Returns:
    Its checksum.

  Raises:
    errors.UserError: If it cannot be written.
  """
  metadata = {
    **content.metadata,
    'format': _FORMAT,
    'version': str(VERSION),
    'sha256': _ZEROS,
  }
  tensors = {
    name: np.asarray(x, order='C') for name, x in content.arrays.items()
  }
  data = safetensors_numpy.save(tensors, metadata)
  checksum = hashlib.sha256(data).hexdigest()
  files.write_whole(path, _exchange(data, _ZEROS, checksum), mode=0o600)
  return checksum


def read(path: str | os.PathLike) -> Content:
  """Reads a file that `write` wrote, whole and unchanged.

  Args:
    path: The file.

  Returns:
    Its content.

  Raises:
    errors.UserError: If it cannot be read, is not a session, is of another
      version, is cut short, or was changed.
  """
  target = resolve(path)
  try:
    if not target.is_file():
      raise errors.UserError(
        f'the session {path} cannot be read (no such file); check the path.'
      )
    data = target.read_bytes()
  except OSError as error:
    raise errors.UserError(
      f'the session {path} cannot be read ({error.strerror}); check the path.'
    ) from error
  metadata = _check_metadata(path, data)
  try:
    tensors = safetensors.deserialize(data)
  except safetensors.SafetensorError as error:
    raise _cut_short(path) from error
  checksum = metadata['sha256']
  unsigned = _exchange(data, checksum, _ZEROS)
  if hashlib.sha256(unsigned).hexdigest() != checksum:
    raise errors.UserError(
      f'the session {path} is damaged or was edited: its checksum differs from '
      'that of what was written; use a copy of it, or another path.'
    )
  arrays = {}
  for name, tensor in tensors:
    dtype = _DTYPES.get(tensor['dtype'])
    if dtype is None:
      raise errors.UserError(
        f'the session {path} has {name} as {tensor["dtype"]}, which no session '
        'holds; use another path.'
      )
    array = np.frombuffer(tensor['data'], dtype).reshape(tensor['shape'])
    arrays[name] = array
  return Content(metadata, arrays)


def read_checksum(path: str | os.PathLike) -> str | None:
  """Returns the checksum that a file claims, None where there is no file.

  Args:
    path: The file.

  Raises:
    errors.UserError: If there is something else than a session.
  """
  target = resolve(path)
  if not target.exists():
    return None
  try:
    with open(target, 'rb') as file:
      start = file.read(_LENGTH.size)
      data = start + file.read(_header_length(start))
  except OSError as error:
    raise errors.UserError(
      f'the session {path} cannot be read ({error.strerror}); check the path.'
    ) from error
  return _check_metadata(path, data)['sha256']


def write_inner(inner: levels.InnerConfig) -> str:
  """Returns a config as JSON."""
  return json.dumps(json.loads(configs.to_json(inner)))


def read_inner(path: str | os.PathLike, text: str) -> levels.InnerConfig:
  """Returns the config that `write_inner` wrote.

  A file may name the classes of such a config alone; no other one is made.

  Args:
    path: The file, for messages.
    text: The JSON.

  Raises:
    errors.UserError: If the text is not such a config.
  """
  try:
    _check_types(json.loads(text))
    inner = configs.from_json(text)
    if not isinstance(inner, levels.InnerConfig):
      raise ValueError('it is no InnerConfig')
    return inner
  except (ValueError, AttributeError, RecursionError) as error:
    raise errors.UserError(
      f'the session {path} does not say how its levels learn ({error}); use '
      'another path.'
    ) from error


def check_tokenizer(
  path: str | os.PathLike, content: Content, ours: str
) -> None:
  """Checks that a session was fed by this tokenizer; raises UserError."""
  found = content.metadata['tokenizer']
  if found != ours:
    raise errors.UserError(
      f'the session {path} was fed other tokens (fingerprint {found!r}) than '
      f'these ({ours!r}); use the tokenizer that it was begun with, or another '
      'path.'
    )


def check_model(path: str | os.PathLike, content: Content, ours: str) -> None:
  """Checks that a session belongs to this checkpoint; raises UserError."""
  found = content.metadata['model']
  if found != ours:
    raise errors.UserError(
      f'the session {path} belongs to another checkpoint (fingerprint '
      f'{found[:12]}, this one {ours[:12]}); use the checkpoint that it was '
      'begun with, or another path.'
    )


def _check_types(data: Any) -> None:
  """Checks that JSON names classes of levels and optimisers alone."""
  if isinstance(data, dict):
    name = str(data.get(configs.TYPE_KEY))
    if name not in _CONFIG_TYPES:
      raise ValueError(f'{name} is none of its configs')
    data = list(data.values())
  if isinstance(data, list):
    for item in data:
      _check_types(item)


def fingerprint(model: models.Model, params: Any) -> str:
  """Returns the SHA-256 of a model's config and all its parameters."""
  config = dataclasses.replace(model.config, max_length=1, remat='none')
  digest = hashlib.sha256(configs.to_json(config).encode())
  return _add_leaves(digest, params).hexdigest()


def state_fingerprint(clocks: Mapping[str, np.ndarray], state: Any) -> str:
  """Returns the SHA-256 of all arrays that `pack` would write."""
  return _add_leaves(_add_leaves(hashlib.sha256(), clocks), state).hexdigest()


def _add_leaves(digest: Any, tree: Any) -> Any:
  for name, x in leaves(tree):
    array = np.ascontiguousarray(x)
    digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
    digest.update(array.astype(array.dtype.newbyteorder('<')).tobytes())
  return digest


def _check_metadata(path, data: bytes) -> dict[str, str]:
  """Returns the metadata in the first bytes of a file, if it is a session."""
  if data.startswith(_MAGIC_BEFORE_3):
    raise errors.UserError(
      f'the session {path} is of version 2 or before, and this program reads '
      f'version {VERSION}; use the program that wrote it, or another path.'
    )
  length = _header_length(data)
  header = data[_LENGTH.size : _LENGTH.size + length]
  if len(header) < length or not length:
    raise _cut_short(path)
  try:
    metadata = json.loads(header)['__metadata__']
    found = metadata['format'] == _FORMAT
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise _cut_short(path) from error
  if not found:
    raise errors.UserError(f'{path} is not a session; give another path.')
  if not isinstance(metadata.get('version'), str):
    raise errors.UserError(
      f"the session {path} must have its 'version' as a string, not "
      f'{metadata.get("version")!r}; use a copy of it, or another path.'
    )
  if metadata['version'] not in _READABLE:
    raise errors.UserError(
      f'the session {path} is of version {metadata.get("version")}, and this '
      f'program reads version {VERSION}; use the program that wrote it, or '
      'another path.'
    )
  for key in _KEYS:
    if not isinstance(metadata.get(key), str):
      raise errors.UserError(
        f'the session {path} lacks {key!r} in its header; use another path.'
      )
  return metadata


def _header_length(start: bytes) -> int:
  """Returns the length of the header, 0 where there cannot be one."""
  if len(start) < _LENGTH.size:
    return 0
  (length,) = _LENGTH.unpack_from(start)
  return length if length <= _LONGEST_HEADER else 0


def _cut_short(path) -> errors.UserError:
  return errors.UserError(
    f'{path} is not a session, or is cut short or damaged; use a copy of it, '
    'or another path.'
  )


def _exchange(data: bytes, old: str, new: str) -> bytes:
  """Replaces the checksum in a header; the arrays are not searched."""
  end = _LENGTH.size + _header_length(data)
  field = '"sha256":"{}"'.format
  header = data[:end].replace(field(old).encode(), field(new).encode(), 1)
  return header + data[end:]


def leaves(tree: Any) -> list[tuple[str, Any]]:
  """Returns the arrays of a tree with their paths."""
  return [
    (parameters.path_name(path), x)
    for path, x in jax.tree.leaves_with_path(tree)
  ]
