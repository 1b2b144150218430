"""Tokens on disk: a folder of ArrayRecord shards and an index.

Documents are laid end to end, each [document_id] + tokens, and cut into blocks
of equal size, one per record. A row is read from the few blocks that hold it,
and training needs neither the text nor the tokenizer's library.

    tokens.json               summary: sizes, tokenizer, checksums
    tokens-00000.array_record blocks of tokens; the others follow
    starts.npy, places.npy, contents.npy  as in `corpus.Corpus`
    tokenizer.model or .json  a copy of the tokenizer, if it is a file
"""

from collections.abc import Iterable, Iterator
import contextlib
import json
import os
import pathlib
import shutil
from typing import Any
import zlib

import numpy as np

from nested_learning import errors
from nested_learning import files
from nested_learning.data import corpus as corpus_lib
from nested_learning.data import formats
from nested_learning.data import tokenizers

_FORMAT = 'nested_learning tokens 2'
_OLD_FORMAT = 'nested_learning tokens 1'  # without contents and checksums
_SUMMARY = 'tokens.json'
_ARRAYS = ('starts', 'places', 'contents')  # of `corpus.Corpus`
_FIELDS = {
  'num_tokens': int,
  'fingerprint': str,
  'tokenizer': str,
  'tokenizer_fingerprint': str,
  'dtype': str,
  'block': int,
}
_MAX_BLOCK = 2**24
_BLOCK = 8192  # tokens per record
_SHARD_BLOCKS = 2**14  # records per file, so that a file is about 250 MB
_SHARD = '.array_record'
_OPTIONS = 'group_size:1,zstd:1'  # every record can be read alone


def holds_tokens(source: str) -> bool:
  """Returns whether a source is a folder that `write` made."""
  return os.path.isfile(os.path.join(os.path.expanduser(source), _SUMMARY))


def write(
  folder: pathlib.Path,
  documents: Iterable[tuple[str, str | np.ndarray]],
  tokenizer: tokenizers.Tokenizer,
  *,
  spec: str,
  source: str,
) -> dict[str, Any]:
  """Tokenises documents one by one into a folder, which appears when complete.

  Args:
    folder: The folder to make; must not exist.
    documents: Names with texts, or with ids of the tokenizer.
    tokenizer: The tokenizer.
    spec: The config's data.tokenizer; if it is a file, a copy is kept.
    source: Where the documents are from, for whoever finds the folder.

  Returns:
    The content of tokens.json.

  Raises:
    errors.UserError: The folder exists or cannot be written, or there is no
      text in the documents.
  """
  try:
    with contextlib.suppress(FileNotFoundError):
      os.lstat(folder)  # also refuses a name that is too long
      raise errors.UserError(
        f'{files.shown(folder)} exists; name another folder.'
      )
    with files.whole_folder(folder) as draft:
      return _fill(draft, documents, tokenizer, spec=spec, source=source)
  except (OSError, ValueError) as error:
    if isinstance(error, ValueError) and 'null byte' not in str(error):
      raise
    raise errors.UserError(
      f'{files.shown(folder)} cannot be written ({_reason(error)}); name a '
      'folder with room that you may write to.'
    ) from error


def _fill(
  folder: pathlib.Path,
  documents: Iterable[tuple[str, str | np.ndarray]],
  tokenizer: tokenizers.Tokenizer,
  *,
  spec: str,
  source: str,
) -> dict[str, Any]:
  """Writes shards, index, tokenizer and summary into an empty folder."""
  index = corpus_lib.IndexBuilder(tokenizer)
  with contextlib.closing(_Blocks(folder, index.dtype)) as blocks:
    for name, document in documents:
      blocks.add(index.add(name, document))
  num_tokens = int(index.starts[-1])
  if not num_tokens:
    raise errors.UserError(f'{source!r} holds no text.')
  for name in _ARRAYS:
    np.save(folder / f'{name}.npy', getattr(index, name))
  path = pathlib.Path(os.path.expanduser(spec))
  if os.path.isfile(path):
    shutil.copyfile(path, folder / f'tokenizer{path.suffix}')
  summary = {
    'format': _FORMAT,
    'source': tokenizers.replace_surrogates(source),
    'num_tokens': num_tokens,
    'num_documents': len(index.places),
    'fingerprint': index.fingerprint,
    'tokenizer': tokenizers.replace_surrogates(spec),
    'tokenizer_fingerprint': tokenizer.fingerprint,
    'vocab_size': tokenizer.vocab_size,
    'lost': index.lost,
    'dtype': np.dtype(index.dtype).name,
    'block': _BLOCK,
    'files': {path.name: _describe(path) for path in folder.iterdir()},
  }
  summary['crc32'] = _own_checksum(summary)
  content = json.dumps(summary, indent=2) + '\n'
  (folder / _SUMMARY).write_text(content, encoding='utf-8')
  return summary


