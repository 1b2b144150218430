"""Text files to learn from: found, read and split by file.

A source is 'stdlib' (the Python standard library's own sources on this
machine), a folder, a file, or a glob pattern. One file is one document.
"""

from collections.abc import Iterable, Sequence
import glob
import hashlib
import os
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

from nested_learning import errors

# Below the standard library: other people's code, tests (some of which are
# badly encoded on purpose), and the two packages that are generated tables.
_NOT_IN_STDLIB = frozenset(
  [
    'site-packages',
    'dist-packages',
    'test',
    'tests',
    'idle_test',
    'encodings',
    'pydoc_data',
  ]
)


class TextFile(NamedTuple):
  """One document: `name` is its path relative to the source, with slashes."""

  name: str
  path: pathlib.Path
  size: int  # bytes
  mtime: int  # nanoseconds


def find_files(source: str) -> list[TextFile]:
  """Lists the files of a source, sorted by name; empty files are left out.

  Args:
    source: 'stdlib', a folder (every file below it that is not hidden), a
      file, or a glob pattern, in which `**` stands for any number of folders.

  Returns:
    The files that hold at least one byte.

  Raises:
    UserError: The source does not exist, holds no text, or names a file that
      cannot be read.
  """
  if source == 'stdlib':
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    paths = [p for p in _walk(root, skip=_NOT_IN_STDLIB) if p.suffix == '.py']
  else:
    root, paths = _resolve(source)
  files = []
  for path in paths:
    try:
      stat = path.stat()
    except OSError as error:
      raise _unreadable(path, error) from error
    if stat.st_size:
      name = path.relative_to(root).as_posix()
      files.append(TextFile(name, path, stat.st_size, stat.st_mtime_ns))
  if not files:
    raise errors.UserError(
      f'data.source={source!r} holds no text: none of the {len(paths)} files '
      f'found under {root} has any content. Give a folder or a glob pattern '
      'of text files.'
    )
  return sorted(files)


def read_text(path: pathlib.Path) -> str:
  """Reads a text file as it is, line endings included.

  Args:
    path: A file encoded as UTF-8.

  Returns:
    Its text.

  Raises:
    UserError: The file cannot be read, or is not UTF-8 text.
  """
  try:
    content = path.read_bytes()
  except OSError as error:
    raise _unreadable(path, error) from error
  way_out = (
    'Convert it to UTF-8, or leave it out with a glob pattern such as '
    f"data.source='{path.parent}/**/*.txt'."
  )
  if b'\0' in content:
    raise errors.UserError(f'{path} is a binary file (NUL bytes). {way_out}')
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f'{path} is not UTF-8 text (byte {error.start}). {way_out}'
    ) from error


def is_validation(names: Sequence[str], fraction: float) -> np.ndarray:
  """Chooses the files of the validation split by a hash of their names.

  A file keeps its side when others come and go, and wherever the folder lies.
  With two files or more, both sides have at least one.

  Args:
    names: Relative paths of the files.
    fraction: Share of the files to hold out, in [0, 1).

  Returns:
    bool [files], True where a file belongs to the validation split.
  """
  return choose(places(names), fraction)


def places(names: Iterable[str]) -> np.ndarray:
  """Where each name lies in [0, 1), by its hash; float64 [names]."""
  digests = (hashlib.sha256(os.fsencode(name)).digest() for name in names)
  return np.fromiter(
    (int.from_bytes(d[:6], 'big') / 2**48 for d in digests), np.float64
  )


def choose(places: np.ndarray, fraction: float) -> np.ndarray:
  """Chooses the places below a fraction; see `is_validation`."""
  chosen = places < fraction
  if fraction and len(places) > 1:
    chosen[places.argmin()] = True
    chosen[places.argmax()] = False
  return chosen


def _resolve(source: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """The folder that names are relative to, and the paths of a source."""
  path = pathlib.Path(source).expanduser()
  if source and path.is_dir():
    return path, _walk(path)
  if path.is_file():
    return path.parent, [path]
  if not glob.has_magic(source):
    raise errors.UserError(
      f"data.source={source!r} does not exist. Give 'stdlib', a folder, a "
      'file or a glob pattern of text files.'
    )
  matches = [pathlib.Path(p) for p in glob.glob(str(path), recursive=True)]
  paths = [p for p in matches if not p.is_dir()]
  if not paths:
    raise errors.UserError(
      f'data.source={source!r} matches no file. Check the pattern (** stands '
      'for any number of folders), or give a folder.'
    )
  fixed = [i for i, part in enumerate(path.parts) if glob.has_magic(part)][0]
  return pathlib.Path(*path.parts[:fixed]), paths


def _walk(
  root: pathlib.Path, *, skip: frozenset[str] = frozenset()
) -> list[pathlib.Path]:
  """Every file below a folder, but for hidden ones and folders to skip."""
  paths = []
  for folder, subfolders, names in os.walk(root, onerror=_raise_unreadable):
    subfolders[:] = [
      name
      for name in subfolders
      if not name.startswith('.') and name not in skip
    ]
    paths += [pathlib.Path(folder, n) for n in names if not n.startswith('.')]
  return paths


def _raise_unreadable(error: OSError):
  raise _unreadable(error.filename, error) from error


def _unreadable(path, error: OSError) -> errors.UserError:
  return errors.UserError(
    f'{path} cannot be read ({error.strerror}). Mend its permissions or its '
    'link, or leave it out with a glob pattern in data.source.'
  )
