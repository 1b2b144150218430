"""Log-likelihood of a continuation, given its context.

    score = make_score(model, batch_size=8)
    scores = score(params, [encode_pair(tokenizer, 'two and two', ' is four')])

Every context begins with the tokenizer's mark of a document, as every document
in training does, so an empty context is one too. A model whose state has a
constant size reads any context whole, in pieces, with its state carried.
Attention reads what its state holds: the end of a longer text.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import inference
from nested_learning import models
from nested_learning import sharding

_SHORTEST = 32  # tokens of the shortest call


class Request(NamedTuple):
  """A context and a continuation to score.

  Attributes:
    context: int32 [m], m >= 1.
    continuation: int32 [n], n >= 0.
  """

  context: np.ndarray
  continuation: np.ndarray


class Score(NamedTuple):
  """The score of a continuation.

  Attributes:
    log_likelihood: Of the continuation given its context, in nats.
    is_greedy: Whether each of its tokens is the most likely one there.
  """

  log_likelihood: float
  is_greedy: bool


class Limits(NamedTuple):
  """Lengths that a model can read.

  Attributes:
    piece: Most tokens of one call; longer streams are read in pieces.
    stream: Most tokens of one stream; None for any number.
  """

  piece: int
  stream: int | None


class Window(NamedTuple):
  """A stream that scores some tokens of a request.

  Attributes:
    index: Number of the request.
    tokens: int32 [t]; all but the last are read.
    num_scored: Tokens at the end that are scored.
  """

  index: int
  tokens: np.ndarray
  num_scored: int


def encode_context(tokenizer: data_lib.Tokenizer, text: str) -> np.ndarray:
  """Returns the mark of a document and the tokens of a text, int32 [1 + t]."""
  tokens = np.asarray(tokenizer.encode(text), np.int32)
  return np.concatenate([[tokenizer.document_id], tokens]).astype(np.int32)


def encode_pair(
  tokenizer: data_lib.Tokenizer, context: str, continuation: str
) -> Request:
  """Tokenizes `context + continuation` and cuts it where the two meet.

  The context keeps its tokens as far as they are the same alone. White space at
  its end moves to the continuation, where tokens that begin with a space have
  theirs; a token across the border belongs to the continuation.

  Args:
    tokenizer: The tokenizer.
    context: Text that is given; may be empty.
    continuation: Text to score.

  Returns:
    The request.
  """
  alone = encode_context(tokenizer, context.rstrip())
  whole = encode_context(tokenizer, context + continuation)
  length = min(len(alone), len(whole))
  differs = alone[:length] != whole[:length]
  border = int(np.argmax(differs)) if differs.any() else length
  return Request(whole[:border], whole[border:])


def make_score(
  model: models.Model,
  *,
  batch_size: int = 8,
  max_length: int | None = None,
  vocab_size: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Callable[..., list[Score]]:
  """Makes `score(params, requests, *, description=None) -> [Score]`.

  It returns the scores in the order of the requests, and shows a progress bar
  if there is a description. A program is compiled for each power of two of
  tokens up to max_length, twice where streams are longer than that.

  Args:
    model: From `models.make_model`.
    batch_size: Streams that are read together.
    max_length: Most tokens of one call, and of one stream for models that have
      a longest; None for model.max_length.
    vocab_size: Only tokens below it can be the most likely one; None for all of
      the model's.
    mesh: Devices to spread the rows over, with the parameters on it; None for
      where the parameters are.

  Returns:
    The function.

  Raises:
    errors.UserError: If batch_size or max_length is out of range, or the model
      has fewer tokens than vocab_size; the function, if the model does not have
      a token of a request.
  """
  limits = read_limits(model.config, max_length)
  rows = num_rows(batch_size, mesh)
  vocab_size = check_vocab_size(model.config, vocab_size)
  whole = None if mesh is None else sharding.replicated(mesh)

  @functools.partial(jax.jit, out_shardings=(whole, whole, None))
  def read(params, state, tokens, targets):
    # No mask: padding is on the right, where nothing that counts sees it.
    logits, state = model.forward(params, state, tokens)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    likeliest = jnp.argmax(logits[..., :vocab_size], axis=-1)
    return -loss, likeliest == targets, state

  def read_batch(params, windows):
    """Returns log-likelihoods and whether they are greedy, both [b, t]."""
    streams = [window.tokens for window in windows]
    inputs = pad([s[:-1] for s in streams], rows, limits.piece)
    targets = np.zeros_like(inputs)
    for row, stream in zip(targets, streams, strict=False):
      row[: len(stream) - 1] = stream[1:]
    state, logs, hits = None, [], []
    for start in range(0, inputs.shape[1], limits.piece):
      part = slice(start, start + limits.piece)
      log, hit, state = read(
        params,
        state,
        put(np.maximum(inputs[:, part], 0), mesh),
        put(targets[:, part], mesh),
      )
      logs.append(jax.device_get(log))
      hits.append(jax.device_get(hit))
    return np.concatenate(logs, axis=1), np.concatenate(hits, axis=1)

  def score(params, requests, *, description=None):
    for request in requests:
      inference.check_tokens(_join(request), model.config.vocab_size)
    windows = [
      window
      for i, request in enumerate(requests)
      for window in make_windows(i, request, limits.stream)
    ]
    _warn_of_cuts(requests, limits.stream)
    # Summed in float64, in which a long text's digits are not lost.
    sums = np.zeros(len(requests))
    greedy = np.ones(len(requests), bool)
    lengths = [len(window.tokens) for window in windows]
    with progress(len(windows), description) as bar:
      for places in batches(lengths, rows):
        batch = [windows[place] for place in places]
        logs, hits = read_batch(params, batch)
        for window, log, hit in zip(batch, logs, hits, strict=False):
          last = len(window.tokens) - 1
          part = slice(last - window.num_scored, last)
          sums[window.index] += log[part].sum(dtype=np.float64)
          greedy[window.index] &= hit[part].all()
        bar.update(len(places))
    return [Score(float(x), bool(g)) for x, g in zip(sums, greedy, strict=True)]

  return score


def make_windows(
  index: int, request: Request, limit: int | None
) -> list[Window]:
  """Cuts a request into streams that score each token of it once.

  It is one stream unless the continuation is longer than a stream may be. Then
  each begins where the one before it ended, with at least one token of context,
  and the last has all the context that it may have.

  Args:
    index: Number of the request.
    request: The request.
    limit: Most tokens of a stream; None for any number.

  Returns:
    The windows; none for an empty continuation.
  """
  tokens = _join(request)
  if limit is None:
    limit = len(tokens)
  windows = []
  for start in range(len(request.context), len(tokens), limit):
    end = min(start + limit, len(tokens))
    first = max(end - 1 - limit, 0)
    windows.append(Window(index, tokens[first:end], end - start))
  return windows


def read_limits(
  config: models.ModelConfig, max_length: int | None = None
) -> Limits:
  """Returns the lengths that a model can read.

  Args:
    config: The model.
    max_length: Most tokens of one call, and of a stream where there is a limit;
      None for model.max_length.

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


