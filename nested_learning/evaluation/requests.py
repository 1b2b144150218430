"""Requests about text as tokens, and how they are laid out in batches.

A question is a context and what is asked about what follows it. Every context
begins with the tokenizer's mark of a document, as every document in training
does, so that an empty one is a context too.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import models
from nested_learning import sharding

_SHORTEST = 32  # tokens of the shortest call


class Request(NamedTuple):
  """A context and the continuation whose probability is asked for.

  Attributes:
    context: int32 [m], m >= 1.
    continuation: int32 [n], n >= 0.
  """

  context: np.ndarray
  continuation: np.ndarray


class Limits(NamedTuple):
  """What a model can read.

  Attributes:
    piece: Tokens of one call at most; longer streams are read in pieces.
    stream: Tokens of one stream at most; None where the state, whose size is
      constant, holds any number.
  """

  piece: int
  stream: int | None


def encode_context(tokenizer: data_lib.Tokenizer, text: str) -> np.ndarray:
  """The mark of a document and the tokens of a text, int32 [1 + t]."""
  tokens = np.asarray(tokenizer.encode(text), np.int32)
  return np.concatenate([[tokenizer.document_id], tokens]).astype(np.int32)


def encode_pair(
  tokenizer: data_lib.Tokenizer, context: str, continuation: str
) -> Request:
  """Cuts the tokens of `context + continuation` where the two meet.

  Both are tokenized together, as they would be in a text, and the context keeps
  its tokens as far as they are the same alone. White space at its end moves to
  the continuation, where tokens that begin with a space have theirs; a token
  that reaches across the border belongs to the continuation.

  Args:
    tokenizer: The tokenizer.
    context: Text that is given; may be empty.
    continuation: Text whose probability is asked for.

  Returns:
    The request.
  """
  stripped = context.rstrip()
  alone = encode_context(tokenizer, stripped)
  whole = encode_context(tokenizer, context + continuation)
  length = min(len(alone), len(whole))
  differs = alone[:length] != whole[:length]
  cut = int(np.argmax(differs)) if differs.any() else length
  return Request(whole[:cut], whole[cut:])


def limits(config: models.ModelConfig, max_length: int | None = None) -> Limits:
  """What a model can read.

  Args:
    config: The model.
    max_length: Tokens of one call, and of a stream where there is a limit;
      None for model.max_length.

  Returns:
    The limits.

  Raises:
    errors.UserError: If max_length is below 1 or beyond the model's.
  """
  if max_length is not None and not 1 <= max_length <= config.max_length:
    raise errors.UserError(
      f'max_length={max_length} must be at least 1 and at most '
      f'model.max_length={config.max_length}; leave it out for the latter.'
    )
  piece = config.max_length if max_length is None else max_length
  stream = models.max_stream_length(config)
  return Limits(piece, None if stream is None else min(piece, stream))


def vocab_size(config: models.ModelConfig, size: int | None) -> int:
  """Returns how many tokens texts have, those of the model for None.

  Raises:
    errors.UserError: If they are more than the model has.
  """
  if size is None:
    return config.vocab_size
  if not 1 <= size <= config.vocab_size:
    raise errors.UserError(
      f'the tokenizer has {size} tokens, and model.vocab_size='
      f'{config.vocab_size}; use the tokenizer that the model was trained with.'
    )
  return size


def batches(
  lengths: Sequence[int], batch_size: int
) -> Iterator[tuple[int, ...]]:
  """Yields the places of at most batch_size lengths each, longest first.

  A batch that does not fit in memory fails at once, and rows of a batch are of
  about one length.
  """
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  for start in range(0, len(order), batch_size):
    yield tuple(order[start : start + batch_size])


def pad(rows: Sequence[np.ndarray], num_rows: int, piece: int) -> np.ndarray:
  """Rows of different lengths, padded on the right to one of few lengths.

  Args:
    rows: int32 [t] each.
    num_rows: Rows of the result, at least as many; those added are empty.
    piece: Tokens of a call.

  Returns:
    int32 [num_rows, n], -1 where there is no token; n is whole pieces, and then
    a power of two or one more piece.
  """
  longest = max(len(row) for row in rows)
  whole, rest = divmod(longest, piece)
  bucket = _SHORTEST
  while bucket < rest:
    bucket *= 2
  num_tokens = whole * piece + (min(bucket, piece) if rest else 0)
  padded = np.full((num_rows, num_tokens), -1, np.int32)
  for i, row in enumerate(rows):
    padded[i, : len(row)] = row
  return padded


def pieces(num_tokens: int, piece: int) -> Iterator[slice]:
  """Yields the slices of a stream that is read `piece` tokens at a time."""
  for start in range(0, num_tokens, piece):
    yield slice(start, min(start + piece, num_tokens))


def num_rows(batch_size: int, mesh: Any) -> int:
  """Rows of a batch: as asked, rounded up to what the mesh divides."""
  if batch_size < 1:
    raise errors.UserError(f'batch_size={batch_size} must be at least 1.')
  groups = 1 if mesh is None else sharding.num_row_groups(mesh)
  return -(-batch_size // groups) * groups


def put(x: np.ndarray, mesh: Any) -> jax.Array:
  """Puts an array [b, ...], the same in every process, where its rows go."""
  if mesh is None:
    return jnp.asarray(x)
  return jax.device_put(x, sharding.batch_sharding(mesh))
