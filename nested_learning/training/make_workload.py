"""Makes the workload of an experiment: a text or a task."""

from nested_learning import models
from nested_learning import tasks
from nested_learning.training import config as config_lib
from nested_learning.training import task_workload
from nested_learning.training import text_workload
from nested_learning.training import workload as workload_lib


def make_workload(
  config: config_lib.ExperimentConfig,
) -> workload_lib.Workload:
  """Makes the workload of an experiment.

  Args:
    config: The experiment.

  Returns:
    A `Workload`.

  Raises:
    errors.UserError: The tokenizer or the task's ids do not fit the model, the
      tokenizer cannot be read, or the prompt is too long.
  """
  if isinstance(config.data, tasks.TaskDataConfig):
    return task_workload.make_workload(config)
  return text_workload.make_workload(config)


def make_step_spec(
  config: config_lib.ExperimentConfig,
) -> workload_lib.StepSpec:
  """Makes the parts that a step needs, without text or tokenizer."""
  if isinstance(config.data, tasks.TaskDataConfig):
    made = task_workload.make_workload(config)
    return workload_lib.StepSpec(made.model, made.row, made.token_loss)
  return workload_lib.StepSpec(
    models.make_model(config.model, config.inner),
    text_workload.make_row(config),
    text_workload.token_loss,
  )
