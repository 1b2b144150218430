"""Formats of text, each a source of documents.

A format is chosen by a prefix, or else by how the path ends:

    stdlib, FOLDER, FILE, GLOB    text files, one document each (also text:)
    *.jsonl, *.json.gz, jsonl:    a JSON object per line, perhaps gzipped
    *.parquet, parquet:           rows of Parquet files
    *.array_record, array_record: UTF-8 records of ArrayRecord files
    hf:FOLDER                     saved by `datasets.Dataset.save_to_disk`
    tfds:FOLDER#SPLIT             prepared by TensorFlow Datasets; #train

Packages that read a format are imported when a source of it is opened.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
import importlib
import os
import pathlib
import types
from typing import Any

from nested_learning import errors
from nested_learning.data import documents as documents_lib
from nested_learning.data import sources

_ENDINGS = {
  '.jsonl': 'jsonl',
  '.jsonl.gz': 'jsonl',
  '.json.gz': 'jsonl',
  '.parquet': 'parquet',
  '.array_record': 'array_record',
  '.arrayrecord': 'array_record',
}


def open_documents(
  spec: str, *, text_field: str = 'text'
) -> documents_lib.Documents:
  """Opens a source.

  Args:
    spec: The source; see the module.
    text_field: The field that holds the text, if records have fields.

  Returns:
    The documents. They are read when they are asked for.

  Raises:
    errors.UserError: There is no text, a file cannot be read, or the package
      that reads the format is not installed.
  """
  if spec.startswith('seqio:'):
    raise errors.UserError(
      f'data.source={spec!r}: tokens of seqio are made once, with '
      'launch/prepare.py; give the folder that it makes.'
    )
  kind, path = split_spec(spec)
  return _KINDS[kind](spec, path, text_field)


def split_spec(spec: str) -> tuple[str, str]:
  """Returns the format of a source, and its path without the prefix."""
  prefix, colon, path = spec.partition(':')
  if colon and prefix in _KINDS:
    return prefix, path
  for ending, kind in _ENDINGS.items():
    if spec.lower().endswith(ending):
      return kind, spec
  return 'text', spec


class Parquet(documents_lib.Rows):
  """Rows of Parquet files; the last row group stays in memory."""

  def __init__(self, spec: str, path: str, text_field: str):
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
    return documents_lib.read_field(
      record, self._field, lambda w: self._damaged(file, w, row)
    )

  def _file(self, file):
    parquet = _import('pyarrow.parquet', self.spec, 'parquet')
    try:
      return parquet.ParquetFile(self._files[file].path)
    except Exception as error:  # pyarrow's own types
      raise self._damaged(file, 'not a Parquet file, or damaged') from error


class ArrayRecords(documents_lib.Files):
  """One document per record of ArrayRecord files, in UTF-8."""

  def __init__(self, spec: str, path: str, text_field: str):
    del text_field  # a record is all text
    super().__init__(spec, path, endings=('.array_record', '.arrayrecord'))
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
        f'{self.spec!r}, record {index}: not UTF-8 text. Read a folder of '
        'TensorFlow Datasets as tfds:FOLDER, and tokens from the folder that '
        'launch/prepare.py made.'
      ) from error
    except Exception as error:  # the reader has no types of its own
      raise _unreadable_row(self.spec, index, error) from error


class _Table(documents_lib.Documents):
  """Rows of a table with random access, of Hugging Face or TFDS."""

  def __init__(self, spec: str, rows: Any, field: str, identity: Sequence[str]):
    super().__init__(spec)
    self._rows, self._field, self._identity = rows, field, identity

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index):
    if not 0 <= index < len(self):
      raise IndexError(index)

    def refuse(what):
      return errors.UserError(
        f'{self.spec!r}, row {index}: {what}. Name the field of the text in '
        'data.text_field.'
      )

    try:
      row = self._rows[index]
    except Exception as error:  # of many types
      raise _unreadable_row(self.spec, index, error) from error
    return documents_lib.read_field(row, self._field, refuse)

  def identity(self):
    return (os.fsencode(f'\0{part}') for part in self._identity)


def _open_hugging_face(spec, path, text_field):
  datasets = _import('datasets', spec, 'datasets')
  folder = _folder(spec, path)
  try:
    table = datasets.load_from_disk(str(folder))
  except Exception as error:  # of many types
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
  except Exception as error:  # of many types
    raise errors.UserError(
      f'data.source={spec!r} cannot be read ({errors.first_line(error)}). '
      'Give the folder of a version, whose files are ArrayRecord '
      "(file_format='array_record'), and a split that it has."
    ) from error
  found = sources.find_files(str(folder))
  identity = ('tfds', text_field, split, *(f'{f[1:]}' for f in found))
  return _Table(spec, rows, text_field, identity)


_KINDS: Mapping[str, Callable[[str, str, str], documents_lib.Documents]] = {
  'text': documents_lib.TextFiles,
  'jsonl': documents_lib.JsonLines,
  'parquet': Parquet,
  'array_record': ArrayRecords,
  'hf': _open_hugging_face,
  'tfds': _open_tfds,
}


def open_records(paths: Sequence[pathlib.Path], spec: str) -> Any:
  """Opens the records of ArrayRecord files, one file after the other.

  Args:
    paths: The files.
    spec: The source, for errors.

  Returns:
    A `grain.sources.ArrayRecordDataSource`.

  Raises:
    errors.UserError: A file is not an ArrayRecord file, or is damaged.
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


def _unreadable_row(
  spec: str, index: int, error: Exception
) -> errors.UserError:
  return errors.UserError(
    f'{spec!r}, row {index}: cannot be read ({errors.first_line(error)}). Make '
    'the files again.'
  )


def _import(module: str, spec: str, extra: str) -> types.ModuleType:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise errors.UserError(
      f'data.source={spec!r} needs the package {module.split(".")[0]}. Install '
      f'it with `pip install "nested-learning[{extra}]"`.'
    ) from error


def _folder(spec: str, path: str) -> pathlib.Path:
  folder = pathlib.Path(os.path.expanduser(path))
  if not os.path.isdir(folder):
    raise errors.UserError(
      f'data.source={spec!r} is not a folder; give the one that the data was '
      'saved to.'
    )
  return folder
