"""Text files: finding and reading them.

A source is 'stdlib' (the Python standard library's own sources on this
machine), a folder, a file, or a glob pattern. One file is one document.
"""

from collections.abc import Iterator, Sequence
import fnmatch
import functools
import glob
import os
import pathlib
import sysconfig
from typing import NamedTuple

from nested_learning import errors
from nested_learning import files

# Folders of the standard library that are skipped: installed packages, tests
# (some are badly encoded on purpose), and two packages of generated tables.
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

  Symbolic links are followed. A file that several paths lead to is listed once,
  by a path without links if there is one; a loop of links is entered once.

  Args:
    source: 'stdlib', a folder (every file below it that is not hidden), a
      file, or a glob pattern, in which `**` stands for any number of folders.

  Returns:
    The files that hold at least one byte.

  Raises:
    errors.UserError: The source does not exist, holds no text, or names a file
      that cannot be read.
  """
  if source == 'stdlib':
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    paths = [p for p in _walk(root, skip=_NOT_IN_STDLIB) if p.suffix == '.py']
  else:
    root, paths = _resolve(source)
  found = []
  for path in _without_repeats(root, paths):
    try:
      stat = path.stat()
    except OSError as error:
      raise unreadable(path, error) from error
    if stat.st_size:
      name = path.relative_to(root).as_posix()
      found.append(TextFile(name, path, stat.st_size, stat.st_mtime_ns))
  if not found:
    raise errors.UserError(
      f'data.source={source!r} holds no text: none of the {len(paths)} files '
      f'found under {files.shown(root)} has any content. Give a folder or a '
      'glob pattern of text files.'
    )
  return sorted(found)


def read_text(path: str | os.PathLike) -> str:
  r"""Reads a text file as it is: `\r\n` stays `\r\n`.

  Args:
    path: A file encoded as UTF-8.

  Returns:
    Its text.

  Raises:
    errors.UserError: The file cannot be read, or is not UTF-8 text.
  """
  try:
    content = pathlib.Path(path).read_bytes()
  except (OSError, ValueError) as error:
    raise unreadable(path, error) from error
  way_out = 'Convert it to UTF-8, or leave it out.'
  if b'\0' in content:
    raise errors.UserError(
      f'{files.shown(path)} is a binary file (NUL bytes). {way_out}'
    )
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f'{files.shown(path)} is not UTF-8 text (byte {error.start}). {way_out}'
    ) from error


def check_unchanged(listed: Sequence[TextFile]) -> None:
  """Raises `errors.UserError` if a file has changed since it was listed."""
  for file in listed:
    try:
      stat = file.path.stat()
    except OSError as error:
      raise unreadable(file.path, error) from error
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime):
      raise errors.UserError(
        f'{files.shown(file.path)} changed while it was read. Start again when '
        'nobody writes to it.'
      )


def unreadable(
  path: str | os.PathLike, error: OSError | ValueError
) -> errors.UserError:
  """Returns the error for a file or folder that the system refuses."""
  reason = getattr(error, 'strerror', None) or error
  return errors.UserError(
    f'{files.shown(path)} cannot be read ({reason}). Correct its permissions '
    'or its link, or leave it out with a glob pattern in data.source.'
  )


def _resolve(source: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """Returns the folder that names are relative to, and the paths found."""
  path = pathlib.Path(os.path.expanduser(source))
  if source and os.path.isdir(path):
    return path, _walk(path)
  if os.path.isfile(path):
    return path.parent, [path]
  if not glob.has_magic(source):
    raise errors.UserError(
      f"data.source={source!r} does not exist. Give 'stdlib', a folder, a "
      'file or a glob pattern of text files.'
    )
  fixed = [i for i, part in enumerate(path.parts) if glob.has_magic(part)][0]
  root = pathlib.Path(*path.parts[:fixed])
  matches = _match(root, path.parts[fixed:]) if os.path.isdir(root) else []
  paths = [match for match in matches if not os.path.isdir(match)]
  if not paths:
    raise errors.UserError(
      f'data.source={source!r} matches no file. Check the pattern (** stands '
      'for any number of folders), or give a folder.'
    )
  return root, paths


def _match(
  folder: pathlib.Path, parts: Sequence[str]
) -> Iterator[pathlib.Path]:
  """Yields the paths below `folder` that match a pattern, some repeatedly."""
  if not parts:
    yield folder
    return
  first, rest = parts[0], parts[1:]
  if first == '**':
    for below in _folders(folder):
      yield from _match(below, rest or ('*',))
  elif not os.path.isdir(folder):
    return
  elif glob.has_magic(first):
    for entry in _list(folder):
      is_hidden = entry.name.startswith('.') and not first.startswith('.')
      if not is_hidden and fnmatch.fnmatchcase(entry.name, first):
        yield from _match(folder / entry.name, rest)
  elif os.path.lexists(folder / first):
    yield from _match(folder / first, rest)


def _walk(
  root: pathlib.Path, *, skip: frozenset[str] = frozenset()
) -> list[pathlib.Path]:
  """Lists every file below a folder except hidden ones and folders to skip."""
  return [
    folder / entry.name
    for folder in _folders(root, skip=skip)
    for entry in _list(folder)
    if not entry.name.startswith('.') and not entry.is_dir()
  ]


def _folders(
  root: pathlib.Path, *, skip: frozenset[str] = frozenset()
) -> Iterator[pathlib.Path]:
  """Yields a folder and all folders below it, each once, following links."""
  seen: set[str] = set()
  # Links come last, so that plain folders are listed by their own names.
  waiting, links = [root], []
  while waiting or links:
    folder = waiting.pop() if waiting else links.pop(0)
    real = os.path.realpath(folder)
    if real in seen:
      continue
    seen.add(real)
    yield folder
    for entry in _list(folder):
      name = entry.name
      if name.startswith('.') or name in skip or not entry.is_dir():
        continue
      (links if entry.is_symlink() else waiting).append(folder / name)


def _list(folder: pathlib.Path) -> list[os.DirEntry]:
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError as error:
    raise unreadable(folder, error) from error


def _without_repeats(
  root: pathlib.Path, paths: Sequence[pathlib.Path]
) -> list[pathlib.Path]:
  """Keeps one path of each file: one without links if there is one."""
  base, kept = os.path.realpath(root), {}
  real_folder = functools.cache(os.path.realpath)
  for path in sorted(paths):
    if os.path.islink(path):
      real = os.path.realpath(path)
    else:  # resolving every path anew is slow for many files
      real = os.path.join(real_folder(path.parent), path.name)
    plain = os.path.join(base, path.relative_to(root)) == real
    if plain or real not in kept:
      kept[real] = path
  return list(kept.values())
