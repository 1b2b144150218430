"""Tokenizers: bytes, SentencePiece models and Hugging Face tokenizers.

Each kind knows how many bytes of text a token stands for, so bits per byte
follow exactly from the loss per token.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re

import numpy as np

from nested_learning import errors

# Names of the token between documents, most usual first.
_DOCUMENT_TOKENS = (
  '<|begin_of_text|>',
  '<|endoftext|>',
  '<bos>',
  '<s>',
  '[BOS]',
  '<eos>',
  '</s>',
  '[EOS]',
)
# The byte counts of a model are checked on these texts when it is loaded.
_PROBES = ('a', 'The cat, "2 x 3".', 'def f(x):\n  return x\n\n# naïve ☃')
_SURROGATES = re.compile('[\ud800-\udfff]')
# Tokens of context that decide how the next one is decoded: a character has at
# most 4, and the first of them may be the rest of another character.
_WINDOW = 16


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to token ids and back.

  For every text, `byte_lengths[[document_id, *encode(text)]].sum()` is the
  number of UTF-8 bytes of `decode(encode(text))`. Models that add a space
  before each text and remove it again when they decode have a document_id of
  length -1, which cancels the space.
  """

  vocab_size: int  # all ids are below it, also document_id
  document_id: int  # first token of each document; decodes to nothing
  byte_lengths: np.ndarray  # int32 [vocab_size]
  fingerprint: str  # equal for equal tokenizers, on every machine
  encode: Callable[[str], np.ndarray]  # text -> int32 [tokens]
  decode: Callable[[np.ndarray], str]
  # Ids of marks such as <|im_end|>, which decode to nothing, by their names.
  special: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def encode_marked(self, text: str) -> np.ndarray:
    r"""Encodes a text in which names of special tokens stand for them.

    Chat templates write such texts. `encode` takes the names as text.

    Args:
      text: For instance '<|im_start|>user\nhello<|im_end|>'.

    Returns:
      int32 [tokens].
    """
    if not self.special:
      return self.encode(text)
    longest_first = sorted(self.special, key=len, reverse=True)
    pattern = '|'.join(map(re.escape, longest_first))
    parts = re.split(f'({pattern})', text)
    encoded = [
      np.array([self.special[part]], np.int32) if i % 2 else self.encode(part)
      for i, part in enumerate(parts)
      if part
    ]
    return np.concatenate([np.zeros(0, np.int32), *encoded])

  def decode_after(
    self, context: Sequence[int] | np.ndarray, tokens: np.ndarray
  ) -> str:
    """Returns the text that `tokens` add to the text of `context`.

    Both are decoded together, so that a space between them is kept; decoded
    alone, SentencePiece and Metaspace drop the space before the first token. A
    character whose last bytes are missing is left out at the end; a later call
    with the missing tokens, and these as a part of its context, returns it.

    Args:
      context: int [n], the tokens before; may be empty.
      tokens: int [t].

    Returns:
      The text of `tokens`.
    """
    context = np.asarray(context, np.int64).reshape(-1)
    marks = np.flatnonzero(context == self.document_id)
    if len(marks):  # a document is decoded without the one before
      context = context[marks[-1] + 1 :]
    context = context[-_WINDOW:]
    together = np.concatenate([context, np.asarray(tokens, np.int64)])
    before = self._decode_whole(context)
    return self._decode_whole(together)[len(before) :]

  def _decode_whole(self, ids: np.ndarray) -> str:
    """Decodes `ids` without an unfinished character at the end."""
    mark = self._replacement.tolist()
    for end in range(len(ids), max(len(ids) - 4, -1), -1):
      text = self.decode(ids[:end])
      if not text.endswith('\ufffd') or (
        mark and ids[max(end - len(mark), 0) : end].tolist() == mark
      ):
        return text
    return self.decode(ids)  # more than an unfinished character

  @functools.cached_property
  def _replacement(self) -> np.ndarray:
    """Tokens of a replacement mark that the text itself contains."""
    return self.encode('a\ufffd')[len(self.encode('a')) :]


def replace_surrogates(text: str) -> str:
  """Returns `text` with U+FFFD for lone surrogates, which have no UTF-8.

  They come from JSON (half of an escaped pair) and from command lines and
  file names that are not UTF-8.
  """
  try:
    text.encode()
    return text
  except UnicodeEncodeError:
    return _SURROGATES.sub('\ufffd', text)


def lost_bytes(text: str, decoded: str) -> int:
  """Counts the bytes of the characters of `text` that `decoded` lacks."""
  if text == decoded:
    return 0
  missing = collections.Counter(text) - collections.Counter(decoded)
  return sum(
    count * len(replace_surrogates(character).encode())
    for character, count in missing.items()
  )


def make_tokenizer(spec: str) -> Tokenizer:
  """Makes a tokenizer.

  Args:
    spec: 'bytes', the path of a SentencePiece model (.model), or the path of a
      Hugging Face `tokenizers` file (.json).

  Returns:
    The tokenizer.

  Raises:
    UserError: The file is missing or damaged, the package that reads it is not
      installed, or the bytes behind its tokens cannot be counted.
  """
  if spec == 'bytes':
    return _make_bytes()
  makers = {'.model': _make_sentencepiece, '.json': _make_hugging_face}
  path = pathlib.Path(os.path.expanduser(spec))
  if path.suffix.lower() not in makers:
    raise errors.UserError(
      f"data.tokenizer={spec!r} is unknown. Give 'bytes', the path of a "
      'SentencePiece .model, or of a Hugging Face tokenizers .json.'
    )
  try:
    content = path.read_bytes()
  except (OSError, ValueError) as error:  # ValueError: a NUL in the path
    reason = getattr(error, 'strerror', None) or error
    raise errors.UserError(
      f'data.tokenizer={spec!r} cannot be read ({reason}). Check the path, or '
      "use 'bytes', which needs no file."
    ) from error
  return makers[path.suffix.lower()](spec, content)


