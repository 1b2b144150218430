"""Bits per byte, and the loss by position in the context.

How well a model predicts token t of a document, as a function of t, shows what
its memory does: a model that learns while it reads predicts late tokens better
than early ones, and better than the same model with memory writes off.
"""

from collections.abc import Callable, Iterable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import errors
from nested_learning import models


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How much of the validation split is read."""

  num_batches: int = 8  # batches of data.batch_size rows, always the same ones

  def __post_init__(self):
    errors.check_field(self, 'num_batches', self.num_batches >= 1, 'at least 1')


class Totals(NamedTuple):
  """Sums over tokens by position in the context, each float32 [t]."""

  loss: Any  # nats
  num_tokens: Any
  num_bytes: Any


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The loss of a model on a text.

  Attributes:
    totals: Sums by position, float64 NumPy arrays [t]. Position 0 is the first
      token of a document, or of a row that starts inside one.
  """

  totals: Totals

  @property
  def loss(self) -> float:
    """Mean loss in nats per token."""
    return float(self.totals.loss.sum() / self.totals.num_tokens.sum())

  @property
  def score(self) -> float:
    """What the best checkpoint has least of."""
    return self.bits_per_byte

  @property
  def numbers(self) -> dict[str, float]:
    """What a report shows."""
    return {'loss': self.loss, 'bits_per_byte': self.bits_per_byte}

  @property
  def sentence(self) -> str:
    """The numbers in words."""
    return (
      f'{self.bits_per_byte:.4f} bits per byte on {self.num_tokens:,} tokens '
      'of validation text'
    )

  @property
  def bits_per_byte(self) -> float:
    """Total loss in bits over the bytes of text that the targets stand for."""
    bits = self.totals.loss.sum() / math.log(2)
    return float(bits / self.totals.num_bytes.sum())

  @property
  def num_tokens(self) -> int:
    """Targets that were predicted."""
    return int(self.totals.num_tokens.sum())

  @property
  def loss_by_position(self) -> np.ndarray:
    """Mean loss in nats per token at each position [t]; NaN where no token."""
    with np.errstate(invalid='ignore'):
      return self.totals.loss / self.totals.num_tokens


def make_evaluate(
  model: models.Model,
  byte_lengths: np.ndarray,
  *,
  write: bool = True,
  carry: bool = False,
) -> Callable[[Any, Iterable[Any]], Evaluation]:
  """Makes `evaluate(params, batches) -> Evaluation`, compiled once.

  With `write` False memories stay as they were learned, and nothing that a row
  says changes them.

  Args:
    model: From `models.make_model`.
    byte_lengths: int [v], bytes of text that each token stands for.
    write: Whether memories write.
    carry: Whether row r of a batch continues row r of the batch before, as with
      data.reset='never'; otherwise every row starts a stream.

  Returns:
    The function. Batches are dicts with tokens and targets int [b, t], mask
    [b, t] (targets that count) and reset bool [b, t]; it raises UserError if
    no target counts, or the model does not have a token.
  """
  byte_lengths = jnp.asarray(byte_lengths, jnp.float32)
  token_loss = optax.softmax_cross_entropy_with_integer_labels

  @jax.jit
  def batch_totals(params, state, batch):
    tokens, targets, reset = batch['tokens'], batch['targets'], batch['reset']
    counts = batch['mask'].astype(jnp.float32)
    if write and model.losses is not None:  # whole segments, read only once
      loss, state = model.losses(
        params, state, tokens, targets, token_loss, reset=reset
      )
    else:
      logits, state = model.forward(
        params, state, tokens, reset=reset, write=write
      )
      loss = token_loss(logits, targets)
    position = context_position(batch['reset'])

    def by_position(x):
      return jnp.zeros(x.shape[1], jnp.float32).at[position].add(x * counts)

    totals = Totals(
      by_position(loss),
      by_position(jnp.ones_like(loss)),
      by_position(byte_lengths[targets]),
    )
    # Tokens that the model does not have would make its loss NaN in silence.
    wrong = _out_of_range(batch['tokens'], len(byte_lengths))
    wrong |= _out_of_range(targets, len(byte_lengths)) & batch['mask']
    return totals, jnp.sum(wrong), state if carry else None

  def evaluate(params, batches):
    # Summed in float64: float32 stops counting at 2^24 tokens.
    totals, state = Totals(0.0, 0.0, 0.0), None
    for batch in batches:
      sums, wrong, state = batch_totals(params, state, batch)
      if wrong:
        raise errors.UserError(
          f'{int(wrong)} tokens of a batch are not among the '
          f'{len(byte_lengths)} of the model; use the tokenizer that the model '
          'was trained with.'
        )
      totals = jax.tree.map(
        lambda a, b: a + np.float64(b), totals, jax.device_get(sums)
      )
    if not np.sum(totals.num_bytes):
      raise errors.UserError(
        'no target with text in the batches to evaluate; the validation split '
        'is empty or too small: give more text or raise '
        'data.validation_fraction.'
      )
    return Evaluation(totals)

  return evaluate


def _out_of_range(tokens, vocab_size):
  return (tokens < 0) | (tokens >= vocab_size)


def context_position(reset: jax.Array) -> jax.Array:
  """Tokens since the last reset, or since the start of the row.

  Args:
    reset: bool [b, t], True at the first token of a document.

  Returns:
    int32 [b, t].
  """
  index = jnp.arange(reset.shape[1], dtype=jnp.int32)
  starts = jnp.where(reset, index, 0)
  return index - jax.lax.cummax(starts, axis=1)
