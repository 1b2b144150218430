"""The interface of a task, and functions that tasks share.

A task is a frozen dataclass. Its fields are its settings, checked when it is
made; `make_row` draws one row with a random generator, so a row is a pure
function of the settings and a seed.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from nested_learning import errors
from nested_learning.data import tokenizers


class Row(NamedTuple):
  """One sequence of a task.

  Attributes:
    tokens: int32 [t], the inputs of the model; or float32 [t, x].
    targets: int32 [t], the right output after each of them; or float32 [t].
    mask: bool [t], the targets that count.
    references: Texts that a right answer contains; empty if the targets are
      all there is to score.
    question: The question at the end of the text, if there is one.
  """

  tokens: np.ndarray
  targets: np.ndarray
  mask: np.ndarray
  references: tuple[str, ...] = ()
  question: str = ''


class Task(Protocol):
  """The interface of a task's config.

  Attributes:
    vocab_size: Every id of inputs and targets is below it.
    num_tokens: Length of every row.
  """

  vocab_size: int
  num_tokens: int

  def make_row(
    self, rng: np.random.Generator, *, evaluating: bool = False
  ) -> Row:
    """Makes a row; its mask may differ between training and evaluation."""

  def stretched(self, factor: int) -> 'Task':
    """Returns the same task on rows `factor` times as long."""


@runtime_checkable
class TextTask(Task, Protocol):
  """A task whose rows are text, and whose answers are scored as text.

  Attributes:
    answer_tokens: Length of the longest answer, in tokens.
  """

  answer_tokens: int

  def make_tokenizer(self) -> tokenizers.Tokenizer:
    """Returns the tokenizer of the rows."""

  def score(self, output: str, row: Row) -> float:
    """Returns how right an output is, between 0 and 1."""


def check_at_least(config: Any, least: int, *names: str) -> None:
  """Raises `errors.UserError` if a field of a config is below a number."""
  for name in names:
    errors.check_field(
      config, name, getattr(config, name) >= least, f'at least {least}'
    )


def shifted(sequence: np.ndarray, counts: np.ndarray) -> Row:
  """Makes a row whose target at a position is the token that follows it.

  Args:
    sequence: int [t + 1].
    counts: bool [t + 1], the tokens whose prediction counts.

  Returns:
    A row of t tokens.
  """
  sequence = sequence.astype(np.int32)
  return Row(sequence[:-1], sequence[1:], counts[1:])


def text_row(
  tokenizer: tokenizers.Tokenizer,
  prompt: np.ndarray,
  answer: np.ndarray,
  num_tokens: int,
) -> Row:
  """Makes a document of a prompt and its answer, padded on the right.

  The targets that count are the answer and the mark after it.

  Args:
    tokenizer: Its document_id stands before and after, and is the padding.
    prompt: int [n].
    answer: int [m].
    num_tokens: Length of the row; at least n + m + 1.

  Returns:
    A row.
  """
  mark = tokenizer.document_id
  sequence = np.full(num_tokens + 1, mark, np.int32)
  begin, end = 1 + len(prompt), 1 + len(prompt) + len(answer)
  sequence[1:begin], sequence[begin:end] = prompt, answer
  number = np.arange(num_tokens + 1)
  return shifted(sequence, (begin <= number) & (number <= end))


@functools.cache
def make_tokenizer(spec: str) -> tokenizers.Tokenizer:
  """Returns `tokenizers.make_tokenizer(spec)`, made once."""
  return tokenizers.make_tokenizer(spec)
