r"""Measures how long each level retains a fact.

Two streams begin alike. One reads a fact where the other reads something else;
then both read the same filler. The fact that level l alone has retained after n
tokens of filler is the gain

.. math:: g_l(n) = \ell(\text{fact} \mid \theta_B(n))
    - \ell(\text{fact} \mid \theta_B(n) \text{ with } \theta_A^{(l)}(n))

in nats per token, where A is the stream that read the fact and B the other one.
Both losses are those of a new stream that begins with these weights. The gain
of a level that learned nothing is 0, whatever other levels know. The timescale
of a level is the number of tokens from the peak of its gain to half the peak.
Weights are constant between updates, so a level retains a fact for at least one
period of its clock; in a nested chain, until a slower one restarts it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning.levels import reader as reader_lib


class Readability(NamedTuple):
  """Gains of the levels of streams, over the filler that was read.

  Attributes:
    tokens: int [n + 1], tokens of filler that were read; the first is 0.
    gains: Gain of each level alone by name, nats per token, [n + 1, b].
    together: Gain of all levels together, [n + 1, b].
  """

  tokens: np.ndarray
  gains: Mapping[str, np.ndarray]
  together: np.ndarray


def measure_readability(
  reader: reader_lib.Reader,
  params: Any,
  fact: jax.Array,
  *,
  instead: jax.Array,
  filler: jax.Array,
) -> Readability:
  """Reads a fact, then filler, and measures each level after every segment.

  Args:
    reader: A model whose levels learn.
    params: Its parameters.
    fact: int [b, t], full segments. The loss is that of the first segment, so a
      fact is best one segment, repeated.
    instead: int [b, t], tokens that the other stream reads.
    filler: int [b, n s], full segments.

  Returns:
    A `Readability`.
  """
  size, num_rows = reader.segment_size, fact.shape[0]
  params = reader.prepare(params)
  read = jax.jit(lambda p, s, x: reader.read_segments(p, s, x)[1])

  @jax.jit
  def ask(params, knows, other):
    """Returns the gains of each level, and of all together, by row."""
    fresh = reader.init_state(params, num_rows)
    names = list(other.levels)

    def loss(chosen):
      # The first segment is read before any step.
      mixed = {
        name: (knows if name in chosen else other).levels[name]
        for name in names
      }
      logits, _ = reader.read_piece(
        params,
        fresh._replace(levels=mixed),
        fact[:, :size],
        reset=jnp.zeros((num_rows, size), bool),
        mask=jnp.ones((num_rows, size), bool),
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], fact[:, 1:size]
      )
      return jnp.mean(losses, axis=1)

    without = loss(())
    each = {name: without - loss((name,)) for name in names}
    return each, without - loss(names)

  start = reader.init_state(params, num_rows)
  knows, other = read(params, start, fact), read(params, start, instead)
  found = [ask(params, knows, other)]
  for part in np.split(np.asarray(filler), filler.shape[1] // size, axis=1):
    knows, other = read(params, knows, part), read(params, other, part)
    found.append(ask(params, knows, other))
  stack = lambda *x: np.stack([np.asarray(y) for y in x])
  gains, together = jax.tree.map(stack, *found)
  return Readability(np.arange(len(found)) * size, gains, together)


def effective_timescale(tokens: np.ndarray, gain: np.ndarray) -> np.ndarray:
  """Returns the tokens from the peak of a gain to half the peak, by row.

  Args:
    tokens: int [n], increasing.
    gain: [n, b], gain of a level.

  Returns:
    float [b], interpolated between two measurements. It is inf if more than
    half is left at the end, and 0 if the gain was never positive.
  """
  return np.array([_half_life(tokens, row) for row in np.asarray(gain).T])


def _half_life(tokens, gain):
  peak = int(np.argmax(gain))
  if gain[peak] <= 0:
    return 0.0
  below = np.nonzero(gain[peak:] <= gain[peak] / 2)[0]
  if not below.size:
    return np.inf
  after = peak + below[0]
  high, low = gain[after - 1], gain[after]
  share = (high - gain[peak] / 2) / (high - low)
  passed = tokens[after - 1] + share * (tokens[after] - tokens[after - 1])
  return float(passed - tokens[peak])
