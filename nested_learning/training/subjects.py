"""From an experiment to its subject: a text or a task."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from nested_learning import models
from nested_learning import tasks
from nested_learning.training import config as config_lib
from nested_learning.training import on_task
from nested_learning.training import on_text
from nested_learning.training import subject as subject_lib


def make_subject(config: config_lib.ExperimentConfig) -> subject_lib.Subject:
  """Makes what an experiment's model learns.

  Args:
    config: The experiment.

  Returns:
    A `Subject`.

  Raises:
    errors.UserError: The tokenizer or the task's ids do not fit the model, the
      tokenizer cannot be read, or the prompt is too long.
  """
  if isinstance(config.data, tasks.TaskDataConfig):
    return on_task.make_subject(config)
  return on_text.make_subject(config)


class Computed(NamedTuple):
  """What of a subject is compiled: fields of `Subject`, without a text."""

  model: models.Model
  row: Mapping[str, tuple[tuple[int, ...], Any]]
  token_loss: Callable[..., jax.Array]


def make_computed(config: config_lib.ExperimentConfig) -> Computed:
  """What a step computes, which needs no text and no tokenizer."""
  if isinstance(config.data, tasks.TaskDataConfig):
    subject = on_task.make_subject(config)
    return Computed(subject.model, subject.row, subject.token_loss)
  return Computed(
    models.make_model(config.model, config.inner),
    on_text.make_row(config),
    on_text.token_loss,
  )
