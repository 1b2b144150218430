r"""Mixes the predictions of a nested chain's members, token by token.

A nested chain of K levels is K models. Member k reads with its k fastest levels
at their start and the others as they are, so that its weights change on the
clock of level k and no faster; member 0 is the whole chain. The prediction is

.. math:: p(x_t) = \sum_k w_{t,k} p_k(x_t), \quad
    w_{t+1,k} = (1 - \alpha) \frac{w_{t,k} p_k(x_t)}{p(x_t)} + \alpha / K,

where alpha is `SWITCH`. This is the fixed share of Herbster and Warmuth: for
every choice of one member per token with n tokens and m changes of member, the
sum of the losses exceeds that of the choice by at most

.. math:: \log K + m \log(K / \alpha) + (n - m - 1) \log\frac{1}{1 - \alpha},

so that levels add up: the chain predicts about as well as its best member at
any time, and an old text is read by a slow level although the faster ones have
turned to another one.

References:
  Herbster and Warmuth, Tracking the best expert, Machine Learning 32, 1998.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Probability, per token, that another member is the best one from here on. The
# value is one change in a short paragraph.
SWITCH = 1 / 64


class Mixture(NamedTuple):
  """State of the mixture; all leaves begin with the rows [b].

  Attributes:
    weights: Of the members for the next token, in logarithms, [b, k]; float32
      or wider, as below.
    predictions: Of the next token by each member, in logarithms, [b, k, v].
  """

  weights: jax.Array
  predictions: jax.Array


def init(
  num_rows: int, num_members: int, vocab_size: int, dtype: Any = jnp.float32
) -> Mixture:
  """Returns equal weights, and no prediction of the first token."""
  zeros = lambda *shape: jnp.zeros((num_rows, num_members, *shape), dtype)
  return Mixture(zeros() - jnp.log(num_members), zeros(vocab_size))


def mix(
  state: Mixture,
  logits: Sequence[jax.Array],
  tokens: jax.Array,
  *,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, Mixture]:
  """Mixes what the members predict.

  Args:
    state: The mixture before the tokens.
    logits: Logits [b, t, v] of each member.
    tokens: int [b, t], which they were read from.
    reset: bool [b, t] or None: the first token of a document, which the one
      before it does not predict.
    mask: bool [b, t] or None: False for padding, which says nothing.

  Returns:
    Logarithms of the mixed probabilities of the next token [b, t, v], and the
    mixture after the tokens.
  """
  dtype = state.weights.dtype  # losses of many tokens are summed
  said = [jax.nn.log_softmax(x.astype(dtype)) for x in logits]
  said = jnp.stack(said, axis=1)
  said = jnp.concatenate([state.predictions[:, :, None], said], axis=2)
  num_tokens, num_members = (
    tokens.shape[1],
    said.shape[1],
  )  # said [b, k, 1+t, v]
  place = jnp.arange(1, num_tokens + 1)
  if mask is not None:
    place = jax.lax.cummax(jnp.where(mask, place, 0), axis=1)
  last = jnp.broadcast_to(place, tokens.shape)  # [b, t], of the last token
  before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
  rows = jnp.arange(len(tokens))[:, None]
  evidence = said[rows, :, before, tokens]  # [b, t, k]
  counts = jnp.ones(tokens.shape, bool) if mask is None else mask
  ignored = ~counts if reset is None else ~counts | reset

  def body(weights, inputs):
    """Updates the weights [b, k] by one token."""
    evidence, ignored, counts = inputs
    after = weights + jnp.where(ignored[:, None], 0.0, evidence)
    after = jax.nn.log_softmax(after)
    stays, comes = jnp.log1p(-SWITCH), jnp.log(SWITCH / num_members)
    after = jnp.logaddexp(after + stays, comes)
    after = jnp.where(counts[:, None], after, weights).astype(weights.dtype)
    return after, after

  inputs = jax.tree.map(
    lambda x: jnp.swapaxes(x, 0, 1), (evidence, ignored, counts)
  )
  weights, each = jax.lax.scan(body, state.weights, inputs)
  each = jnp.moveaxis(each, 0, 2)  # [b, k, t]
  mixed = jax.nn.logsumexp(each[..., None] + said[:, :, 1:], axis=1)
  predictions = said[rows[:, 0], :, last[:, -1]]
  return mixed, Mixture(weights, predictions)
