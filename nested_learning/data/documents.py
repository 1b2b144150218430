"""Documents: texts by number, from text files and from lines of JSON."""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
import gzip
import itertools
import json
import os
import threading
from typing import Any, IO
import zlib

from nested_learning import errors
from nested_learning import files
from nested_learning.data import sources
from nested_learning.data import tokenizers


class Documents:
  """Texts by number, first to last, for `grain.MapDataset.source`.

  Every format defines `__len__`, `__getitem__`, `name` and `identity`.

  Attributes:
    spec: The source as the config names it.
  """

  def __init__(self, spec: str):
    self.spec = spec

  def __repr__(self) -> str:  # Grain identifies a source by it
    return f'{type(self).__name__}({self.spec!r})'

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))

  def __len__(self) -> int:
    raise NotImplementedError

  def __getitem__(self, index: int) -> str:
    raise NotImplementedError

  def name(self, index: int) -> str:
    """Returns the name of a document, which is the same on every machine."""
    return f'{index}'

  def identity(self) -> Iterator[bytes]:
    """Yields bytes that change when the documents do, without reading them."""
    raise NotImplementedError

  def check_unchanged(self) -> None:
    """Raises `errors.UserError` if a file changed since this was opened."""


class Files(Documents):
  """Documents in files; a base class of formats.

  Args:
    spec: The source as the config names it.
    path: The source without its prefix.
    endings: Endings of the files to read in a folder, in any case; () is all.
  """

  def __init__(self, spec: str, path: str, *, endings: tuple[str, ...] = ()):
    super().__init__(spec)
    self._files = sources.find_files(path)
    if endings and os.path.isdir(os.path.expanduser(path)):
      self._files = [
        file for file in self._files if file.name.lower().endswith(endings)
      ]
      if not self._files:
        raise errors.UserError(
          f'data.source={spec!r} holds no file that ends in '
          f'{" or ".join(endings)}; give a glob pattern of the files.'
        )

  def identity(self):
    """See `Documents.identity`."""
    yield os.fsencode(type(self).__name__)
    yield from identify(self._files)

  def check_unchanged(self):
    """See `Documents.check_unchanged`."""
    sources.check_unchanged(self._files)


class TextFiles(Files):
  """One document per file; see `open_documents` for the arguments."""

  def __init__(self, spec: str, path: str, text_field: str):
    del text_field  # a file is all text
    super().__init__(spec, path)

  def __len__(self):
    return len(self._files)

  def __getitem__(self, index):
    return sources.read_text(self._files[index].path)

  def name(self, index):
    """See `Documents.name`."""
    return self._files[index].name


class Rows(Files):
  """One document per row of several files; a base class of formats.

  A format defines `_num_rows` and `_read`.
  """

  def __init__(
    self, spec: str, path: str, text_field: str, *, endings: tuple[str, ...]
  ):
    super().__init__(spec, path, endings=endings)
    self._field = text_field
    self._ends: list[int] = []  # for each file, rows up to its end
    self._kept: Any = None  # reused by the next read
    self._lock = threading.Lock()  # Grain reads from several threads

  def __getstate__(self):  # locks do not travel to other processes
    return {**self.__dict__, '_kept': None, '_lock': None}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())

  def identity(self):
    """See `Documents.identity`."""
    yield os.fsencode(f'{self._field}\0')
    yield from super().identity()

  def __len__(self):
    with self._lock:
      self._count()
    return self._ends[-1]

  def __getitem__(self, index):
    with self._lock:
      return self._read(*self._locate(index))

  def name(self, index):
    """See `Documents.name`."""
    with self._lock:
      file, row = self._locate(index)
    return f'{self._files[file].name}:{row}'

  def _locate(self, index: int) -> tuple[int, int]:
    """Returns the file of a row, and which of its rows it is."""
    self._count()
    if not 0 <= index < self._ends[-1]:
      raise IndexError(index)
    file = bisect.bisect_right(self._ends, index)
    return file, index - (self._ends[file - 1] if file else 0)

  def _count(self):
    if not self._ends:
      counts = [self._num_rows(file) for file in range(len(self._files))]
      self._ends = list(itertools.accumulate(counts))

  def _num_rows(self, file: int) -> int:
    """Counts the rows of a file."""
    raise NotImplementedError

  def _read(self, file: int, row: int) -> str:
    """Reads the text of a row."""
    raise NotImplementedError

  def _damaged(self, file: int, what: str, row: int | None = None):
    where = '' if row is None else f', row {row}'
    return errors.UserError(
      f'{files.shown(self._files[file].path)}{where}: {what}. Correct it, '
      'leave it out with a glob pattern, or name the field of the text in '
      'data.text_field.'
    )


