r"""Controls of a stream that need losses alone: a cache of n-grams, mixtures.

A cache counts which token followed each context of the stream so far. Its
probability smooths that of the model, from short contexts to long ones,

.. math:: p_n(x) = \frac{c(context_n, x) + \beta \, p_{n-1}(x)}
    {c(context_n) + \beta}.

Orders and :math:`\beta` are not chosen in hindsight: all are mixed, with
weights that follow their losses so far (fixed share; see
`nested_learning.levels.mixture`).
"""

import collections
from collections.abc import Sequence

import numpy as np

_SWITCH = 1 / 256  # probability, per token, that another expert is best
_BETAS = (0.5, 2.0, 8.0)
_ORDERS = ((1, 2, 3, 4), (2, 3, 4, 6))  # tokens of the contexts, short first


def mix(losses: Sequence[np.ndarray]) -> np.ndarray:
  """Mixes the predictions of experts, with weights that follow their losses.

  Args:
    losses: Of each expert, in nats [t].

  Returns:
    The losses of the mixture [t].
  """
  losses = np.stack(losses).astype(np.float64)
  num_experts = len(losses)
  weights = np.full(num_experts, -np.log(num_experts))
  mixed = np.zeros(losses.shape[1])
  for t, found in enumerate(losses.T):
    joint = weights - found
    mixed[t] = -np.logaddexp.reduce(joint)
    weights = np.logaddexp(
      joint + mixed[t] + np.log1p(-_SWITCH), np.log(_SWITCH / num_experts)
    )
  return mixed


def with_cache(tokens: np.ndarray, losses: np.ndarray) -> np.ndarray:
  """Returns the losses of a model with a cache of the stream's n-grams.

  Args:
    tokens: int [t + 1], the stream.
    losses: Losses of the model in nats [t], of each token but the first.

  Returns:
    Losses in nats [t].
  """
  orders = sorted({order for group in _ORDERS for order in group})
  counts = {order: _count(tokens, order) for order in orders}
  experts = [losses]
  for group in _ORDERS:
    for beta in _BETAS:
      p = np.exp(-losses.astype(np.float64))
      for order in group:
        hits, total = counts[order]
        p = (hits + beta * p) / (total + beta)
      experts.append(-np.log(p))
  return mix(experts)


def _count(tokens, order) -> tuple[np.ndarray, np.ndarray]:
  """Counts contexts and their continuations before each token.

  Args:
    tokens: int [t + 1].
    order: Tokens of a context.

  Returns:
    For each token but the first, how often it had followed its context, and
    how often the context had been followed by any; [t].
  """
  pairs, contexts = collections.Counter(), collections.Counter()
  hits, total = np.zeros((2, len(tokens) - 1))
  tokens = tokens.tolist()
  for i in range(order, len(tokens)):
    context = tuple(tokens[i - order : i])
    hits[i - 1], total[i - 1] = pairs[context, tokens[i]], contexts[context]
    pairs[context, tokens[i]] += 1
    contexts[context] += 1
  return hits, total
