"""What a model writes after the prompts of a task in text, and its score."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import inference
from nested_learning import models
from nested_learning import tasks


class Answer(NamedTuple):
  """One answer.

  Attributes:
    prompt: Text before it.
    output: What the model wrote.
    references: What it has to contain.
    score: Between 0 and 1.
  """

  prompt: str
  output: str
  references: tuple[str, ...]
  score: float


def write_answers(
  model: models.Model,
  params: Any,
  task: tasks.TextTask,
  rows: Iterable[tasks.Row],
  *,
  batch_size: int,
) -> Iterator[Answer]:
  """Answers prompts with the likeliest tokens.

  Args:
    model: It has room for a row and an answer.
    params: Its parameters.
    task: Whose rows these are.
    rows: Each is a prompt up to its first target that counts.
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
    prompts = np.zeros((batch_size, task.num_tokens), np.int32)
    for prompt, row, length in zip(prompts, padded, lengths, strict=True):
      prompt[-length:] = row.tokens[:length]
    mask = np.arange(task.num_tokens) >= task.num_tokens - lengths[:, None]
    generated = generate(
      params, jnp.asarray(prompts), jax.random.key(0), jnp.asarray(mask)
    )
    tokens, ends = np.asarray(generated.tokens), np.asarray(generated.lengths)
    for i, row in enumerate(some):
      output = tokenizer.decode(tokens[i, : ends[i]])
      yield Answer(
        prompt=tokenizer.decode(row.tokens[1 : lengths[i]]),
        output=output,
        references=row.references,
        score=task.score(output, row),
      )
