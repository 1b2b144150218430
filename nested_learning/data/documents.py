"""Documents in the formats that text comes in, each a source for Grain.

A source is chosen by a prefix, or else by how its path ends:

    stdlib, FOLDER, FILE, GLOB    text files, one document each (also text:)
    *.jsonl, *.json.gz, jsonl:    a JSON object per line, perhaps gzipped
    *.parquet, parquet:           rows of Parquet files
    *.array_record, array_record: UTF-8 records of ArrayRecord files
    hf:FOLDER                     what `datasets.Dataset.save_to_disk` wrote
    tfds:FOLDER#SPLIT             what TensorFlow Datasets prepared; #train

Packages that read a format are imported when one is opened.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
import gzip
import importlib
import itertools
import json
import os
import pathlib
import threading
from typing import Any, IO
import zlib

from nested_learning import errors
from nested_learning import files
from nested_learning.data import sources
from nested_learning.data import tokenizers

_ENDINGS = {
  '.jsonl': 'jsonl',
  '.jsonl.gz': 'jsonl',
  '.json.gz': 'jsonl',
  '.parquet': 'parquet',
  '.array_record': 'array_record',
  '.arrayrecord': 'array_record',
}


class Documents:
  """Texts by number, first to last, for `grain.MapDataset.source`.

  Every kind defines `__len__`, `__getitem__`, `name` and `identity`.

  Attributes:
    spec: What it was opened as.
  """

  def __init__(self, spec: str):
    self.spec = spec

  def __repr__(self) -> str:  # by which Grain knows a source again
    return f'{type(self).__name__}({self.spec!r})'

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))

  def __len__(self) -> int:
    raise NotImplementedError

  def __getitem__(self, index: int) -> str:
    raise NotImplementedError

  def name(self, index: int) -> str:
    """What a document is called, wherever the source lies."""
    return f'{index}'

  def identity(self) -> Iterator[bytes]:
    """Yields bytes that change when the documents do, without reading them."""
    raise NotImplementedError

  def check_unchanged(self) -> None:
    """Raises `errors.UserError` if a file changed since this was opened."""


def open_documents(spec: str, *, text_field: str = 'text') -> Documents:
  """Opens a source.

  Args:
    spec: What to read; see the module.
    text_field: Where records have fields, the one that holds the text.

  Returns:
    The documents. They are read when they are asked for.

  Raises:
    errors.UserError: There are none, a file cannot be read, or the package that
      reads the format is not installed.
  """
  if spec.startswith('seqio:'):
    raise errors.UserError(
      f'data.source={spec!r}: tokens of seqio are made once, with '
      'launch/prepare.py; give the folder that it makes.'
    )
  kind, path = split_spec(spec)
  return _KINDS[kind](spec, path, text_field)


def split_spec(spec: str) -> tuple[str, str]:
  """The kind of a source, and its path without the prefix."""
  prefix, colon, path = spec.partition(':')
  if colon and prefix in _KINDS:
    return prefix, path
  for ending, kind in _ENDINGS.items():
    if spec.lower().endswith(ending):
      return kind, spec
  return 'text', spec


class _TextFiles(Documents):
  """One document per file."""

  def __init__(self, spec, path, text_field):
    del text_field  # a file is all text
    super().__init__(spec)
    self._files = sources.find_files(path)

  def __len__(self):
    return len(self._files)

  def __getitem__(self, index):
    return sources.read_text(self._files[index].path)

  def name(self, index):
    return self._files[index].name

  def identity(self):
    return _identify(self._files)

  def check_unchanged(self):
    sources.check_unchanged(self._files)


class _Rows(Documents):
  """Rows of several files, one file at a time."""

  def __init__(self, spec, path, text_field, *, endings):
    super().__init__(spec)
    self._field = text_field
    self._files = sources.find_files(path)
    if os.path.isdir(os.path.expanduser(path)):
      self._files = _with_endings(self._files, endings)
      if not self._files:
        raise errors.UserError(
          f'data.source={spec!r} holds no file that ends in '
          f'{" or ".join(endings)}; give a glob pattern of the files.'
        )
    self._ends: list[int] = []  # rows of the files up to and with each
    self._kept: Any = None  # of the last read, for the next
    self._lock = threading.Lock()  # Grain reads from several threads

  def __getstate__(self):  # for another process
    return {**self.__dict__, '_kept': None, '_lock': None}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())

  def identity(self):
    yield os.fsencode(f'{type(self).__name__}\0{self._field}')
    yield from _identify(self._files)

  def check_unchanged(self):
    sources.check_unchanged(self._files)

  def __len__(self):
    with self._lock:
      self._count()
    return self._ends[-1]

  def __getitem__(self, index):
    with self._lock:
      return self._read(*self._locate(index))

  def name(self, index):
    with self._lock:
      file, row = self._locate(index)
    return f'{self._files[file].name}:{row}'

  def _locate(self, index: int) -> tuple[int, int]:
    """Which file, and which row of it."""
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
    raise NotImplementedError

  def _read(self, file: int, row: int) -> str:
    raise NotImplementedError

  def _damaged(self, file: int, what: str, row: int | None = None):
    where = '' if row is None else f', row {row}'
    return errors.UserError(
      f'{files.shown(self._files[file].path)}{where}: {what}. Correct it, '
      'leave it out with a glob pattern, or name the field of the text in '
      'data.text_field.'
    )


class _JsonLines(_Rows):
  """A JSON object per line; of a gzipped file, best read in order."""

  def __init__(self, spec, path, text_field):
    super().__init__(
      spec, path, text_field, endings=('.jsonl', '.jsonl.gz', '.json.gz')
    )
    self._offsets: dict[int, list[int]] = {}  # of lines, in files not gzipped

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
    return _text(record, self._field, lambda w: self._damaged(file, w, row))

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
      yield from iter(lines.readline, b'')  # of itself it would close them
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


class _Parquet(_Rows):
  """Rows of Parquet files; the row group that was last read is kept."""

  def __init__(self, spec, path, text_field):
    _import('pyarrow.parquet', spec, 'parquet')
    super().__init__(spec, path, text_field, endings=('.parquet',))
    self._ends_of_groups: dict[int, list[int]] = {}

  def _num_rows(self, file):
    with self._file(file) as content:
      if self._field not in content.schema_arrow.names:
        fields = ', '.join(content.schema_arrow.names)
        raise self._damaged(file, f'no column {self._field!r} among {fields}')
      metadata, ends = content.metadata, [0]
      for group in range(metadata.num_row_groups):
        ends.append(ends[-1] + metadata.row_group(group).num_rows)
    self._ends_of_groups[file] = ends
    return ends[-1]

  def _read(self, file, row):
    ends = self._ends_of_groups[file]
    group = bisect.bisect_right(ends, row) - 1
    if self._kept is None or self._kept[:2] != (file, group):
      with self._file(file) as content:
        try:
          table = content.read_row_group(group, columns=[self._field])
        except Exception as error:  # pyarrow's own types
          raise self._damaged(file, 'damaged') from error
        column = table.column(0)
      self._kept = file, group, column
    text = self._kept[2][row - ends[group]].as_py()
    record = {self._field: text}
    return _text(record, self._field, lambda w: self._damaged(file, w, row))

  def _file(self, file):
    parquet = _import('pyarrow.parquet', self.spec, 'parquet')
    try:
      return parquet.ParquetFile(self._files[file].path)
    except Exception as error:  # pyarrow's own types
      raise self._damaged(file, 'not a Parquet file, or damaged') from error


class _ArrayRecords(Documents):
  """Records of ArrayRecord files, each of them a text."""

  def __init__(self, spec, path, text_field):
    del text_field  # a record is all text
    super().__init__(spec)
    self._files = sources.find_files(path)
    endings = tuple(e for e, k in _ENDINGS.items() if k == 'array_record')
    if os.path.isdir(os.path.expanduser(path)):
      self._files = _with_endings(self._files, endings)
    self._records = open_records([file.path for file in self._files], spec)

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return self._records[index].decode('utf-8')
    except UnicodeDecodeError as error:
      raise errors.UserError(
        f'{self.spec}: record {index} is not UTF-8 text. Read what TensorFlow '
        'Datasets wrote as tfds:FOLDER, and tokens from the folder that '
        'launch/prepare.py made.'
      ) from error

  def identity(self):
    yield b'array_record'
    yield from _identify(self._files)

  def check_unchanged(self):
    sources.check_unchanged(self._files)


class _Table(Documents):
  """A table that is its own random access: Hugging Face's or TFDS's."""

  def __init__(self, spec, rows, field, identity: Sequence[str]):
    super().__init__(spec)
    self._rows, self._field, self._identity = rows, field, identity

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(index)

    def refuse(what):
      return errors.UserError(
        f'{self.spec}, row {index}: {what}. Name the field of the text in '
        'data.text_field.'
      )

    return _text(self._rows[index], self._field, refuse)

  def identity(self):
    return (os.fsencode(f'\0{part}') for part in self._identity)


def _open_hugging_face(spec, path, text_field):
  datasets = _import('datasets', spec, 'datasets')
  folder = _folder(spec, path)
  try:
    table = datasets.load_from_disk(str(folder))
  except Exception as error:  # many kinds
    raise errors.UserError(
      f'data.source={spec!r} cannot be read ({errors.first_line(error)}). '
      'Give a folder that Dataset.save_to_disk wrote.'
    ) from error
  if isinstance(table, dict):
    raise errors.UserError(
      f'data.source={spec!r} has the splits {", ".join(table)}; name one, as '
      f'in hf:{path.rstrip("/")}/{next(iter(table))}.'
    )
  identity = ('hf', text_field, str(folder.absolute()), table._fingerprint)
  return _Table(spec, table, text_field, identity)


def _open_tfds(spec, path, text_field):
  tfds = _import('tensorflow_datasets', spec, 'tfds')
  path, _, split = path.partition('#')
  folder, split = _folder(spec, path), split or 'train'
  try:
    builder = tfds.builder_from_directory(str(folder))
    rows = builder.as_data_source(split=split)
  except Exception as error:  # many kinds
    raise errors.UserError(
      f'data.source={spec!r} cannot be read ({errors.first_line(error)}). '
      'Give the folder of a version, whose files are ArrayRecord '
      "(file_format='array_record'), and a split that it has."
    ) from error
  files = sources.find_files(str(folder))
  identity = ('tfds', text_field, split, *(f'{f[1:]}' for f in files))
  return _Table(spec, rows, text_field, identity)


_KINDS: Mapping[str, Callable[[str, str, str], Documents]] = {
  'text': _TextFiles,
  'jsonl': _JsonLines,
  'parquet': _Parquet,
  'array_record': _ArrayRecords,
  'hf': _open_hugging_face,
  'tfds': _open_tfds,
}


def open_records(paths: Sequence[pathlib.Path], spec: str) -> Any:
  """The records of ArrayRecord files, one file after the other.

  Args:
    paths: The files.
    spec: What they are read for, for the error.

  Returns:
    A `grain.sources.ArrayRecordDataSource`.

  Raises:
    errors.UserError: One of them is no such file.
  """
  _import('array_record', spec, 'array-record')
  import grain

  try:
    source = grain.sources.ArrayRecordDataSource([str(p) for p in paths])
    len(source)  # reads the indices
  except Exception as error:
    raise errors.UserError(
      f'{spec!r} is not of ArrayRecord files, or they are damaged '
      f'({errors.first_line(error)}). Make them again.'
    ) from error
  return source


def _import(module: str, spec: str, extra: str):
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise errors.UserError(
      f'data.source={spec!r} needs the package {module.split(".")[0]}. Install '
      f'it with `pip install "nested-learning[{extra}]"`.'
    ) from error


def _with_endings(
  files: Sequence[sources.TextFile], endings: tuple[str, ...]
) -> list[sources.TextFile]:
  return [file for file in files if file.name.lower().endswith(endings)]


def _folder(spec: str, path: str) -> pathlib.Path:
  folder = pathlib.Path(os.path.expanduser(path))
  if not os.path.isdir(folder):
    raise errors.UserError(f'data.source={spec!r} is not a folder.')
  return folder


def _identify(files: Sequence[sources.TextFile]) -> Iterator[bytes]:
  for file in files:
    yield os.fsencode(f'\0{file.path.absolute()}\0')
    yield f'{file.size}\0{file.mtime}'.encode()


def _text(record: Any, field: str, refuse: Callable[[str], Exception]) -> str:
  """The text of a record."""
  if not isinstance(record, Mapping) or field not in record:
    fields = ', '.join(record) if isinstance(record, Mapping) else 'none'
    raise refuse(f'no field {field!r} among {fields}')
  text = record[field]
  if isinstance(text, bytes):
    text = text.decode('utf-8', errors='replace')
  if not isinstance(text, str):
    raise refuse(f'{field!r} is of type {type(text).__name__}, not a text')
  return tokenizers.replace_surrogates(text)
