"""Documents as tokens, made once and kept in a cache on disk.

A corpus holds every document of a source as [document_id] + tokens, end to end
in one memory-mapped array.
"""

import array
from collections.abc import Sequence
import functools
import hashlib
import os
import pathlib
from typing import Any, BinaryIO, NamedTuple
import zlib

from absl import logging
import numpy as np

from nested_learning import errors
from nested_learning import files
from nested_learning.data import documents as documents_lib
from nested_learning.data import tokenizers

# Hashed into the name of a cache, so that caches of other versions are ignored.
_VERSION = b'corpus 2'
_INDEX = ('starts', 'places', 'contents', 'fingerprint', 'lost', 'checksum')
_SAMPLE = 2**20  # characters that are decoded again to measure loss
_NOTICED_LOSS = 1e-3  # share of lost bytes above which a warning is logged


class Corpus(NamedTuple):
  """The tokens of documents; document i is tokens[starts[i]:starts[i + 1]].

  Attributes:
    tokens: [tokens], memory-mapped, or another object that is indexed by an
      array of positions.
    starts: int64 [documents + 1].
    places: float64 [documents] in [0, 1), from the documents' names; see
      `streams.split`.
    contents: uint64 [documents], hashes of the documents' tokens.
    fingerprint: Hash of names and tokens, the same on every machine.
    vocab_size: Every token is below it.
    folder: Where the tokens are, for errors.
  """

  tokens: Any
  starts: np.ndarray
  places: np.ndarray
  contents: np.ndarray
  fingerprint: str
  vocab_size: int
  folder: str


def load_corpus(
  documents: documents_lib.Documents,
  tokenizer: tokenizers.Tokenizer,
  *,
  cache_dir: str | None = None,
) -> Corpus:
  """Tokenises documents, or maps the tokens of an earlier call.

  The cache is a folder named after a hash of the paths, sizes and times of the
  files and of the tokenizer. It appears complete or not at all, so processes
  may race for it. Its checksum is compared once per process.

  Args:
    documents: The documents.
    tokenizer: The tokenizer.
    cache_dir: Folder of all caches; None for `nested_learning/tokens` below
      $XDG_CACHE_HOME or ~/.cache.

  Returns:
    The corpus.

  Raises:
    errors.UserError: A file is not text, or the cache cannot be written or
      read.
  """
  key = hashlib.sha256(_VERSION + tokenizer.fingerprint.encode())
  for part in documents.identity():
    key.update(part)
  root = pathlib.Path(os.path.expanduser(cache_dir or default_cache_dir()))
  folder = root / key.hexdigest()[:32]
  try:
    if not folder.exists():
      logging.info('Tokenising %r into %s', documents, folder)
      _write(folder, documents, tokenizer)
  except OSError as error:
    raise errors.of_disk(error.errno)(
      f'The token cache {files.shown(folder)} cannot be written '
      f'({error.strerror}). Set data.cache_dir to a folder with room that you '
      'may write to.'
    ) from error
  try:
    return _read(folder, tokenizer)
  except MemoryError:
    raise
  except Exception as error:  # NumPy's readers raise exceptions of many types
    if is_no_damage(error):
      raise errors.UserError(
        f'The token cache {files.shown(folder)} cannot be read '
        f'({error.strerror}). Set data.cache_dir to a folder of your own.'
      ) from error
    raise errors.UserError(
      f'The token cache {files.shown(folder)} is damaged '
      f'({errors.first_line(error)}). Delete that folder; it is made again '
      'from the text.'
    ) from error


def is_no_damage(error: Exception) -> bool:
  """Returns whether the system refused a file, which may be good."""
  is_missing = isinstance(error, FileNotFoundError)
  return isinstance(error, OSError) and bool(error.strerror) and not is_missing


def check_index(
  starts: np.ndarray,
  places: np.ndarray,
  contents: np.ndarray,
  num_tokens: int,
) -> None:
  """Raises ValueError if the arrays of an index do not fit together."""
  num_documents = len(starts) - 1
  if (
    starts.shape != (num_documents + 1,)
    or places.shape != (num_documents,)
    or contents.shape != (num_documents,)
    or (starts.dtype, places.dtype) != (np.int64, np.float64)
    or contents.dtype != np.uint64
  ):
    raise ValueError('its index has arrays of other shapes or types')
  if num_documents < 0 or starts[0] or (np.diff(starts) < 0).any():
    raise ValueError('its index is not in order')
  if not ((places >= 0) & (places < 1)).all():
    raise ValueError('its index has places outside of [0, 1)')
  if starts[-1] != num_tokens:
    raise ValueError(f'it has {num_tokens} tokens of {starts[-1]}')