class JsonLines(Rows):
  """One document per line of JSON; gzipped files are slow out of order."""

  def __init__(self, spec: str, path: str, text_field: str):
    super().__init__(
      spec, path, text_field, endings=('.jsonl', '.jsonl.gz', '.json.gz')
    )
    self._offsets: dict[int, list[int]] = {}  # of lines, for files without gzip

  def _num_rows(self, file):
    offsets, place = [], 0
    with self._lines(file) as lines:
      for line in self._guarded(file, lines):
        if line.strip():
          offsets.append(place)
        place += len(line)
    if not self._is_gzipped(file):
      self._offsets[file] = offsets
    return len(offsets)

  def _read(self, file, row):
    line = self._line(file, row)
    try:
      record = json.loads(line)
    except ValueError as error:
      raise self._damaged(file, 'not JSON in UTF-8', row) from error
    except RecursionError as error:
      raise self._damaged(
        file, 'JSON that is nested too deeply', row
      ) from error
    return read_field(
      record, self._field, lambda w: self._damaged(file, w, row)
    )

  def _line(self, file, row) -> bytes:
    at, lines = row, None
    if self._kept is not None and self._kept[:2] == (file, row):
      lines = self._kept[2]
    else:
      if self._kept is not None:
        self._kept[2].close()
      lines = self._lines(file)
      if file in self._offsets:
        lines.seek(self._offsets[file][row])
      else:
        at = 0
    for line in self._guarded(file, lines):
      if line.strip():
        if at == row:
          self._kept = file, row + 1, lines
          return line
        at += 1
    raise self._damaged(file, 'shorter than it was', row)

  def _guarded(self, file, lines) -> Iterator[bytes]:
    try:
      yield from iter(lines.readline, b'')  # `for` would close the file
    except (OSError, EOFError, zlib.error) as error:
      raise self._damaged(file, f'cannot be read ({error})') from error

  def _lines(self, file) -> IO[bytes]:
    path = self._files[file].path
    try:
      return gzip.open(path) if self._is_gzipped(file) else open(path, 'rb')
    except OSError as error:
      raise sources.unreadable(path, error) from error

  def _is_gzipped(self, file) -> bool:
    return self._files[file].name.lower().endswith('.gz')


def identify(listed: Sequence[sources.TextFile]) -> Iterator[bytes]:
  """Yields paths, sizes and times of files."""
  for file in listed:
    yield os.fsencode(f'\0{file.path.absolute()}\0')
    yield f'{file.size}\0{file.mtime}'.encode()


def read_field(
  record: Any, field: str, refuse: Callable[[str], Exception]
) -> str:
  """Reads the text of a record.

  Args:
    record: A mapping, if the file is right.
    field: The field that holds the text.
    refuse: Makes the error, from what is wrong.

  Returns:
    The text.
  """
  if not isinstance(record, Mapping) or field not in record:
    fields = ', '.join(record) if isinstance(record, Mapping) else 'none'
    raise refuse(f'no field {field!r} among {fields}')
  text = record[field]
  if isinstance(text, bytes):
    text = text.decode('utf-8', errors='replace')
  if not isinstance(text, str):
    raise refuse(f'{field!r} is of type {type(text).__name__}, not a text')
  return tokenizers.replace_surrogates(text)
