"""Documents as tokens: cached once on disk, then read as rows of one stream.

A corpus holds every document of a source as [document_id] + tokens, in one
memory-mapped array. A stream is some of its documents in some order, end to
end and around again. Rows of a batch are slices of a stream, so where a row
begins is all there is to say about it.
"""

import array
from collections.abc import Iterator, Sequence
import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple
import zipfile

from absl import logging
import numpy as np

from nested_learning import errors
from nested_learning.data import documents as documents_lib
from nested_learning.data import sources
from nested_learning.data import tokenizers


class Corpus(NamedTuple):
  """Document i is tokens[starts[i]:starts[i + 1]], or empty.

  Attributes:
    tokens: [tokens], memory-mapped, or what is indexed like it by an array.
    starts: int64 [documents + 1].
    places: float64 [documents], by which a document is on one side of a split.
    fingerprint: Hash of names and tokens, the same on every machine.
  """

  tokens: Any
  starts: np.ndarray
  places: np.ndarray
  fingerprint: str


class Stream(NamedTuple):
  """Documents of a corpus in an order; position 0 follows the last one."""

  tokens: Any  # [tokens], those of the corpus
  starts: np.ndarray  # int64 [documents], of each document in `tokens`
  begins: np.ndarray  # int64 [documents], of each document in the stream
  length: int  # tokens of the stream


def default_cache_dir() -> pathlib.Path:
  """The folder for token caches: below $XDG_CACHE_HOME, or ~/.cache."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'nested_learning' / 'tokens'


def load_corpus(
  documents: documents_lib.Documents,
  tokenizer: tokenizers.Tokenizer,
  *,
  cache_dir: str | None = None,
) -> Corpus:
  """Tokenises documents, or maps the tokens of an earlier call.

  The cache is a folder named after a hash of the paths, sizes and times of the
  files and of the tokenizer. It appears complete or not at all, so processes
  may race for it.

  Args:
    documents: The documents.
    tokenizer: What makes tokens of them.
    cache_dir: Folder of all caches; None for `default_cache_dir()`.

  Returns:
    The corpus.

  Raises:
    UserError: A file is no text, or the cache cannot be written or read.
  """
  key = hashlib.sha256(tokenizer.fingerprint.encode())
  for part in documents.identity():
    key.update(part)
  root = pathlib.Path(cache_dir) if cache_dir else default_cache_dir()
  folder = root.expanduser() / key.hexdigest()[:32]
  try:
    if not folder.exists():
      logging.info('Tokenising %r into %s', documents, folder)
      _write_corpus(folder, documents, tokenizer)
  except OSError as error:
    raise errors.UserError(
      f'The token cache {folder} cannot be written ({error.strerror}). Set '
      'data.cache_dir to a folder with room that you may write to.'
    ) from error
  try:
    with np.load(folder / 'index.npz') as index:
      starts, fingerprint = index['starts'], str(index['fingerprint'])
      # A cache of an earlier version holds no places.
      places = index['places'] if 'places' in index else None
    tokens = np.load(folder / 'tokens.npy', mmap_mode='r')
  except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise errors.UserError(
      f'The token cache {folder} is damaged. Delete that folder; it is made '
      'again from the text.'
    ) from error
  if places is None:
    places = sources.places(map(documents.name, range(len(starts) - 1)))
  return Corpus(tokens, starts, places, fingerprint)


def join(corpora: Sequence[Corpus], fingerprint: str) -> Corpus:
  """Several corpora as one, the documents of the first before the others'.

  Args:
    corpora: The corpora.
    fingerprint: Of the whole.
  """
  bases = np.cumsum([0, *(corpus.starts[-1] for corpus in corpora)])
  shifted = [
    corpus.starts[:-1] + base
    for corpus, base in zip(corpora, bases[:-1], strict=True)
  ]
  return Corpus(
    tokens=_Joined([corpus.tokens for corpus in corpora], bases),
    starts=np.concatenate([*shifted, bases[-1:]]),
    places=np.concatenate([corpus.places for corpus in corpora]),
    fingerprint=fingerprint,
  )


class _Joined:
  """Arrays end to end, indexed by an array of positions."""

  def __init__(self, arrays: Sequence[Any], bases: np.ndarray):
    self._arrays, self._bases = arrays, bases

  def __getitem__(self, positions: np.ndarray) -> np.ndarray:
    found = np.zeros(positions.shape, np.int32)
    which = np.searchsorted(self._bases, positions, side='right') - 1
    for i in np.unique(which):
      mine = which == i
      found[mine] = self._arrays[i][positions[mine] - self._bases[i]]
    return found


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


class Tokenised:
  """What is to be said of documents while they are tokenised one by one.

  Attributes:
    dtype: The smallest type that holds the tokens.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    self._tokenizer = tokenizer
    self._digest = hashlib.sha256()
    self._lengths = array.array('q')
    self._places = array.array('d')

  def add(self, name: str, document: str | np.ndarray) -> np.ndarray:
    """Takes a document, as text or as tokens, and returns its tokens.

    Args:
      name: What it is called.
      document: Its text, or its ids without the document_id.

    Returns:
      [tokens] of `dtype`, the document_id first; nothing for an empty one.
    """
    if isinstance(document, str):
      document = self._tokenizer.encode(document)
    ids = np.asarray(document)
    if len(ids):
      ids = np.concatenate([[self._tokenizer.document_id], ids])
    ids = ids.astype(self.dtype)
    self._digest.update(os.fsencode(f'{name}\0{len(ids)}\0') + ids.tobytes())
    self._lengths.append(len(ids))
    self._places.extend(sources.places([name]))
    return ids

  @property
  def starts(self) -> np.ndarray:
    """Where each document begins, and where the last ends; int64."""
    return np.cumsum([0, *self._lengths], dtype=np.int64)

  @property
  def places(self) -> np.ndarray:
    """`Corpus.places`."""
    return np.array(self._places)

  @property
  def fingerprint(self) -> str:
    """`Corpus.fingerprint`."""
    return self._digest.hexdigest()[:16]


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A draft of a folder, which gets its name when all is in it.

  Args:
    folder: What it will be called. If another process is first, its folder
      stays.

  Yields:
    The draft, beside it.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix='draft-'))
  try:
    yield draft
    try:
      draft.rename(folder)
    except OSError:
      if not folder.exists():
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def _write_corpus(
  folder: pathlib.Path,
  documents: documents_lib.Documents,
  tokenizer: tokenizers.Tokenizer,
):
  """Writes a cache: an array of tokens and its index."""
  tokenised = Tokenised(tokenizer)
  with whole_folder(folder) as draft:
    with open(draft / 'tokens.npy', 'wb') as file:
      _write_header(file, tokenised.dtype, 0)
      for i, document in enumerate(documents):
        file.write(tokenised.add(documents.name(i), document).tobytes())
      file.seek(0)
      _write_header(file, tokenised.dtype, int(tokenised.starts[-1]))
    np.savez(
      draft / 'index.npz',
      starts=tokenised.starts,
      places=tokenised.places,
      fingerprint=tokenised.fingerprint,
    )


def _write_header(file, dtype, size: int):
  """Writes the header of a .npy file; it is as long for every size."""
  np.lib.format.write_array_header_1_0(
    file,
    {'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': (size,)},
  )
