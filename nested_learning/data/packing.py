"""Documents as tokens: cached once on disk, then read as rows of one stream.

A corpus holds every document of a source as [document_id] + tokens, in one
memory-mapped array. A stream is some of its documents in some order, end to
end and around again. Rows of a batch are slices of a stream, so where a row
begins is all there is to say about it.
"""

from collections.abc import Sequence
import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import NamedTuple
import zipfile

from absl import logging
import numpy as np

from nested_learning import errors
from nested_learning.data import sources
from nested_learning.data import tokenizers


class Corpus(NamedTuple):
  """Document i is tokens[starts[i]:starts[i + 1]], or empty."""

  tokens: np.ndarray  # [tokens], memory-mapped
  starts: np.ndarray  # int64 [documents + 1]
  fingerprint: str  # hash of names and tokens, the same on every machine


class Stream(NamedTuple):
  """Documents of a corpus in an order; position 0 follows the last one."""

  tokens: np.ndarray  # [tokens], those of the corpus
  starts: np.ndarray  # int64 [documents], of each document in `tokens`
  begins: np.ndarray  # int64 [documents], of each document in the stream
  length: int  # tokens of the stream


def default_cache_dir() -> pathlib.Path:
  """The folder for token caches: below $XDG_CACHE_HOME, or ~/.cache."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'nested_learning' / 'tokens'


def load_corpus(
  files: Sequence[sources.TextFile],
  tokenizer: tokenizers.Tokenizer,
  *,
  cache_dir: str | None = None,
) -> Corpus:
  """Tokenises files, or maps the tokens of an earlier call.

  The cache is a folder named after a hash of the paths, sizes and times of the
  files and of the tokenizer. It appears complete or not at all, so processes
  may race for it.

  Args:
    files: The documents.
    tokenizer: What makes tokens of them.
    cache_dir: Folder of all caches; None for `default_cache_dir()`.

  Returns:
    The corpus, with one document per file.

  Raises:
    UserError: A file is no text, or the cache cannot be written or read.
  """
  key = hashlib.sha256(tokenizer.fingerprint.encode())
  for file in files:
    key.update(os.fsencode(f'\0{file.path.absolute()}\0'))
    key.update(f'{file.size}\0{file.mtime}'.encode())
  root = pathlib.Path(cache_dir) if cache_dir else default_cache_dir()
  folder = root.expanduser() / key.hexdigest()[:32]
  try:
    if not folder.exists():
      logging.info('Tokenising %d files into %s', len(files), folder)
      _write_corpus(folder, files, tokenizer)
  except OSError as error:
    raise errors.UserError(
      f'The token cache {folder} cannot be written ({error.strerror}). Set '
      'data.cache_dir to a folder with room that you may write to.'
    ) from error
  try:
    with np.load(folder / 'index.npz') as index:
      starts, fingerprint = index['starts'], str(index['fingerprint'])
    tokens = np.load(folder / 'tokens.npy', mmap_mode='r')
  except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise errors.UserError(
      f'The token cache {folder} is damaged. Delete that folder; it is made '
      'again from the text.'
    ) from error
  return Corpus(tokens, starts, fingerprint)


def make_stream(corpus: Corpus, order: np.ndarray) -> Stream:
  """Lays documents end to end.

  Args:
    corpus: The tokens.
    order: int [documents], which documents, first to last.

  Returns:
    The stream, without documents that have no tokens.
  """
  lengths = np.diff(corpus.starts)
  order = order[lengths[order] > 0]
  ends = np.cumsum(lengths[order], dtype=np.int64)
  return Stream(
    tokens=corpus.tokens,
    starts=corpus.starts[order],
    begins=ends - lengths[order],
    length=int(ends[-1]) if len(ends) else 0,
  )


def pack(
  stream: Stream, begins: np.ndarray, *, length: int
) -> dict[str, np.ndarray]:
  """Cuts rows out of a stream.

  Args:
    stream: A stream of at least one document.
    begins: int [b], position in the stream of each row's first token.
    length: Tokens per row, t.

  Returns:
    A dict of [b, t] arrays: `tokens` int32; `targets` int32, the next token of
    the stream, which after a document's last token is the document_id of the
    next; `reset` bool, True at the first token of each document; `document`
    int32, counted from 0 in each row.
  """
  positions = (begins[:, None] + np.arange(length + 1)) % stream.length
  documents = np.searchsorted(stream.begins, positions, side='right') - 1
  offsets = positions - stream.begins[documents]
  tokens = stream.tokens[stream.starts[documents] + offsets].astype(np.int32)
  reset = offsets[:, :-1] == 0
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'reset': reset,
    'document': np.cumsum(reset, axis=1, dtype=np.int32) - reset[:, :1],
  }


def _write_corpus(
  folder: pathlib.Path,
  files: Sequence[sources.TextFile],
  tokenizer: tokenizers.Tokenizer,
):
  """Writes a cache beside its place and moves it there in one step."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix='draft-'))
  try:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    digest = hashlib.sha256()
    lengths = []
    with open(draft / 'tokens.npy', 'wb') as file:
      _write_header(file, dtype, 0)
      for document in files:
        ids = tokenizer.encode(sources.read_text(document.path))
        if len(ids):
          ids = np.concatenate([[tokenizer.document_id], ids])
        content = ids.astype(dtype).tobytes()
        file.write(content)
        digest.update(os.fsencode(f'{document.name}\0{len(ids)}\0') + content)
        lengths.append(len(ids))
      file.seek(0)
      _write_header(file, dtype, sum(lengths))
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    np.savez(
      draft / 'index.npz',
      starts=starts,
      fingerprint=digest.hexdigest()[:16],
    )
    try:
      draft.rename(folder)
    except OSError:
      if not folder.exists():  # Otherwise another process was first.
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def _write_header(file, dtype, size: int):
  """Writes the header of a .npy file; it is as long for every size."""
  np.lib.format.write_array_header_1_0(
    file,
    {'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': (size,)},
  )
