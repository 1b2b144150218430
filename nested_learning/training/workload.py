"""A workload: a source of batches with a loss, an evaluation and a sample.

The trainer knows a text and a task only as a `Workload`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import itertools
import pathlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import data as data_lib
from nested_learning import models
from nested_learning import sharding

# Shape and dtype of a row of each array of a batch.
RowSpec = Mapping[str, tuple[tuple[int, ...], Any]]

_ARRAYS = ('tokens', 'targets', 'mask', 'reset')  # that a step reads


class EvaluationResult(Protocol):
  """The result of an evaluation on the validation split.

  Attributes:
    score: Lower is better; selects the best checkpoint.
    numbers: Values by name, for metrics.
    sentence: The numbers in words.
  """

  score: float
  numbers: Mapping[str, float]
  sentence: str


class Summary(NamedTuple):
  """The numbers of a trained model, and the files that show more of them.

  Attributes:
    numbers: Values by name, for summary.json.
    write_files: `write_files(workdir)` writes their tables and plots.
  """

  numbers: dict[str, Any]
  write_files: Callable[[pathlib.Path], None] = lambda workdir: None


class Workload(NamedTuple):
  """The text or the task that a model is trained on, as functions.

  Attributes:
    model: The model.
    fingerprint: Identifies the meaning of the tokens; a checkpoint with another
      fingerprint is refused.
    row: Shape and dtype of a row of each array of a batch.
    token_loss: `token_loss(outputs, targets)` is the loss [b, t].
    make_batches: `make_batches(split, *, process_index, process_count)`.
    evaluate: `evaluate(params, batches)` is an `EvaluationResult`.
    summarize: `summarize(params, mesh, evaluated)` returns the `Summary`;
      evaluated is the result of `evaluate` on these params, or None.
    sample: `sample(params, mesh)` is a text that the model writes.
    verdict: `verdict(summary)` is one sentence on the outcome.
    sections: `sections(summary)` are sections of the report, in Markdown.
    watched: Name and label of the number that the report plots over steps.
  """

  model: models.Model
  fingerprint: str
  row: RowSpec
  token_loss: Callable[..., jax.Array]
  make_batches: Callable[..., data_lib.Batches]
  evaluate: Callable[[Any, Iterable[Any]], EvaluationResult]
  summarize: Callable[
    [Any, jax.sharding.Mesh, EvaluationResult | None], Summary
  ]
  sample: Callable[[Any, jax.sharding.Mesh], str]
  verdict: Callable[[Mapping[str, Any]], str]
  sections: Callable[[Mapping[str, Any]], list[str]]
  watched: tuple[str, str]


class StepSpec(NamedTuple):
  """The parts of a workload that are compiled into a step; see `Workload`."""

  model: models.Model
  row: RowSpec
  token_loss: Callable[..., jax.Array]


def make_loss(
  model: models.Model, token_loss: Callable[..., jax.Array]
) -> Callable[..., tuple[jax.Array, Any]]:
  """Makes `loss(params, stream, batch, num_targets) -> (loss, stream)`.

  The loss is the sum over the targets of the batch, divided by `num_targets`.
  Levels that learn inside the row see targets as they go.
  """

  def loss_fn(params, stream, batch, num_targets):
    tokens, targets, reset = (
      batch[name] for name in ('tokens', 'targets', 'reset')
    )
    if model.losses is None:
      outputs, stream = model.forward(params, stream, tokens, reset=reset)
      loss = token_loss(outputs, targets)  # [b, t]
    else:
      loss, stream = model.losses(
        params, stream, tokens, targets, token_loss, reset=reset
      )
    return jnp.sum(loss * batch['mask']) / num_targets, stream

  return loss_fn


def make_batches(
  workload: Workload, split: str, mesh: jax.sharding.Mesh
) -> data_lib.Batches:
  """Makes an iterator over this process's rows of every batch of a split."""
  index, count = sharding.process_slice(mesh)
  return workload.make_batches(split, process_index=index, process_count=count)


def validation_batches(
  workload: Workload, num_batches: int, mesh: jax.sharding.Mesh
) -> Iterator[dict[str, jax.Array]]:
  """Yields the first batches of the validation split, always the same ones."""
  batches = make_batches(workload, 'validation', mesh)
  for batch in itertools.islice(batches, num_batches):
    yield put(batch, mesh)


def put(
  batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Puts a process's rows of a batch on the devices that work on them."""
  rows = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(rows, batch[name])
    for name in _ARRAYS
  }
