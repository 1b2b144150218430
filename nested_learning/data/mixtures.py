"""Several sources as one: '0.7*web/*.parquet + 0.3*code'.

A weight is a source's share of the tokens. The documents of all sources are
laid in one order in which the shares hold from the first token on, as closely
as whole documents allow, so that a mixture is one stream like any other.
"""

import re

import numpy as np

from nested_learning import errors

_TERM = re.compile(r'(\d+\.?\d*|\.\d+)\*(.+)')
# How often a pass may repeat a source; more is a slip in the weights.
_MOST_REPEATS = 1000


def parse(source: str) -> dict[str, float] | None:
  """The sources of a mixture and their weights, which add up to 1.

  Args:
    source: The config's `data.source`.

  Returns:
    From source to weight; None where the text is one source.

  Raises:
    errors.UserError: It is a mixture in part, or a weight is 0.
  """
  terms = re.split(r'\s+\+\s+', source.strip())
  matches = [_TERM.fullmatch(term) for term in terms]
  if len(terms) < 2 or not any(matches):
    return None
  weights: dict[str, float] = {}
  for term, match in zip(terms, matches, strict=True):
    weight = float(match[1]) if match else 0.0
    if not weight or match[2] in weights:
      raise errors.UserError(
        f'data.source={source!r}: {term!r} is not WEIGHT*SOURCE with a weight '
        "above 0 and a source of its own, as in '0.7*web.jsonl + 0.3*code'."
      )
    weights[match[2]] = weight
  total = sum(weights.values())
  return {name: weight / total for name, weight in weights.items()}


def make_order(
  lengths: list[np.ndarray], weights: list[float], *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """An order of the documents of several sources in which their shares hold.

  One pass reads the source once that lasts longest by its weight, and the
  others as often as it takes; every time around they are shuffled anew.

  Args:
    lengths: Tokens of each document, int [documents] for every source.
    weights: Share of the tokens of each source; they add up to 1.
    seed: Of the order.

  Returns:
    The source of each place, and which of its documents it is, both int [n].

  Raises:
    errors.UserError: A source would be repeated more than a thousand times.
  """
  totals = [int(own.sum()) for own in lengths]
  num_tokens = max(t / w for t, w in zip(totals, weights, strict=True))
  picked, keys = [], []
  for i, (own, total) in enumerate(zip(lengths, totals, strict=True)):
    repeats = int(np.ceil(num_tokens * weights[i] / total))
    if repeats > _MOST_REPEATS:
      raise errors.UserError(
        f'data.source: with a weight of {weights[i]:.3g} the {total} tokens of '
        f'source {i + 1} would be repeated {repeats} times in a pass over the '
        'others; lower its weight.'
      )
    rng = np.random.default_rng([seed, i])
    order = np.concatenate([rng.permutation(len(own)) for _ in range(repeats)])
    begins = np.cumsum(own[order]) - own[order]
    keep = begins < num_tokens * weights[i]
    picked.append(order[keep])
    keys.append(begins[keep] / weights[i])
  # Next is always the document of the source that is most behind its share.
  merged = np.argsort(np.concatenate(keys), kind='stable')
  which = np.repeat(np.arange(len(picked)), [len(own) for own in picked])
  return which[merged], np.concatenate(picked)[merged]
