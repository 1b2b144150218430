"""The workload of a task: right answers, also on rows longer than trained."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import evaluation
from nested_learning import markdown
from nested_learning import models
from nested_learning import sharding
from nested_learning import tasks
from nested_learning.training import config as config_lib
from nested_learning.training import workload as workload_lib


class _Kind(NamedTuple):
  """The parts that depend on the kind of targets.

  Attributes:
    token_loss: `token_loss(outputs, targets)` is the loss [b, t].
    evaluated: Makes an `EvaluationResult` of `evaluation.Counts`.
    watched: See `Workload`.
  """

  token_loss: Callable[..., jax.Array]
  evaluated: Callable[[Any], workload_lib.EvaluationResult]
  watched: tuple[str, str]


_IDS = _Kind(
  evaluation.cross_entropy,
  evaluation.TaskEvaluation,
  ('accuracy', 'share of right answers'),
)
_NUMBERS = _Kind(
  evaluation.squared_error,
  evaluation.ErrorEvaluation,
  ('squared_error', 'mean squared error'),
)


def make_workload(
  config: config_lib.ExperimentConfig,
) -> workload_lib.Workload:
  """Makes the workload of an experiment on a task; see `make_workload.py`."""
  task = config.data.task
  name = type(task).__name__
  if task.vocab_size > config.model.vocab_size:
    raise errors.UserError(
      f'data.task={name} has {task.vocab_size} ids, more than '
      f'model.vocab_size={config.model.vocab_size}; set model.vocab_size to at '
      f'least {task.vocab_size}.'
    )
  model = models.make_model(config.model, config.inner, head=config.head)
  kind = _kind(task)
  count = evaluation.make_count(model, kind.token_loss)
  row = tasks.make_row(config.data, 0)
  mask = row.mask.shape, np.bool_
  return workload_lib.Workload(
    model=model,
    fingerprint=f'{name} {task.vocab_size}',
    row={
      'tokens': (row.tokens.shape, row.tokens.dtype),
      'targets': (row.targets.shape, row.targets.dtype),
      'mask': mask,
      'reset': mask,
    },
    token_loss=kind.token_loss,
    make_batches=functools.partial(_make_batches, config.data),
    evaluate=lambda params, batches: kind.evaluated(
      count(params, ([batch] for batch in batches))
    ),
    summarize=functools.partial(_summarize, config),
    sample=functools.partial(_sample, config),
    verdict=functools.partial(_verdict, config),
    sections=lambda summary: ['## By length\n\n' + _table(config, summary)],
    watched=kind.watched,
  )


def _kind(task: tasks.TaskConfig) -> _Kind:
  return _NUMBERS if isinstance(task, tasks.RegressionConfig) else _IDS


def _make_batches(data, split, *, process_index, process_count):
  return tasks.make_iterator(
    data, split=split, process_index=process_index, process_count=process_count
  )


def _summarize(config, params, mesh, evaluated):
  """Evaluates at every length; tasks in text also by written answers."""
  numbers = {}
  with jax.set_mesh(mesh):
    for factor in (1, *config.data.longer):
      if factor > 1 or evaluated is None:
        evaluated = _evaluate_at(config, params, mesh, factor)
      measured = dict(evaluated.numbers)
      if 'loss' in measured:  # in the summary, 'loss' is that of training
        measured['validation_loss'] = measured.pop('loss')
      if isinstance(config.data.task, tasks.TextTask):
        scores = [a.score for a in _write_answers(config, params, factor)]
        measured['string_match'] = float(np.mean(scores))
      numbers |= {name + _suffix(factor): x for name, x in measured.items()}
  return workload_lib.Summary(numbers)


def _suffix(factor: int) -> str:
  return '' if factor == 1 else f'_{factor}x'


def _stretch(config, factor):
  """Returns the task on longer rows, and a model with room for them.

  Only attention needs room: other states hold any length, and no parameter
  depends on it.
  """
  task = config.data.task
  if factor > 1:
    task = task.stretched(factor)
  room = task.num_tokens + getattr(task, 'answer_tokens', 0)
  model = config.model
  if models.max_stream_length(model) is not None and model.max_length < room:
    model = dataclasses.replace(model, max_length=room)
  return task, model


def _evaluate_at(config, params, mesh, factor):
  """Reads rows in pieces of the training length, carrying the state."""
  task, model_config = _stretch(config, factor)
  model = models.make_model(model_config, config.inner, head=config.head)
  length = config.data.sequence_length
  index, num_slices = sharding.process_slice(mesh)
  batches = tasks.make_iterator(
    config.data,
    split='validation',
    factor=factor,
    process_index=index,
    process_count=num_slices,
  )
  pieces = (
    [
      workload_lib.put(
        {k: x[:, i : i + length] for k, x in batch.items()}, mesh
      )
      for i in range(0, task.num_tokens, length)
    ]
    for batch in itertools.islice(batches, config.evaluation.num_batches)
  )
  kind = _kind(task)
  count = evaluation.make_count(model, kind.token_loss)
  return kind.evaluated(count(params, pieces))


def _write_answers(
  config, params, factor=1, num_rows=None
) -> Iterator[evaluation.Answer]:
  """Yields the answers of the model to prompts of the validation split."""
  task, model_config = _stretch(config, factor)
  batch_size = config.data.batch_size
  num_rows = num_rows or config.evaluation.num_batches * batch_size
  return evaluation.generate_answers(
    models.make_model(model_config, config.inner),
    params,
    task,
    (
      tasks.make_row(config.data, i, split='validation', factor=factor)
      for i in range(num_rows)
    ),
    batch_size=min(batch_size, num_rows),
  )


def _sample(config, params, mesh):
  """Returns a row of the validation split with the answers of the model."""
  task = config.data.task
  with jax.set_mesh(mesh):
    if isinstance(task, tasks.TextTask):
      (answer,) = _write_answers(config, params, num_rows=1)
      right = ', '.join(answer.references)
      return f'{answer.prompt}\n\nAnswer: {answer.output}\nRight: {right}\n'
    row = tasks.make_row(config.data, 0, split='validation')
    model = models.make_model(config.model, config.inner, head=config.head)
    outputs, _ = jax.jit(model.forward)(
      params, None, jnp.asarray(row.tokens)[None]
    )
  outputs = np.asarray(outputs)[0]  # [t, v], or [t, 1] of numbers
  is_numbers = _kind(task) is _NUMBERS
  answers = outputs[:, 0] if is_numbers else outputs.argmax(axis=-1)
  lines = ['position, target, answer']
  for position in np.flatnonzero(row.mask):
    lines.append(f'{position}, {row.targets[position]}, {answers[position]}')
  if _kind(task) is _IDS:
    lines = [' '.join(map(str, row.tokens)), '', *lines]
  return '\n'.join(lines) + '\n'


def _verdict(config, summary: Mapping[str, Any]) -> str:
  """Returns the outcome at every length in one sentence."""
  parts = []
  for factor in (1, *config.data.longer):
    end = _suffix(factor)
    if _kind(config.data.task) is _NUMBERS:
      text = f'mean squared error {summary["squared_error" + end]:.4f}'
    else:
      text = (
        f'{summary["accuracy" + end]:.2%} of answers right, '
        f'{summary["all_right" + end]:.2%} of rows all right'
      )
    parts.append(f'{text} on {config.data.sequence_length * factor:,} tokens')
  return '; '.join(parts) + '.'


def _table(config, summary: Mapping[str, Any]) -> str:
  """Returns the numbers of every length as a Markdown table."""
  names = [
    name
    for name in ('accuracy', 'macro_accuracy', 'all_right', 'string_match')
    if name in summary
  ] or ['squared_error']
  rows = []
  for factor in (1, *config.data.longer):
    values = [summary[name + _suffix(factor)] for name in names]
    tokens = f'{config.data.sequence_length * factor:,}'
    rows.append([tokens, *(f'{value:.4f}' for value in values)])
  return markdown.table(['tokens', *names], rows)
