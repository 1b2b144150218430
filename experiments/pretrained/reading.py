"""Reads a stream with controls; asks for facts and other text after it."""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import calibration
from experiments.pretrained import ngrams
from experiments.pretrained import texts
from nested_learning import levels
from nested_learning import models

_NUM_BINS = 8  # of positions
_NUM_OTHERS = 3  # codes of other facts that each code is compared with
# What the calibration learns, and its rates, which are all mixed.
_CALIBRATIONS = (('scale', 0.1), ('bias', 10.0), ('bias', 100.0))
_token_loss = optax.softmax_cross_entropy_with_integer_labels


class Learned(NamedTuple):
  """A model after a stream.

  Attributes:
    model: The model.
    params: Its parameters, prepared.
    state: The state of the stream.
  """

  model: models.Model
  params: Any
  state: Any


def read(
  model: models.Model,
  params: Any,
  stream: texts.Stream,
  *,
  piece: int,
  size: int,
) -> tuple[dict[str, np.ndarray], Learned]:
  """Reads a stream.

  Args:
    model: From `models.make_model`, perhaps with levels that learn.
    params: Its parameters.
    stream: The text; its transitions are whole pieces.
    piece: Tokens of a call, whole segments of the levels.
    size: Tokens between two steps of the calibration.

  Returns:
    Losses of each token but the first in nats [t]: 'plain'; 'calibrated', a
    mixture with calibrations; 'cache', with a cache of n-grams; 'both'.
  """
  level = levels.InnerLevelConfig(size, learning_rate=1.0)
  made = [
    calibration.make(level, model.config.vocab_size, learns=(name,))
    for name, _ in _CALIBRATIONS
  ]
  reader, forward = model.reader, model.forward
  if reader is not None:
    params = jax.jit(reader.prepare)(params)
    forward = reader.read_segments

  @functools.partial(jax.jit, donate_argnums=(1, 2))
  def call(params, state, learned, tokens, targets):
    logits, state = forward(params, state, tokens)
    found, after = [_token_loss(logits, targets)[0]], []
    for own, (_, rate), carry in zip(made, _CALIBRATIONS, learned, strict=True):
      calibrated, carry = own.read(rate, carry, logits, targets)
      found.append(_token_loss(calibrated, targets)[0])
      after.append(carry)
    return jnp.stack(found), state, after

  state = jax.jit(lambda params: model.init_state(params, 1))(params)
  learned, losses = [own.start(1) for own in made], []
  for begin in range(0, len(stream.tokens) - 1, piece):
    part = stream.tokens[None, begin : begin + piece + 1]
    found, state, learned = call(
      params, state, learned, part[:, :-1], part[:, 1:]
    )
    losses.append(np.asarray(found))
  plain, *calibrated = np.concatenate(losses, axis=1)
  mixed = ngrams.mix([plain, *calibrated])
  found = {
    'plain': plain,
    'calibrated': mixed,
    'cache': ngrams.with_cache(stream.tokens, plain),
    'both': ngrams.with_cache(stream.tokens, mixed),
  }
  return found, Learned(model, params, state)


def summarize(
  losses: Mapping[str, np.ndarray],
  stream: texts.Stream,
  byte_lengths: np.ndarray,
) -> dict[str, Any]:
  """Returns bits and bytes by position, without the tokens of facts."""
  edges = np.linspace(0, len(stream.tokens) - 1, _NUM_BINS + 1).astype(int)
  counts = stream.counts[1:]
  sums = lambda x: np.add.reduceat(np.where(counts, x, 0), edges[:-1])
  bits = {name: sums(x) / math.log(2) for name, x in losses.items()}
  num_bytes = sums(byte_lengths[stream.tokens[1:]])
  return {
    'edges': edges,
    'bytes': num_bytes,
    'bits': bits,
    **{
      f'{name}_bits_per_byte': x.sum() / num_bytes.sum()
      for name, x in bits.items()
    },
  }


def ask(learned: Learned, stream: texts.Stream) -> dict[str, Any]:
  """Asks for the facts after the stream, with its state; nothing is kept.

  Returns:
    By fact: its log-odds in nats over the codes of other facts, their mean; the
    number of its tellings; and the tokens since the last one.
  """
  facts = stream.facts
  longest = max(len(fact.question) + len(fact.code) for fact in facts)
  score = _make_score(learned.model, longest)
  margins = []
  for i, fact in enumerate(facts):
    others = [facts[(i + j) % len(facts)] for j in range(1, 1 + _NUM_OTHERS)]
    true, *false = (
      -float(score(learned.params, learned.state, fact.question, x.code))
      for x in (fact, *others)
    )
    margins.append(true - float(np.mean(false)))
  end = len(stream.tokens) - 1
  return {
    'margins': margins,
    'tellings': [fact.tellings for fact in facts],
    'distances': [end - fact.position for fact in facts],
  }


def read_other(
  learned: Learned, tokens: Sequence[int], byte_lengths: np.ndarray
) -> float:
  """Returns bits per byte of another text, which begins a new stream.

  Levels stay as they are after the stream, and rest; memories begin anew.

  Args:
    learned: The model after the stream.
    tokens: int [t + 1].
    byte_lengths: int [v], bytes of each token.
  """
  model = learned.model

  @jax.jit
  def compute(params, state, tokens):
    if model.reader is None:
      state = model.init_state(params, 1)
    else:
      state = model.reader.restart(params, state, jnp.ones(1, bool))
    logits, _ = model.decode(params, state, tokens[:, :-1])
    return jnp.sum(_token_loss(logits, tokens[:, 1:]))

  tokens = np.asarray(tokens)
  nats = compute(learned.params, learned.state, tokens[None])
  return float(nats) / math.log(2) / int(byte_lengths[tokens[1:]].sum())


def _make_score(model: models.Model, longest: int):
  """Makes `score(params, state, question, code)`: the loss of a code."""

  @jax.jit
  def compute(params, state, tokens, length, start):
    place = jnp.arange(longest)
    mask = (place < length)[None]
    logits, _ = model.decode(params, state, tokens, mask=mask)
    losses = _token_loss(logits[:, :-1], tokens[:, 1:])[0]
    counts = (place[1:] >= start) & (place[1:] < length)
    return jnp.sum(jnp.where(counts, losses, 0))

  def score(params, state, question, code):
    text = np.concatenate([question, code])
    tokens = np.zeros((1, longest), np.int32)
    tokens[0, : len(text)] = text
    return compute(params, state, tokens, len(text), len(question))

  return score