def load(source: str, tokenizer: tokenizers.Tokenizer) -> corpus_lib.Corpus:
  """Opens a folder that `write` made.

  The index is compared with its checksums here, and blocks of tokens with
  those of ArrayRecord when they are read.

  Args:
    source: The folder.
    tokenizer: The tokenizer that the config names.

  Returns:
    The corpus; its tokens are read when they are asked for.

  Raises:
    errors.UserError: It is damaged, or was made with another tokenizer.
  """
  folder = pathlib.Path(os.path.expanduser(source))
  try:
    summary = _read_summary(folder)
    arrays = {
      # Mapped first, which refuses a header that claims more than the file.
      name: np.array(np.load(folder / f'{name}.npy', mmap_mode='r'))
      for name in _ARRAYS
      if name in _array_names(summary)
    }
    # The old format has no hashes of contents: every document is its own text.
    contents = arrays.get('contents', arrays['places'].view(np.uint64))
    corpus_lib.check_index(
      arrays['starts'], arrays['places'], contents, summary['num_tokens']
    )
  except MemoryError:
    raise
  except Exception as error:  # NumPy's readers raise exceptions of many types
    if corpus_lib.is_no_damage(error):
      raise errors.UserError(
        f'data.source={source!r} cannot be read ({_reason(error)}); correct '
        'its permissions, or copy it to another disk.'
      ) from error
    raise errors.UserError(
      f'data.source={source!r} is damaged ({_reason(error)}); make it again '
      'with launch/prepare.py.'
    ) from error
  if summary['tokenizer_fingerprint'] != tokenizer.fingerprint:
    copies = sorted(str(path) for path in folder.glob('tokenizer.*'))
    raise errors.UserError(
      f'data.source={source!r} holds tokens of '
      f'{summary["tokenizer_fingerprint"]}, and data.tokenizer is '
      f'{tokenizer.fingerprint}; set data.tokenizer='
      f'{(copies or [summary["tokenizer"]])[0]}.'
    )
  tokens = _Tokens(source, folder, summary)
  if len(tokens) != summary['num_tokens']:
    raise errors.UserError(
      f'data.source={source!r} has {len(tokens)} tokens of '
      f'{summary["num_tokens"]}: files are missing; copy them, or make it '
      'again with launch/prepare.py.'
    )
  corpus_lib.warn_of_loss(tokenizer.fingerprint, summary.get('lost', 0.0))
  return corpus_lib.Corpus(
    tokens=tokens,
    starts=arrays['starts'],
    places=arrays['places'],
    contents=contents,
    fingerprint=summary['fingerprint'],
    vocab_size=tokenizer.vocab_size,
    folder=str(folder),
  )


def _read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """Reads tokens.json; raises ValueError if it or a file was changed."""
  summary = json.loads((folder / _SUMMARY).read_text(encoding='utf-8'))
  if not isinstance(summary, dict):
    raise ValueError(f'{_SUMMARY} is not an object')
  if summary.get('format') not in (_FORMAT, _OLD_FORMAT):
    raise ValueError(f'its format is {summary.get("format")!r}')
  for name, kind in _FIELDS.items():
    if type(summary.get(name)) is not kind:
      raise ValueError(f'{name} in {_SUMMARY} is {summary.get(name)!r}')
  if summary['dtype'] not in ('uint16', 'uint32'):
    raise ValueError(f'its tokens are {summary["dtype"]!r}')
  if not 0 < summary['block'] <= _MAX_BLOCK or summary['num_tokens'] < 1:
    raise ValueError(
      f'it has {summary["num_tokens"]} tokens, {summary["block"]} per block'
    )
  if type(summary.get('lost', 0.0)) not in (int, float):
    raise ValueError(f'lost in {_SUMMARY} is {summary["lost"]!r}')
  if summary['format'] == _OLD_FORMAT:
    return summary
  if summary.get('crc32') != _own_checksum(summary):
    raise ValueError(f'{_SUMMARY} has another checksum')
  for name, file in summary['files'].items():
    path = folder / name
    if not path.is_file():
      raise ValueError(f'{name} is missing')
    if path.stat().st_size != file['bytes']:
      raise ValueError(f'{name} has {path.stat().st_size} bytes')
    if 'crc32' in file and corpus_lib.checksum(path) != file['crc32']:
      raise ValueError(f'{name} has another checksum')
  return summary


