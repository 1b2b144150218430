"""How many answers of a task are right, and how many rows have no wrong one.

Rows longer than the model reads at a time come in pieces, with the state
carried from piece to piece.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import errors
from nested_learning import models


class Counts(NamedTuple):
  """Sums over rows, float32; v are the ids that targets and answers have.

  Attributes:
    loss: Over the targets that count.
    targets: [v], how many of these there are of each id.
    answers: [v], how often the likeliest answer to one of them is each id.
    right: [v], how many of these answers are the target.
    rows: Rows that have any.
    rows_right: Rows of these where all are right.
  """

  loss: Any
  targets: Any
  answers: Any
  right: Any
  rows: Any
  rows_right: Any


@dataclasses.dataclass(frozen=True)
class TaskEvaluation:
  """What a model makes of the rows of a task.

  Attributes:
    counts: Sums over all of them, float64 NumPy arrays.
  """

  counts: Counts

  @property
  def loss(self) -> float:
    """Mean over the targets that count."""
    return float(self.counts.loss / self.num_targets)

  @property
  def score(self) -> float:
    """What the best checkpoint has least of."""
    return self.loss

  @property
  def numbers(self) -> dict[str, float]:
    """What a report shows."""
    return {
      'loss': self.loss,
      'accuracy': self.accuracy,
      'macro_accuracy': self.macro_accuracy,
      'all_right': self.all_right,
    }

  @property
  def sentence(self) -> str:
    """The numbers in words."""
    return (
      f'{self.accuracy:.2%} of {self.num_targets:,} answers right, '
      f'{self.all_right:.2%} of {int(self.counts.rows):,} rows all right'
    )

  @property
  def num_targets(self) -> int:
    """Targets that count."""
    return int(self.counts.targets.sum())

  @property
  def accuracy(self) -> float:
    """Share of right answers among all that count."""
    return float(self.counts.right.sum() / self.num_targets)

  @property
  def all_right(self) -> float:
    """Share of rows where every answer that counts is right."""
    return float(self.counts.rows_right / self.counts.rows)

  @property
  def macro_accuracy(self) -> float:
    """Mean over ids of the share of its targets that are answered right.

    An id that is answered and never a target has share 0. MAD reports this.
    """
    targets = self.counts.targets
    present = (targets > 0) | (self.counts.answers > 0)
    return float(
      np.mean(self.counts.right[present] / np.maximum(targets[present], 1))
    )


@dataclasses.dataclass(frozen=True)
class ErrorEvaluation:
  """What a model makes of targets that are numbers.

  Attributes:
    counts: As for a task with one id; no answer is called right.
  """

  counts: Counts

  @property
  def loss(self) -> float:
    """Mean squared error over the targets that count."""
    return float(self.counts.loss / self.counts.targets.sum())

  @property
  def score(self) -> float:
    """What the best checkpoint has least of."""
    return self.loss

  @property
  def numbers(self) -> dict[str, float]:
    """What a report shows."""
    return {'squared_error': self.loss}

  @property
  def sentence(self) -> str:
    """The numbers in words."""
    return (
      f'a mean squared error of {self.loss:.4f} over '
      f'{int(self.counts.targets.sum()):,} targets'
    )


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Nats that a target costs, float32 [b, t]; logits [b, t, v], int [b, t]."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), targets
  )


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Squared difference [b, t] of outputs [b, t, 1] and numbers [b, t]."""
  return jnp.square(outputs[..., 0].astype(jnp.float32) - targets)


def make_count(
  model: models.Model, token_loss: Callable[..., jax.Array] = cross_entropy
) -> Callable[[Any, Iterable[Sequence[Mapping[str, Any]]]], Counts]:
  """Makes `count(params, batches) -> Counts`, compiled once per shape.

  Args:
    model: Its `forward` reads the tokens of a piece.
    token_loss: From outputs and targets to the loss [b, t].

  Returns:
    The function. A batch is the list of the pieces of its rows, in order: dicts
    with tokens, targets, mask and reset as in training, of equal lengths. Where
    a row is more than one piece, the state is carried on.
  """

  @jax.jit
  def read(params, carried, piece):
    state, answered, wrong = carried
    outputs, state = model.forward(
      params, state, piece['tokens'], reset=piece['reset']
    )
    targets, counts = piece['targets'], piece['mask'].astype(jnp.float32)
    wrong_ids = _num_out_of_range(piece, outputs.shape[-1])
    loss = jnp.sum(token_loss(outputs, targets) * counts)
    if jnp.issubdtype(targets.dtype, jnp.floating):
      targets = answers = jnp.zeros(targets.shape, jnp.int32)
    else:
      answers = jnp.argmax(outputs, axis=-1)
    right = (answers == targets) * counts
    by_id = lambda ids, x: jnp.zeros(outputs.shape[-1]).at[ids].add(x)
    sums = Counts(
      loss,
      targets=by_id(targets, counts),
      answers=by_id(answers, counts),
      right=by_id(targets, right),
      rows=jnp.float32(0),
      rows_right=jnp.float32(0),
    )
    wrong += jnp.sum(counts - right, axis=1)
    carried = state, answered + jnp.sum(counts, axis=1), wrong
    return sums, wrong_ids, carried

  @jax.jit
  def count_rows(answered, wrong):
    rows = answered > 0
    return jnp.sum(rows), jnp.sum(rows & (wrong == 0))

  init_state = jax.jit(model.init_state, static_argnums=1)

  def count(params, batches):
    total = Counts(*([0.0] * len(Counts._fields)))
    for pieces in batches:
      num_rows = len(pieces[0]['tokens'])
      zeros = jnp.zeros(num_rows)
      state = init_state(params, num_rows) if len(pieces) > 1 else None
      carried = state, zeros, zeros
      for piece in pieces:
        sums, wrong_ids, carried = read(params, carried, piece)
        if wrong_ids:
          raise errors.UserError(
            f'{int(wrong_ids)} targets of a batch are not ids of the model; '
            'set model.vocab_size to that of the task.'
          )
        total = _add(total, sums)
      rows, rows_right = jax.device_get(count_rows(*carried[1:]))
      total = total._replace(
        rows=total.rows + rows, rows_right=total.rows_right + rows_right
      )
    return total

  return count


def _num_out_of_range(piece, num_ids):
  """Counts targets that have no logit, whose loss would be NaN in silence."""
  targets = piece['targets']
  if jnp.issubdtype(targets.dtype, jnp.floating):
    return 0
  return jnp.sum(((targets < 0) | (targets >= num_ids)) & piece['mask'])


def _add(total, sums):
  """Sums in float64: float32 stops counting at 2^24."""
  return jax.tree.map(
    lambda a, b: a + np.float64(b), total, jax.device_get(sums)
  )