def _make_bytes() -> Tokenizer:
  """Makes the tokenizer whose tokens are bytes; 256 is the document_id."""

  def encode(text):
    content = replace_surrogates(text).encode()
    return np.frombuffer(content, np.uint8).astype(np.int32)

  def decode(ids):
    ids = np.asarray(ids)
    return ids[ids < 256].astype(np.uint8).tobytes().decode(errors='replace')

  byte_lengths = np.ones(257, np.int32)
  byte_lengths[256] = 0
  return Tokenizer(257, 256, byte_lengths, 'bytes', encode, decode)


def _make_sentencepiece(spec: str, content: bytes) -> Tokenizer:
  try:
    import sentencepiece
  except ImportError as error:
    raise _missing_package(spec, 'sentencepiece') from error
  try:
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
  except Exception as error:  # The package raises RuntimeError for most.
    raise _damaged(spec, 'SentencePiece model') from error

  def byte_length(i):
    if model.is_control(i) or model.is_unused(i):
      return 0
    if model.is_unknown(i):
      return len(model.decode([i]).encode())
    return 1 if model.is_byte(i) else _piece_bytes(model.id_to_piece(i))

  ids = [i for i in (model.bos_id(), model.eos_id()) if i >= 0]
  controls = filter(model.is_control, range(model.vocab_size()))
  return _finish(
    spec,
    fingerprint=_fingerprint('sentencepiece', content),
    byte_lengths=[byte_length(i) for i in range(model.vocab_size())],
    document_id=ids[0] if ids else None,
    encode=model.encode,
    decode=model.decode,
    special={model.id_to_piece(i): i for i in controls},
  )


def _make_hugging_face(spec: str, content: bytes) -> Tokenizer:
  try:
    import tokenizers
  except ImportError as error:
    raise _missing_package(spec, 'tokenizers') from error
  try:
    model = tokenizers.Tokenizer.from_str(content.decode())
  except Exception as error:  # The package raises bare Exception.
    raise _damaged(spec, 'Hugging Face tokenizers file') from error
  model.no_padding()
  model.no_truncation()
  model.encode_special_tokens = True  # '<s>' in a text is text.
  decoder = json.dumps(json.loads(model.to_str())['decoder'])
  byte_level = '"ByteLevel"' in decoder
  byte_fallback = '"ByteFallback"' in decoder
  vocabulary = model.get_vocab(with_added_tokens=True)
  byte_lengths = [0] * (max(vocabulary.values(), default=-1) + 1)
  for piece, i in vocabulary.items():
    if byte_fallback and len(piece) == 6 and piece.startswith('<0x'):
      byte_lengths[i] = 1
    else:  # A byte-level piece has one character per byte.
      byte_lengths[i] = len(piece) if byte_level else _piece_bytes(piece)
  special = {}
  for i, token in model.get_added_tokens_decoder().items():
    byte_lengths[i] = 0 if token.special else len(token.content.encode())
    if token.special:
      special[token.content] = i
  names = [name for name in _DOCUMENT_TOKENS if name in special]
  return _finish(
    spec,
    fingerprint=_fingerprint('hugging_face', content),
    byte_lengths=byte_lengths,
    document_id=special[names[0]] if names else None,
    encode=lambda text: model.encode(text, add_special_tokens=False).ids,
    decode=model.decode,
    special=special,
  )


def _finish(
  spec: str,
  *,
  fingerprint: str,
  byte_lengths: list[int],
  document_id: int | None,
  encode: Callable[[str], list[int]],
  decode: Callable[[list[int]], str],
  special: Mapping[str, int],
) -> Tokenizer:
  """Adds a document_id if a model has none, and checks its byte counts."""
  if document_id is None:
    document_id = len(byte_lengths)
    byte_lengths = [*byte_lengths, 0]
  lengths = np.array(byte_lengths, np.int32)

  def encode_array(text):
    return np.array(encode(replace_surrogates(text)), np.int32)

  def decode_array(ids):
    ids = np.asarray(ids)
    return decode(ids[ids != document_id].tolist())

  surplus = set()
  for text in _PROBES:
    ids = encode_array(text)
    surplus.add(len(decode_array(ids).encode()) - int(lengths[ids].sum()))
  if len(surplus) > 1:
    raise errors.UserError(
      f'data.tokenizer={spec!r} decodes in a way that hides how many bytes '
      "a token stands for. Use 'bytes', a SentencePiece model, or byte-level "
      'BPE.'
    )
  lengths[document_id] = surplus.pop()
  return Tokenizer(
    vocab_size=len(lengths),
    document_id=document_id,
    byte_lengths=lengths,
    fingerprint=fingerprint,
    encode=encode_array,
    decode=decode_array,
    special=special,
  )


def _piece_bytes(piece: str) -> int:
  """Counts the bytes of a piece in which '▁' stands for a space."""
  return len(piece.replace('▁', ' ').encode())


def _fingerprint(kind: str, content: bytes) -> str:
  return f'{kind}-{hashlib.sha256(content).hexdigest()[:16]}'


def _missing_package(spec: str, package: str) -> errors.UserError:
  return errors.UserError(
    f'data.tokenizer={spec!r} needs the package {package}. Install it with '
    '`pip install "nested-learning[tokenizers]"`, or use \'bytes\'.'
  )


def _damaged(spec: str, kind: str) -> errors.UserError:
  return errors.UserError(
    f'data.tokenizer={spec!r} is not a {kind}, or is damaged. Export or '
    "download it again, or use 'bytes'."
  )