def _describe(path: pathlib.Path) -> dict[str, int]:
  """Returns the size of a file and, except for shards, its checksum."""
  described = {'bytes': path.stat().st_size}
  # Shards may be too large to be read as a whole when they are opened, and
  # ArrayRecord has a checksum per record.
  if path.suffix != _SHARD:
    described['crc32'] = corpus_lib.checksum(path)
  return described


def _array_names(summary: dict[str, Any]) -> tuple[str, ...]:
  return _ARRAYS if summary['format'] == _FORMAT else _ARRAYS[:2]


def _own_checksum(summary: dict[str, Any]) -> int:
  rest = {name: value for name, value in summary.items() if name != 'crc32'}
  return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _reason(error: Exception) -> str:
  return getattr(error, 'strerror', None) or errors.first_line(error)


class _Blocks:
  """Writes tokens as records of equal size, into files of equal size."""

  def __init__(self, folder: pathlib.Path, dtype):
    self._folder = folder
    self._writer, self._num_blocks = None, 0
    self._left = np.zeros(0, dtype)

  def add(self, tokens: np.ndarray) -> None:
    tokens = np.concatenate([self._left, tokens])
    num_whole = len(tokens) // _BLOCK * _BLOCK
    for begin in range(0, num_whole, _BLOCK):
      self._write(tokens[begin : begin + _BLOCK])
    self._left = tokens[num_whole:]

  def close(self) -> None:
    if len(self._left):
      self._write(self._left)
    if self._writer is not None:
      with self._as_os_error():
        self._writer.close()

  @contextlib.contextmanager
  def _as_os_error(self) -> Iterator[None]:
    """Raises the errors of ArrayRecord as OSError."""
    try:
      yield
    except (RuntimeError, ValueError) as error:
      raise OSError(errors.first_line(error)) from error

  def _write(self, block: np.ndarray) -> None:
    if self._num_blocks % _SHARD_BLOCKS == 0:
      from array_record.python import array_record_module

      if self._writer is not None:
        with self._as_os_error():
          self._writer.close()
      shard = self._num_blocks // _SHARD_BLOCKS
      path = self._folder / f'tokens-{shard:05d}{_SHARD}'
      with self._as_os_error():
        self._writer = array_record_module.ArrayRecordWriter(
          str(path), _OPTIONS
        )
    with self._as_os_error():
      self._writer.write(block.astype(block.dtype.newbyteorder('<')).tobytes())
    self._num_blocks += 1


class _Tokens:
  """The tokens of a folder, indexed by an array of positions."""

  def __init__(self, source: str, folder: pathlib.Path, summary):
    self._source = source
    self._block = summary['block']
    self._dtype = np.dtype(summary['dtype']).newbyteorder('<')
    paths = sorted(folder.glob(f'tokens-*{_SHARD}'))
    self._records = formats.open_records(paths, source)

  def __len__(self) -> int:
    last = len(self._records) - 1
    return last * self._block + len(self._read([last])[0]) if last >= 0 else 0

  def __getitem__(self, positions: np.ndarray) -> np.ndarray:
    blocks, places = np.unique(positions // self._block, return_inverse=True)
    # The last block may be shorter; no position is past its end.
    found = np.zeros((len(blocks), self._block), self._dtype)
    for i, block in enumerate(self._read(blocks.tolist())):
      found[i, : len(block)] = block
    return found[places.reshape(positions.shape), positions % self._block]

  def _read(self, blocks: list[int]) -> list[np.ndarray]:
    try:
      records = self._records.__getitems__(blocks)
    except Exception as error:  # the reader has no types of its own
      raise errors.UserError(
        f'data.source={self._source!r} cannot be read '
        f'({errors.first_line(error)}); make it again with launch/prepare.py.'
      ) from error
    size = self._dtype.itemsize
    if any(len(r) % size or len(r) > size * self._block for r in records):
      raise errors.UserError(
        f'data.source={self._source!r} is damaged (records of other lengths '
        f'than {self._block} tokens); make it again with launch/prepare.py.'
      )
    return [np.frombuffer(record, self._dtype) for record in records]
