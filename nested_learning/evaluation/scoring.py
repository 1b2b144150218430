"""The probability of a continuation, given its context.

    score = make_score(model, batch_size=8)
    scores = score(params, [encode_pair(tokenizer, 'two and two', ' is four')])

A model whose state has a constant size reads any context whole, in pieces, with
its state carried. Attention sees what its state holds: of a longer text, the
tokens before the last of the continuation.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from nested_learning import inference
from nested_learning import models
from nested_learning import sharding
from nested_learning.evaluation import requests as requests_lib


class Score(NamedTuple):
  """What a model says of a continuation.

  Attributes:
    log_likelihood: Of the continuation given its context, in nats.
    is_greedy: Whether each token is the most likely one where it stands.
  """

  log_likelihood: float
  is_greedy: bool


class Window(NamedTuple):
  """What is read in one stream to score some tokens of a request.

  Attributes:
    index: Of the request.
    tokens: int32 [t]; all but the last are read.
    num_scored: Tokens at the end that are scored.
  """

  index: int
  tokens: np.ndarray
  num_scored: int


def make_score(
  model: models.Model,
  *,
  batch_size: int = 8,
  max_length: int | None = None,
  vocab_size: int | None = None,
  mesh: Any = None,
) -> Callable[..., list[Score]]:
  """Makes `score(params, requests, *, description=None) -> [Score]`.

  It returns the scores in the order of the requests, and shows a progress bar
  where there is a description. A program is compiled for each power of two of
  tokens up to max_length, twice where streams are longer than that.

  Args:
    model: From `models.make_model`.
    batch_size: Streams that are read together.
    max_length: Tokens of one call; the longest stream of a model that has a
      longest. None for model.max_length.
    vocab_size: Tokens from this one on are never the most likely one; None for
      the model's.
    mesh: Devices to spread the rows over, with the parameters on it; None for
      where the parameters are.

  Returns:
    The function.

  Raises:
    errors.UserError: If batch_size or max_length is out of range, or the model
      has fewer tokens than vocab_size; the function, if a request holds a token
      that the model does not have.
  """
  limits = requests_lib.limits(model.config, max_length)
  rows = requests_lib.num_rows(batch_size, mesh)
  vocab_size = requests_lib.vocab_size(model.config, vocab_size)
  whole = None if mesh is None else sharding.replicated(mesh)

  @functools.partial(jax.jit, out_shardings=(whole, whole, None))
  def read(params, state, tokens, targets):
    # No mask: padding is on the right, where nothing that counts sees it.
    logits, state = model.forward(params, state, tokens)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    likeliest = jnp.argmax(logits[..., :vocab_size], axis=-1)
    return -loss, likeliest == targets, state

  def read_batch(params, windows):
    streams = [window.tokens for window in windows]
    inputs = requests_lib.pad([s[:-1] for s in streams], rows, limits.piece)
    targets = np.zeros_like(inputs)
    for row, stream in zip(targets, streams, strict=False):
      row[: len(stream) - 1] = stream[1:]
    state, outputs = None, []
    for part in requests_lib.pieces(inputs.shape[1], limits.piece):
      *output, state = read(
        params,
        state,
        requests_lib.put(np.maximum(inputs[:, part], 0), mesh),
        requests_lib.put(targets[:, part], mesh),
      )
      outputs.append(jax.device_get(output))
    return [np.concatenate(x, axis=1) for x in zip(*outputs, strict=True)]

  def score(params, requests, *, description=None):
    for tokens in (x for request in requests for x in request):
      inference.check_tokens(np.asarray(tokens), model.config.vocab_size)
    windows = [
      window
      for i, request in enumerate(requests)
      for window in cut(i, request, limits.stream)
    ]
    _warn_of_cuts(requests, limits.stream)
    # Summed in float64, in which a long text's digits are not lost.
    sums = np.zeros(len(requests))
    greedy = np.ones(len(requests), bool)
    lengths = [len(window.tokens) for window in windows]
    with tqdm.tqdm(
      total=len(windows),
      desc=description,
      disable=description is None or jax.process_index() > 0,
    ) as bar:
      for places in requests_lib.batches(lengths, rows):
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


def cut(
  index: int, request: requests_lib.Request, limit: int | None
) -> list[Window]:
  """The streams that score each token of a continuation once.

  One stream, unless the continuation is longer than a stream may be. Then each
  begins where the one before it ended, with at least one token of context, and
  the last has all the context that it may have.

  Args:
    index: Of the request.
    request: The request.
    limit: Tokens that a stream may have; None for any number.

  Returns:
    The windows; none where the continuation is empty.
  """
  tokens = np.concatenate(request)
  if limit is None:
    limit = len(tokens)
  windows = []
  for start in range(len(request.context), len(tokens), limit):
    end = min(start + limit, len(tokens))
    first = max(end - 1 - limit, 0)
    windows.append(Window(index, tokens[first:end], end - start))
  return windows


def _warn_of_cuts(
  requests: Sequence[requests_lib.Request], limit: int | None
) -> None:
  if limit is None:
    return
  lengths = [sum(map(len, request)) - 1 for request in requests]
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