def check_vocab_size(config: models.ModelConfig, size: int | None) -> int:
  """Returns the size of a tokenizer's vocabulary, the model's for None.

  Raises:
    errors.UserError: If the tokenizer has more tokens than the model.
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
  """Pads rows of different lengths on the right to one of few lengths.

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


def num_rows(batch_size: int, mesh: jax.sharding.Mesh | None) -> int:
  """Rounds the rows of a batch up to a multiple of what the mesh needs.

  Raises:
    errors.UserError: If batch_size is below 1.
  """
  if batch_size < 1:
    raise errors.UserError(f'batch_size={batch_size} must be at least 1.')
  groups = 1 if mesh is None else sharding.num_row_groups(mesh)
  return -(-batch_size // groups) * groups


def put(x: np.ndarray, mesh: jax.sharding.Mesh | None) -> jax.Array:
  """Places an array [b, ...], equal in all processes, by rows on the mesh."""
  if mesh is None:
    return jnp.asarray(x)
  return jax.device_put(x, sharding.batch_sharding(mesh))


def progress(total: int, description: str | None) -> tqdm.tqdm:
  """Returns a progress bar; it is hidden without a description."""
  return tqdm.tqdm(
    total=total,
    desc=description,
    disable=description is None or jax.process_index() > 0,
  )


def _join(request: Request) -> np.ndarray:
  return np.concatenate([request.context, request.continuation])


def _warn_of_cuts(requests: Sequence[Request], limit: int | None) -> None:
  if limit is None:
    return
  lengths = [len(_join(request)) - 1 for request in requests]
  num_cut = sum(length > limit for length in lengths)
  if num_cut:
    logging.warning(
      '%d of %d texts are longer than the %d tokens that attention holds (the '
      'longest has %d): tokens are scored with what fits before them.',
      num_cut,
      len(requests),
      limit,
      max(lengths),
    )
