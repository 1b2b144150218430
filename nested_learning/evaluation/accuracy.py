"""Evaluation of tasks: accuracy, errors, and answers in text."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import errors
from nested_learning import inference
from nested_learning import models
from nested_learning import tasks


class Counts(NamedTuple):
  """Sums over rows, float32; v is the number of ids of targets and answers.

  Attributes:
    loss: Loss of the targets that count.
    targets: [v], targets that count, by id.
    answers: [v], most likely answers at these targets, by id.
    right: [v], answers that are the target, by id.
    rows: Rows with a target that counts.
    rows_right: Rows of these where all answers are right.
  """

  loss: Any = 0.0
  targets: Any = 0.0
  answers: Any = 0.0
  right: Any = 0.0
  rows: Any = 0.0
  rows_right: Any = 0.0


@dataclasses.dataclass(frozen=True)
class TaskEvaluation:
  """The evaluation of a model on rows of a task.

  Attributes:
    counts: Sums over all rows, float64 NumPy arrays.
  """

  counts: Counts

  @property
  def loss(self) -> float:
    """Mean loss of the targets that count."""
    return float(self.counts.loss / self.num_targets)

  @property
  def score(self) -> float:
    """Validation score, lower is better; selects the best checkpoint."""
    return self.loss

  @property
  def numbers(self) -> dict[str, float]:
    """The numbers of a report, by name."""
    return {
      'loss': self.loss,
      'accuracy': self.accuracy,
      'macro_accuracy': self.macro_accuracy,
      'all_right': self.all_right,
    }

  @property
  def sentence(self) -> str:
    """The numbers as a sentence."""
    return (
      f'{self.accuracy:.2%} of {self.num_targets:,} answers right, '
      f'{self.all_right:.2%} of {int(self.counts.rows):,} rows all right'
    )

  @property
  def num_targets(self) -> int:
    """Number of targets that count."""
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
    """Mean over ids of the accuracy at the targets with that id, as in MAD.

    An id that is an answer and never a target has accuracy 0.
    """
    targets = self.counts.targets
    present = (targets > 0) | (self.counts.answers > 0)
    return float(
      np.mean(self.counts.right[present] / np.maximum(targets[present], 1))
    )


@dataclasses.dataclass(frozen=True)
class ErrorEvaluation:
  """The evaluation of a model on targets that are real numbers.

  Attributes:
    counts: As for a task with one id.
  """

  counts: Counts

  @property
  def loss(self) -> float:
    """Mean squared error of the targets that count."""
    return float(self.counts.loss / self.counts.targets.sum())

  @property
  def score(self) -> float:
    """Validation score, lower is better; selects the best checkpoint."""
    return self.loss

  @property
  def numbers(self) -> dict[str, float]:
    """The numbers of a report, by name."""
    return {'squared_error': self.loss}

  @property
  def sentence(self) -> str:
    """The numbers as a sentence."""
    return (
      f'a mean squared error of {self.loss:.4f} over '
      f'{int(self.counts.targets.sum()):,} targets'
    )


class Answer(NamedTuple):
  """An answer in text.

  Attributes:
    prompt: Text before it.
    output: The text that the model generated.
    references: Texts that a right answer contains.
    score: Between 0 and 1.
  """

  prompt: str
  output: str
  references: tuple[str, ...]
  score: float


class _Carry(NamedTuple):
  """State between the pieces of a row; arrays of sums are float32 [b]."""

  state: Any
  answered: jax.Array
  wrong: jax.Array


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the loss of each target in nats.

  Args:
    logits: [b, t, v].
    targets: int [b, t].

  Returns:
    float32 [b, t].
  """
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), targets
  )


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the squared error of each target.

  Args:
    outputs: [b, t, 1].
    targets: float [b, t].

  Returns:
    float32 [b, t].
  """
  return jnp.square(outputs[..., 0].astype(jnp.float32) - targets)


def make_count(
  model: models.Model, token_loss: Callable[..., jax.Array] = cross_entropy
) -> Callable[[Any, Iterable[Sequence[Mapping[str, Any]]]], Counts]:
  """Makes `count(params, batches) -> Counts`, compiled once per shape.

  Args:
    model: Reads the tokens of a piece with its `forward`.
    token_loss: Maps outputs and targets to the loss [b, t].

  Returns:
    The function. A batch is a list of pieces of its rows in order: dicts with
    tokens, targets, mask and reset as in training, of equal lengths. The state
    is carried from piece to piece. It raises UserError if the model does not
    have an id.
  """

  @jax.jit
  def read(params, carry, piece):
    outputs, state = model.forward(
      params, carry.state, piece['tokens'], reset=piece['reset']
    )
    num_ids = outputs.shape[-1]
    targets, counts = piece['targets'], piece['mask'].astype(jnp.float32)
    # An id that has no logit would make the loss NaN in silence.
    num_wrong_ids = _num_out_of_range(piece['tokens'], num_ids)
    num_wrong_ids += _num_out_of_range(targets, num_ids, piece['mask'])
    loss = jnp.sum(token_loss(outputs, targets) * counts)
    if jnp.issubdtype(targets.dtype, jnp.floating):
      targets = answers = jnp.zeros(targets.shape, jnp.int32)
    else:
      answers = jnp.argmax(outputs, axis=-1)
    right = (answers == targets) * counts  # [b, t]
    by_id = lambda ids, x: jnp.zeros(num_ids).at[ids].add(x)
    sums = Counts(
      loss,
      targets=by_id(targets, counts),
      answers=by_id(answers, counts),
      right=by_id(targets, right),
    )
    carry = _Carry(
      state,
      carry.answered + jnp.sum(counts, axis=1),
      carry.wrong + jnp.sum(counts - right, axis=1),
    )
    return sums, num_wrong_ids, carry

  @jax.jit
  def count_rows(answered, wrong):
    rows = answered > 0
    return jnp.sum(rows), jnp.sum(rows & (wrong == 0))

  init_state = jax.jit(model.init_state, static_argnums=1)

  def count(params, batches):
    total = Counts()
    for pieces in batches:
      num_rows = len(pieces[0]['tokens'])
      state = init_state(params, num_rows) if len(pieces) > 1 else None
      carry = _Carry(state, jnp.zeros(num_rows), jnp.zeros(num_rows))
      for piece in pieces:
        sums, num_wrong_ids, carry = read(params, carry, piece)
        if num_wrong_ids:
          raise errors.UserError(
            f'{int(num_wrong_ids)} ids of a batch are not among those of the '
            'model; set model.vocab_size to that of the task.'
          )
        total = _add(total, sums)
      rows, rows_right = count_rows(carry.answered, carry.wrong)
      total = _add(total, Counts(rows=rows, rows_right=rows_right))
    return total

  return count


def generate_answers(
  model: models.Model,
  params: Any,
  task: tasks.TextTask,
  rows: Iterable[tasks.Row],
  *,
  batch_size: int,
) -> Iterator[Answer]:
  """Answers prompts of a task with the most likely tokens.

  Args:
    model: Its state holds a row and an answer.
    params: Its parameters.
    task: The task of the rows.
    rows: A row is a prompt up to its first target that counts.
    batch_size: Prompts that are answered together.

  Yields:
    The answers, in the order of the rows.
  """
  tokenizer = task.make_tokenizer()
  generate = inference.make_generate(
    model,
    num_tokens=task.answer_tokens,
    temperature=0.0,
    stop_token=tokenizer.document_id,
    vocab_size=tokenizer.vocab_size,
  )
  rows = list(rows)
  for begin in range(0, len(rows), batch_size):
    some = rows[begin : begin + batch_size]
    padded = some + [some[-1]] * (batch_size - len(some))
    lengths = np.array([1 + int(np.argmax(row.mask)) for row in padded])
    # Padding stands on the left, so that all batches have one shape.
    prompts = np.zeros((batch_size, task.num_tokens), np.int32)
    for prompt, row, length in zip(prompts, padded, lengths, strict=True):
      prompt[-length:] = row.tokens[:length]
    mask = np.arange(task.num_tokens) >= task.num_tokens - lengths[:, None]
    generated = generate(params, prompts, jax.random.key(0), mask)
    tokens, ends = np.asarray(generated.tokens), np.asarray(generated.lengths)
    for i, row in enumerate(some):
      output = tokenizer.decode(tokens[i, : ends[i]])
      yield Answer(
        prompt=tokenizer.decode(row.tokens[1 : lengths[i]]),
        output=output,
        references=row.references,
        score=task.score(output, row),
      )


def _num_out_of_range(ids, num_ids, mask=True):
  """Counts the ids that are not in [0, num_ids); none if they are floats."""
  if jnp.issubdtype(ids.dtype, jnp.floating):
    return jnp.int32(0)
  return jnp.sum(((ids < 0) | (ids >= num_ids)) & mask)


def _add(total, sums):
  """Sums in float64: float32 stops counting at 2^24."""
  return jax.tree.map(
    lambda a, b: a + np.float64(b), total, jax.device_get(sums)
  )
