"""Tokens made beforehand: a folder of ArrayRecord shards and an index.

The documents are laid end to end, each [document_id] + tokens, and cut into
blocks of equal size, one per record. So any row is read from the few blocks
that it lies in, and no text and no tokenizer's library is needed for training.

    tokens.json               what it is, and of which tokenizer
    tokens-00000.array_record blocks of tokens; the others follow
    starts.npy, places.npy    of the documents, as in `packing.Corpus`
    tokenizer.model or .json  a copy of the tokenizer, where it is a file
"""

from collections.abc import Iterable
import contextlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np

from nested_learning import errors
from nested_learning.data import documents as documents_lib
from nested_learning.data import packing
from nested_learning.data import tokenizers

_FORMAT = 'nested_learning tokens 1'
_SUMMARY = 'tokens.json'
_BLOCK = 8192  # tokens per record
_SHARD_BLOCKS = 2**14  # records per file, so that a file is about 250 MB
_OPTIONS = 'group_size:1,zstd:1'  # every record can be read alone


def holds_tokens(source: str) -> bool:
  """Returns whether a source is a folder that `write` made."""
  return (pathlib.Path(source).expanduser() / _SUMMARY).is_file()


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
    folder: What to make; must not exist.
    documents: Names with texts, or with ids of the tokenizer.
    tokenizer: What makes tokens of texts.
    spec: The config's data.tokenizer, of which a copy is kept.
    source: Where the documents are from, for whoever finds the folder.

  Returns:
    What is in tokens.json.

  Raises:
    errors.UserError: The folder exists or cannot be written, or there is no
      text in the documents.
  """
  if folder.exists():
    raise errors.UserError(f'{folder} exists; name another folder.')
  try:
    with packing.whole_folder(folder) as draft:
      tokenised = packing.Tokenised(tokenizer)
      with contextlib.closing(_Blocks(draft, tokenised.dtype)) as blocks:
        for name, document in documents:
          blocks.add(tokenised.add(name, document))
      num_tokens = int(tokenised.starts[-1])
      if not num_tokens:
        raise errors.UserError(f'{source!r} holds no text.')
      np.save(draft / 'starts.npy', tokenised.starts)
      np.save(draft / 'places.npy', tokenised.places)
      path = pathlib.Path(spec).expanduser()
      if path.is_file():
        shutil.copyfile(path, draft / f'tokenizer{path.suffix}')
      summary = {
        'format': _FORMAT,
        'source': source,
        'num_tokens': num_tokens,
        'num_documents': len(tokenised.places),
        'fingerprint': tokenised.fingerprint,
        'tokenizer': spec,
        'tokenizer_fingerprint': tokenizer.fingerprint,
        'vocab_size': tokenizer.vocab_size,
        'dtype': np.dtype(tokenised.dtype).name,
        'block': _BLOCK,
      }
      (draft / _SUMMARY).write_text(json.dumps(summary, indent=2) + '\n')
  except OSError as error:
    raise errors.UserError(
      f'{folder} cannot be written ({error.strerror}); name a folder with room '
      'that you may write to.'
    ) from error
  return summary


def load(source: str, tokenizer: tokenizers.Tokenizer) -> packing.Corpus:
  """Opens a folder that `write` made.

  Args:
    source: The folder.
    tokenizer: What the config says they are tokens of.

  Returns:
    The corpus; its tokens are read when they are asked for.

  Raises:
    errors.UserError: It is damaged, or of another tokenizer.
  """
  folder = pathlib.Path(source).expanduser()
  try:
    summary = json.loads((folder / _SUMMARY).read_text(encoding='utf-8'))
    starts = np.load(folder / 'starts.npy')
    places = np.load(folder / 'places.npy')
    if summary['format'] != _FORMAT or len(starts) != len(places) + 1:
      raise ValueError(f'format {summary["format"]!r}')
  except (OSError, EOFError, ValueError, KeyError) as error:
    raise errors.UserError(
      f'data.source={source!r} is damaged ({error}); make it again with '
      'launch/prepare.py.'
    ) from error
  if summary['tokenizer_fingerprint'] != tokenizer.fingerprint:
    copies = [str(path) for path in folder.glob('tokenizer.*')]
    raise errors.UserError(
      f'data.source={source!r} holds tokens of '
      f'{summary["tokenizer_fingerprint"]}, and data.tokenizer is '
      f'{tokenizer.fingerprint}; set data.tokenizer='
      f'{(copies or [summary["tokenizer"]])[0]}.'
    )
  tokens = _Tokens(source, folder, summary)
  if len(tokens) != starts[-1]:
    raise errors.UserError(
      f'data.source={source!r} has {len(tokens)} tokens of {starts[-1]}: files '
      'are missing; copy them, or make it again with launch/prepare.py.'
    )
  return packing.Corpus(tokens, starts, places, summary['fingerprint'])


class _Blocks:
  """Writes tokens as records of equal size, in files of equal size."""

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
      self._writer.close()

  def _write(self, block: np.ndarray) -> None:
    if self._num_blocks % _SHARD_BLOCKS == 0:
      from array_record.python import array_record_module

      if self._writer is not None:
        self._writer.close()
      shard = self._num_blocks // _SHARD_BLOCKS
      path = self._folder / f'tokens-{shard:05d}.array_record'
      self._writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
    self._writer.write(block.astype(block.dtype.newbyteorder('<')).tobytes())
    self._num_blocks += 1


class _Tokens:
  """The tokens of a folder, indexed by an array of positions."""

  def __init__(self, source: str, folder: pathlib.Path, summary):
    self._source = source
    self._block = summary['block']
    self._dtype = np.dtype(summary['dtype']).newbyteorder('<')
    paths = sorted(folder.glob('tokens-*.array_record'))
    self._records = documents_lib.open_records(paths, source)

  def __len__(self) -> int:
    last = len(self._records) - 1
    return last * self._block + len(self._read([last])[0])

  def __getitem__(self, positions: np.ndarray) -> np.ndarray:
    blocks, places = np.unique(positions // self._block, return_inverse=True)
    # The last block may be shorter, but no position is past its end.
    found = np.zeros((len(blocks), self._block), self._dtype)
    for i, block in enumerate(self._read(blocks.tolist())):
      found[i, : len(block)] = block
    return found[places.reshape(positions.shape), positions % self._block]

  def _read(self, blocks: list[int]) -> list[np.ndarray]:
    try:
      records = self._records.__getitems__(blocks)
    except Exception as error:  # of the reader, which has no types of its own
      raise errors.UserError(
        f'data.source={self._source!r} cannot be read '
        f'({str(error).splitlines()[0][:200]}); make it again with '
        'launch/prepare.py.'
      ) from error
    return [np.frombuffer(record, self._dtype) for record in records]
