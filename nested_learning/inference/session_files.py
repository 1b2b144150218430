"""Files of sessions: versioned, checksummed, written whole or not at all.

magic, 8 bytes | length of the header, 8 bytes | header, JSON
| arrays, little-endian, one after the other | SHA-256 of all before it
"""

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
import struct
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  so that NumPy knows bfloat16 by its name
import numpy as np

from nested_learning import errors

VERSION = 2
_MAGIC = b'NLSESSN\n'
_LENGTH = struct.Struct('<Q')
_DIGEST = hashlib.sha256().digest_size


class Content(NamedTuple):
  """What a file holds: a header that is JSON-able, and arrays by name."""

  header: Mapping[str, Any]
  arrays: Mapping[str, np.ndarray]


def write(path: str | pathlib.Path, content: Content) -> int:
  """Writes a file: all of it takes the place of the old one, or nothing does.

  Args:
    path: Of the file; its folder must exist.
    content: What it will hold.

  Returns:
    Bytes written.

  Raises:
    errors.UserError: The folder does not exist or cannot be written to.
  """
  path = pathlib.Path(path)
  arrays = {
    name: np.ascontiguousarray(x).astype(x.dtype.newbyteorder('<'), copy=False)
    for name, x in content.arrays.items()
  }
  header = dict(content.header)
  header['version'] = VERSION
  header['arrays'] = [
    [name, x.dtype.name, list(x.shape)] for name, x in arrays.items()
  ]
  text = json.dumps(header).encode()
  # One name: what a killed process leaves behind, the next one overwrites.
  partial = path.with_name(f'.{path.name}.partial')
  try:
    with open(partial, 'wb') as file:
      digest = hashlib.sha256()
      for part in (
        _MAGIC,
        _LENGTH.pack(len(text)),
        text,
        *(x.tobytes() for x in arrays.values()),
      ):
        digest.update(part)
        file.write(part)
      file.write(digest.digest())
      file.flush()
      os.fsync(file.fileno())
      size = file.tell()
    os.replace(partial, path)
    _sync_folder(path.parent)
  except OSError as error:
    raise errors.UserError(
      f'the session cannot be written to {path} ({error.strerror}); give a '
      'path in a folder that exists and can be written to.'
    ) from error
  return size


def read(path: str | pathlib.Path) -> Content:
  """Reads a file that `write` wrote, whole and unchanged.

  Args:
    path: Of the file.

  Returns:
    What it holds.

  Raises:
    errors.UserError: It cannot be read, is no session, is of another version,
      is cut short, or has been changed.
  """
  path = pathlib.Path(path)
  try:
    data = path.read_bytes()
  except OSError as error:
    raise errors.UserError(
      f'the session {path} cannot be read ({error.strerror}); check the path.'
    ) from error
  start = len(_MAGIC) + _LENGTH.size
  if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
    raise errors.UserError(
      f'{path} is no session; give the path of one, or of none yet.'
    )
  way_out = 'use a copy of it, or another path to begin anew.'
  cut = errors.UserError(f'the session {path} is cut short; {way_out}')
  if len(data) < start + _DIGEST:
    raise cut
  (length,) = _LENGTH.unpack_from(data, len(_MAGIC))
  digest = hashlib.sha256(data[:-_DIGEST]).digest()
  whole = digest == data[-_DIGEST:]
  try:
    header = json.loads(data[start : start + length])
    version = header['version']
    places = _places(header['arrays'], start + length)
  except (ValueError, KeyError, TypeError) as error:
    if len(data) < start + length + _DIGEST:
      raise cut from error
    raise _changed(path, way_out) from error
  end = places[-1][1] if places else start + length
  if version != VERSION:
    raise errors.UserError(
      f'the session {path} is of version {version}, and this program reads '
      f'version {VERSION}; use the program that wrote it, or another path.'
    )
  if len(data) < end + _DIGEST:
    raise cut
  if not whole or len(data) > end + _DIGEST:
    raise _changed(path, way_out)
  arrays = {}
  for (name, dtype, shape), (begin, end) in zip(
    header['arrays'], places, strict=True
  ):
    array = np.frombuffer(data[begin:end], np.dtype(dtype)).reshape(shape)
    arrays[name] = array
  return Content(header, arrays)


def _changed(path, way_out):
  return errors.UserError(
    f'the session {path} is damaged or was edited: its checksum differs from '
    f'that of what was written; {way_out}'
  )


def _places(arrays, start):
  """First and last byte of each array."""
  places = []
  for _, dtype, shape in arrays:
    end = start + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
    places.append((start, end))
    start = end
  return places


def _sync_folder(folder: pathlib.Path) -> None:
  """Makes the new name outlive a loss of power."""
  if os.name != 'posix':
    return
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
