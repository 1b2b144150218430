"""From an experiment to its subject: a text or a task."""

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


def make_model(config: config_lib.ExperimentConfig) -> models.Model:
  """Makes an experiment's model, which needs no text and no tokenizer."""
  if isinstance(config.data, tasks.TaskDataConfig):
    return on_task.make_model(config.model, config.data.task)
  return models.make_model(config.model)
