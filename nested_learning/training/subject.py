"""What a model learns: all in which a text and a task differ."""

from collections.abc import Callable, Iterable, Mapping
import pathlib
from typing import Any, NamedTuple, Protocol

import jax

from nested_learning import data as data_lib
from nested_learning import models


class Evaluated(Protocol):
  """What a look at the validation split gives.

  Attributes:
    score: What the best checkpoint has least of.
    numbers: By name, for metrics.
    sentence: The numbers in words.
  """

  score: float
  numbers: Mapping[str, float]
  sentence: str


class Subject(NamedTuple):
  """What a model learns, as functions.

  Attributes:
    model: The model.
    fingerprint: Of what its tokens stand for; a checkpoint of a model of other
      tokens is refused.
    row: From each array of a batch to the shape of a row and its type.
    token_loss: From outputs and targets to the loss [b, t].
    make_batches: `make_batches(split, *, process_index, process_count)`.
    evaluate: `evaluate(params, batches) -> Evaluated`.
    conclude: `conclude(params, workdir, mesh, evaluated)` measures all that
      the summary has of a trained model, and leaves its tables and plots in the
      folder; evaluated is None where `evaluate` did not run on these params.
    sample: `sample(params, mesh)`, something that the model says.
    verdict: From the summary to one sentence on what came out.
    sections: From the summary to sections of the report, in Markdown, about
      what `conclude` left.
    watched: Which of the numbers is plotted over the steps, and its label.
  """

  model: models.Model
  fingerprint: str
  row: Mapping[str, tuple[tuple[int, ...], Any]]
  token_loss: Callable[..., jax.Array]
  make_batches: Callable[..., data_lib.Batches]
  evaluate: Callable[[Any, Iterable[Any]], Evaluated]
  conclude: Callable[[Any, pathlib.Path, Any, Evaluated | None], dict[str, Any]]
  sample: Callable[[Any, Any], str]
  verdict: Callable[[Mapping[str, Any]], str]
  sections: Callable[[Mapping[str, Any]], list[str]]
  watched: tuple[str, str]