def checksum(path: pathlib.Path) -> int:
  """Returns the CRC-32 of a file, computed once per process."""
  stat = path.stat()
  return _checksum(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _checksum(path: pathlib.Path, size: int, mtime: int) -> int:
  del size, mtime  # a file that changed is another key
  value = 0
  with open(path, 'rb') as file:
    while block := file.read(2**24):
      value = zlib.crc32(block, value)
  return value


def warn_of_loss(tokenizer: str, lost: float) -> None:
  """Logs a warning if a tokenizer loses a part of the text.

  Args:
    tokenizer: Its fingerprint.
    lost: Share of the bytes that are lost, in [0, 1].
  """
  if lost > _NOTICED_LOSS:
    _warn_once(
      f'The tokenizer {tokenizer} loses {lost:.1%} of the bytes of this text: '
      'decoded tokens are not the text. Bits per byte count the bytes that '
      'tokens decode to, and cannot be compared with those of other '
      "tokenizers. A tokenizer with byte fallback, or data.tokenizer='bytes', "
      'loses nothing.'
    )


@functools.cache
def _warn_once(message: str) -> None:
  logging.warning('%s', message)


class IndexBuilder:
  """Tokenises documents one by one and collects their index.

  Attributes:
    dtype: The smallest type that holds the tokens.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    self._tokenizer = tokenizer
    self._digest = hashlib.sha256()
    self._lengths = array.array('q')
    self._places = array.array('d')
    self._contents = array.array('Q')
    self._num_bytes, self._num_lost = 0, 0
    self._sample_bytes, self._sample_lost = 0, 0
    self._sample_left = _SAMPLE

  def add(self, name: str, document: str | np.ndarray) -> np.ndarray:
    """Adds a document, as text or as tokens, and returns its tokens.

    Args:
      name: Its name, by which it is in one split or the other.
      document: Its text, or its ids without the document_id.

    Returns:
      [tokens] of `dtype`, the document_id first; empty for an empty document.
    """
    is_text = isinstance(document, str)
    ids = np.asarray(self._tokenizer.encode(document) if is_text else document)
    if len(ids):
      ids = np.concatenate([[self._tokenizer.document_id], ids])
    if is_text:
      self._count_loss(document, ids)
    content = ids.astype(self.dtype).tobytes()
    self._digest.update(os.fsencode(f'{name}\0{len(ids)}\0') + content)
    self._lengths.append(len(ids))
    self._places.append(place(name))
    hashed = hashlib.blake2b(content, digest_size=8).digest()
    self._contents.append(int.from_bytes(hashed, 'little'))
    return ids.astype(self.dtype)

  def _count_loss(self, text: str, ids: np.ndarray) -> None:
    num_bytes = len(tokenizers.replace_surrogates(text).encode())
    num_kept = int(self._tokenizer.byte_lengths[ids].sum())
    self._num_bytes += num_bytes
    self._num_lost += max(num_bytes - num_kept, 0)
    if self._sample_left > 0:
      # The number of bytes does not show letters that became other letters.
      self._sample_left -= len(text)
      self._sample_bytes += num_bytes
      self._sample_lost += tokenizers.lost_bytes(
        text, self._tokenizer.decode(ids)
      )

  @property
  def starts(self) -> np.ndarray:
    """`Corpus.starts`."""
    return np.cumsum([0, *self._lengths], dtype=np.int64)

  @property
  def places(self) -> np.ndarray:
    """`Corpus.places`."""
    return np.array(self._places)

  @property
  def contents(self) -> np.ndarray:
    """`Corpus.contents`."""
    return np.array(self._contents, np.uint64)

  @property
  def fingerprint(self) -> str:
    """`Corpus.fingerprint`."""
    return self._digest.hexdigest()[:16]

  @property
  def lost(self) -> float:
    """Share of the bytes of the text that the tokens do not decode to."""
    return max(
      self._num_lost / max(self._num_bytes, 1),
      self._sample_lost / max(self._sample_bytes, 1),
    )


def place(name: str) -> float:
  """Returns where a name lies in [0, 1), by its hash."""
  digest = hashlib.sha256(os.fsencode(name)).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48


def default_cache_dir() -> str:
  """Returns the folder of token caches for data.cache_dir=None."""
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return os.path.join(root, 'nested_learning', 'tokens')


def _write(
  folder: pathlib.Path,
  documents: documents_lib.Documents,
  tokenizer: tokenizers.Tokenizer,
) -> None:
  """Writes a cache: an array of tokens and its index."""
  index = IndexBuilder(tokenizer)
  with files.whole_folder(folder) as draft:
    with open(draft / 'tokens.npy', 'wb') as file:
      _write_header(file, index.dtype, 0)
      for i, document in enumerate(documents):
        file.write(index.add(documents.name(i), document).tobytes())
      file.seek(0)
      _write_header(file, index.dtype, int(index.starts[-1]))
    documents.check_unchanged()
    np.savez(
      draft / 'index.npz',
      starts=index.starts,
      places=index.places,
      contents=index.contents,
      fingerprint=index.fingerprint,
      lost=index.lost,
      checksum=checksum(draft / 'tokens.npy'),
    )


def _write_header(file: BinaryIO, dtype: Any, size: int) -> None:
  """Writes the header of a .npy file, whose length is the same for any size."""
  np.lib.format.write_array_header_1_0(
    file,
    {'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': (size,)},
  )


def _read(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> Corpus:
  """Reads a cache; raises exceptions of many types if it is damaged."""
  with np.load(folder / 'index.npz') as index:  # a zip file has checksums
    starts, places, contents, fingerprint, lost, expected = (
      index[name] for name in _INDEX
    )
  path = folder / 'tokens.npy'
  if checksum(path) != expected:
    raise ValueError('tokens.npy has another checksum')
  tokens = np.load(path, mmap_mode='r')
  check_index(starts, places, contents, len(tokens))
  warn_of_loss(tokenizer.fingerprint, float(lost))
  return Corpus(
    tokens=tokens,
    starts=starts,
    places=places,
    contents=contents,
    fingerprint=str(fingerprint),
    vocab_size=tokenizer.vocab_size,
    folder=str(folder),
  )


def join_tokens(corpora: Sequence[Corpus]) -> tuple[Any, np.ndarray]:
  """Lays the tokens of several corpora end to end.

  Args:
    corpora: At least one.

  Returns:
    The tokens, indexed by an array of positions, and int64 [corpora], where
    those of each corpus begin.
  """
  bases = np.cumsum([0, *(corpus.starts[-1] for corpus in corpora)])
  if len(corpora) == 1:
    return corpora[0].tokens, bases[:1]
  return _Joined([corpus.tokens for corpus in corpora], bases), bases[:-1]


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
