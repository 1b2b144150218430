r"""How long a level keeps what it was told: measured, not read off its clock.

Two streams begin alike; one reads a fact where the other reads something else,
then both read the same filler. What level l alone has kept of the fact after n
tokens of filler is what it does for the loss of the fact,

.. math:: g_l(n) = \ell(\text{fact} \mid \theta_B(n))
    - \ell(\text{fact} \mid \theta_B(n) \text{ with } \theta_A^{(l)}(n)),

in nats per token, with A the stream that read it and B the one that did not;
both losses are of a fresh stream that begins with these weights. A level that
learned nothing has 0, whatever the others know. Its timescale is the number of
tokens after its peak until half of the peak is left. So a level whose weights
stand still between its updates keeps a fact for one of its chunks at least, and
one that a nested chain begins anew for no longer than the chunk of the next
slower one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning.levels import reader as reader_lib


class Readability(NamedTuple):
  """What levels keep of a fact.

  Attributes:
    tokens: int [n + 1], tokens of filler that were read; the first is 0.
    gains: From name of level to nats per token of the fact, [n + 1, b].
    together: The same for all levels of the stream that read the fact.
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
  """Plants a fact, reads on, and asks each level for it after every segment.

  Args:
    reader: A model whose levels learn.
    params: Its parameters.
    fact: int [b, t], of whole segments; the first segment is what is asked for,
      so a fact is best one segment, and repeated.
    instead: int [b, t], what the other stream reads.
    filler: int [b, n s], of whole segments.

  Returns:
    A `Readability`.
  """
  size, num_rows = reader.segment_size, fact.shape[0]
  params = reader.prepare(params)
  read = jax.jit(lambda p, s, x: reader.read_segments(p, s, x)[1])

  @jax.jit
  def ask(params, knows, other):
    """Losses of the fact by row: for each level, for all, for none."""
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
  """Tokens from the peak of a gain until half of it is left, by row.

  Args:
    tokens: int [n], rising.
    gain: [n, b], of a level.

  Returns:
    float [b]: interpolated between two measurements; inf where more than half
    is left at the end, and 0 where the gain was never positive.
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
