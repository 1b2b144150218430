"""The SentencePiece model that a GGUF file describes, as a tokenizer.model.

A model is a protocol buffer: `ModelProto` of sentencepiece_model.proto. GGUF
has its pieces, scores and types; the rest are switches.
"""

from collections.abc import Mapping
import struct
from typing import Any

_VARINT, _BYTES, _FLOAT = 0, 2, 5  # wire types of a field
_BPE = 2  # TrainerSpec.ModelType
_BYTE = 6  # type of a piece that stands for a byte


def make(fields: Mapping[str, Any]) -> bytes:
  """Makes the content of a tokenizer.model.

  Args:
    fields: Metadata of a GGUF file.

  Returns:
    A serialised `ModelProto`.
  """
  tokens = fields['tokenizer.ggml.tokens']
  scores = fields.get('tokenizer.ggml.scores') or [0.0] * len(tokens)
  types = fields.get('tokenizer.ggml.token_type') or [1] * len(tokens)
  adds_space = fields.get('tokenizer.ggml.add_space_prefix', True)
  pieces = (
    _field(1, token.encode()) + _field(2, float(score)) + _field(3, int(kind))
    for token, score, kind in zip(tokens, scores, types, strict=True)
  )
  model = b''.join(_field(1, piece) for piece in pieces)
  ids = b''.join(
    # An id that is absent is -1, which takes all 64 bits.
    _field(number, int(fields.get(f'tokenizer.ggml.{name}_token_id', -1)))
    for number, name in ((40, 'unknown'), (41, 'bos'), (42, 'eos'))
  )
  trainer = _field(3, _BPE) + _field(35, int(_BYTE in types)) + ids
  normalizer = (
    _field(1, b'identity') + _field(3, int(bool(adds_space))) + _field(4, 0)
  )
  return model + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: bytes | float | int) -> bytes:
  """Serialises a field of a message."""
  if isinstance(value, bytes):
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
  if isinstance(value, float):
    return _varint(number << 3 | _FLOAT) + struct.pack('<f', value)
  return _varint(number << 3 | _VARINT) + _varint(value % (1 << 64))


def _varint(value: int) -> bytes:
  out = bytearray()
  while value > 0x7F:
    out.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*out, value])
