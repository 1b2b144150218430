"""What a task is: settings that can make any of its rows.

A task is a frozen dataclass. Its fields are its settings, checked when it is
made; `make_row` turns a random generator into one row, and nothing else into
it, so a row is a pure function of the settings and a seed.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from nested_learning import errors
from nested_learning.data import tokenizers


class Row(NamedTuple):
  """One sequence of a task.

  Attributes:
    tokens: int32 [t], what the model reads; or float32 [t, x].
    targets: int32 [t], what it shall say after reading each of them; or
      float32 [t].
    mask: bool [t], the targets that count.
    references: What an answer in text has to contain; none where the targets
      say all.
    question: The question that the text ends with, if it has one.
  """

  tokens: np.ndarray
  targets: np.ndarray
  mask: np.ndarray
  references: tuple[str, ...] = ()
  question: str = ''


class Task(Protocol):
  """The interface of a task's config.

  Attributes:
    vocab_size: Ids are below it, those of inputs and of targets.
    num_tokens: Length of every row.
  """

  vocab_size: int
  num_tokens: int

  def make_row(
    self, rng: np.random.Generator, *, evaluating: bool = False
  ) -> Row:
    """Makes a row; its mask may differ between training and evaluation."""

  def stretched(self, factor: int) -> 'Task':
    """The same task on rows `factor` times as long."""


@runtime_checkable
class TextTask(Task, Protocol):
  """A task whose rows are text, and whose answers are scored as text.

  Attributes:
    answer_tokens: Most tokens that an answer has.
  """

  answer_tokens: int

  def make_tokenizer(self) -> tokenizers.Tokenizer:
    """What turns text into the tokens of a row."""

  def score(self, output: str, row: Row) -> float:
    """How right an output is, between 0 and 1."""


def check(config: Any, name: str, passed: bool, rule: str) -> None:
  """Refuses a setting.

  Args:
    config: The task.
    name: Of the field.
    passed: Whether its value is fine.
    rule: What it must be, and the way out.

  Raises:
    errors.UserError: If not.
  """
  if not passed:
    value = getattr(config, name)
    raise errors.UserError(
      f'{type(config).__name__}.{name}={value!r} must be {rule}.'
    )


def check_choice(config: Any, name: str, choices: Sequence[str]) -> None:
  """Refuses a setting that is none of some choices."""
  listed = ', '.join(map(repr, choices))
  check(config, name, getattr(config, name) in choices, f'one of {listed}')


def check_at_least(config: Any, least: int, *names: str) -> None:
  """Refuses settings below a number."""
  for name in names:
    check(config, name, getattr(config, name) >= least, f'at least {least}')


def shifted(sequence: np.ndarray, counts: np.ndarray) -> Row:
  """A row whose target at a position is the token that follows it.

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
  """A document of prompt and answer; answer and the mark behind it count.

  Args:
    tokenizer: Its document_id stands before and behind, and is the padding.
    prompt: int [n].
    answer: int [m].
    num_tokens: Of the row; at least n + m + 1.

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
  """The tokenizer of a text task, made once."""
  return tokenizers.make_tokenizer(spec)
