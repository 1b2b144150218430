"""The modes of a run: train, evaluate, generate, hold a session, describe."""

from collections.abc import Iterator
import contextlib
import errno
import functools
import json
import os
import pathlib
import sys
import time
from typing import Any, Literal

import jax

from nested_learning import configs
from nested_learning import errors
from nested_learning import files
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning import tasks
from nested_learning.training import checkpoint_files
from nested_learning.training import checkpoint_restore
from nested_learning.training import checkpoints
from nested_learning.training import config as config_lib
from nested_learning.training import description
from nested_learning.training import goodput
from nested_learning.training import interrupts
from nested_learning.training import make_workload
from nested_learning.training import metrics as metrics_lib
from nested_learning.training import pretrained_runs
from nested_learning.training import profiling
from nested_learning.training import report
from nested_learning.training import session
from nested_learning.training import trainable
from nested_learning.training import trainer
from nested_learning.training import workload as workload_lib


def run(
  config: config_lib.ExperimentConfig,
  workdir: str | pathlib.Path | None = None,
  mode: Literal['train', 'eval', 'generate', 'session', 'describe'] = 'train',
  *,
  profile: str | None = None,
) -> None:
  """Runs an experiment in one of its modes.

  * 'train' resumes from the latest checkpoint in `workdir` or starts, and ends
    with an evaluation, a sample, report.md and, last of all, summary.json.
  * 'eval' evaluates the latest checkpoint and writes evaluation.json: a text
    with writes on and off, by position; a task at every length.
  * 'generate' prints a continuation of the prompt, or an answer to the task.
  * 'session' feeds files and a prompt to a session, and saves the session.
  * 'describe' prints sizes, and needs no workdir.

  Args:
    config: The experiment.
    workdir: The run's folder.
    mode: One of the modes.
    profile: Steps to profile in mode 'train', 'START:STOP'.

  Raises:
    errors.UserError: A setting or a file is wrong, or training has diverged.
    SystemExit: After a signal, with 128 plus its number, once all is saved.
  """
  steps = None if profile is None else profiling.parse(profile)
  if mode == 'describe':
    print(description.describe(config))
    return
  if workdir is None:
    raise errors.UserError(f'mode {mode!r} needs a workdir.')
  workdir = pathlib.Path(workdir)
  modes = {
    'train': functools.partial(_train, profile=steps),
    'eval': _evaluate,
    'generate': _generate,
    'session': _session,
  }
  if mode not in modes:
    raise errors.UserError(
      f'{mode=} must be one of {", ".join([*modes, "describe"])}.'
    )
  with _explain_disk(workdir):
    checkpoint_files.home(workdir)  # refuses a name that cannot be used
    modes[mode](config, workdir, make_workload.make_workload(config))


def restore_params(
  config: config_lib.ExperimentConfig,
  workdir: pathlib.Path,
  tokenizer_fingerprint: str,
) -> tuple[Any, int]:
  """Restores the parameters of the latest checkpoint.

  A run without checkpoints has the pretrained weights that it begins with.

  Args:
    config: The experiment.
    workdir: The run's folder.
    tokenizer_fingerprint: Fingerprint of the tokens in use.

  Returns:
    The parameters, sharded over the mesh of the config, and the step.

  Raises:
    errors.UserError: There is no checkpoint of this experiment.
  """
  has_checkpoints = (workdir / 'checkpoints').is_dir()
  if not has_checkpoints and config.base is None:
    raise errors.UserError(
      f'{workdir} holds no checkpoint; run --mode=train first, or give the '
      '--workdir of a run.'
    )
  model = models.make_model(config.model, config.inner, head=config.head)
  mesh = trainer.make_mesh(config)
  if not has_checkpoints:
    return pretrained_runs.load_params(config, model, mesh), 0
  frozen = pretrained_runs.load_frozen(config, model, mesh)
  table = trainable.trained_table(config, model.table)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    parameters.abstract(table),
    sharding.param_shardings(table, mesh),
  )
  with checkpoints.open_manager(workdir, read_only=True) as manager:
    restored = checkpoint_restore.restore(
      manager,
      {'params': abstract},
      config=config,
      tokenizer_fingerprint=tokenizer_fingerprint,
      base_fingerprint=trainable.fingerprint(frozen),
    )
  params = trainable.combine(restored.state['params'], frozen)
  return params, restored.step


@contextlib.contextmanager
def _explain_disk(workdir: pathlib.Path) -> Iterator[None]:
  """Turns errors of the files below a folder into UserErrors."""
  try:
    yield
  except OSError as error:
    name = error.filename
    if not isinstance(name, str | os.PathLike):
      if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise
      name = workdir
    elif not pathlib.Path(os.path.abspath(name)).is_relative_to(
      os.path.abspath(workdir)
    ):
      raise
    raise errors.of_disk(error.errno)(
      f'{name}: {error.strerror}. Fix this and run the same command again; '
      'its checkpoints are kept.'
    ) from error


def _train(config, workdir, workload, *, profile):
  _check_memory(config, workload.model)
  workdir.mkdir(parents=True, exist_ok=True)
  config_path = workdir / 'config.json'
  if jax.process_index() == 0 and not config_path.exists():
    files.write_whole(config_path, configs.to_json(config))
  begin = time.perf_counter()
  outcome = trainer.train(config, workdir, workload, profile=profile)
  with interrupts.ending(trainer.trained_message(config, workdir)):
    _finish(config, workdir, workload, outcome, begin)


def _check_memory(config, model: models.Model) -> None:
  """Raises an error if the parameters alone exceed the memory of this machine.

  Training needs several times as much. On accelerators and in several processes
  XLA says what does not fit.
  """
  if jax.default_backend() != 'cpu' or jax.process_count() > 1:
    return
  needed = 4 * parameters.count(model.table)  # float32
  there = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if needed > there:
    sizes = ', '.join(
      f'model.{name}={getattr(config.model, name)}'
      for name in ('vocab_size', 'num_layers', 'embed_dim')
    )
    raise errors.UserError(
      f'The parameters take {needed:,} bytes, and this machine has {there:,} '
      f'bytes of memory; make the model smaller ({sizes}, and the sizes of its '
      'mixer and levels).'
    )


def _finish(config, workdir, workload, outcome, begin):
  """Evaluates, samples and reports; the summary is written last of all."""
  mesh = trainer.make_mesh(config)
  found = _summarize(
    workload, outcome.params, workdir, mesh, outcome.evaluation
  )
  sample = workload.sample(outcome.params, mesh)
  if jax.process_index() != 0:
    return
  num_tokens = config.train.num_steps * config.batch_tokens
  lines = metrics_lib.read_metrics(workdir / 'metrics.jsonl')
  losses = [x['loss'] for x in lines if isinstance(x.get('loss'), float)]
  rate = num_tokens / outcome.train_seconds
  summary = {
    'name': config.name,
    'steps': config.train.num_steps,
    'tokens': num_tokens,
    'num_parameters': parameters.count(workload.model.table),
    **({'loss': losses[-1]} if losses else {}),
    **found.numbers,
    'tokens_per_second': rate,
    **outcome.chips.numbers(rate),
    'goodput': goodput.goodput(outcome.seconds),
    'train_seconds': outcome.train_seconds,
    'compile_seconds': outcome.compile_seconds,
    'seconds': time.perf_counter() - begin,  # of the last process, all in all
    'device': jax.devices()[0].device_kind,
    'num_devices': mesh.size,
    'num_processes': jax.process_count(),
    'dtype': config.model.dtype,
  }
  found.write_files(workdir)
  files.write_whole(workdir / report.SAMPLE, sample)
  report.write_report(workdir, config, workload, summary)
  _write_json(workdir / 'summary.json', summary)
  print(workload.verdict(summary))


def _summarize(
  workload, params, workdir, mesh, evaluated
) -> workload_lib.Summary:
  try:
    return workload.summarize(params, mesh, evaluated)
  except FloatingPointError as error:
    raise errors.UserError(
      f'{error}: the model in {workdir} has diverged. Lower '
      'train.learning_rate in another --workdir.'
    ) from error


def _evaluate(config, workdir, workload):
  params, step = restore_params(config, workdir, workload.fingerprint)
  mesh = trainer.make_mesh(config)
  found = _summarize(workload, params, workdir, mesh, None)
  if jax.process_index() == 0:
    # First, so that a folder without rights loses nothing.
    print(workload.verdict(found.numbers), flush=True)
    evaluated = {'steps': step, **found.numbers}
    _write_json(workdir / 'evaluation.json', evaluated)
    found.write_files(workdir)
    summary_path = workdir / 'summary.json'
    summary = _read_summary(summary_path)
    if summary is not None:
      summary |= found.numbers
      report.write_report(workdir, config, workload, summary)
      _write_json(summary_path, summary)


def _read_summary(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a summary; None if the run is not finished or it is damaged."""
  if not path.exists():
    return None
  try:
    summary = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError):
    summary = None
  if not isinstance(summary, dict):
    print(
      f'{path} cannot be read and stays as it is; run --mode=train again for a '
      'new one.',
      file=sys.stderr,
    )
    return None
  return summary


def _generate(config, workdir, workload):
  params, _ = restore_params(config, workdir, workload.fingerprint)
  text = workload.sample(params, trainer.make_mesh(config))
  if jax.process_index() == 0:
    print(text)  # first, so that a folder without rights loses nothing
    files.write_whole(workdir / report.SAMPLE, text)


def _session(config, workdir, workload):
  if isinstance(config.data, tasks.TaskDataConfig):
    raise errors.UserError(
      '--mode=session reads text, and this run learned a task; give the '
      '--workdir of a language model.'
    )
  if jax.process_count() > 1:
    raise errors.UserError(
      '--mode=session is for one process; leave out --target.'
    )
  params, _ = restore_params(config, workdir, workload.fingerprint)
  with jax.set_mesh(trainer.make_mesh(config)):
    session.run_session(config, params)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  files.write_whole(path, json.dumps(values, indent=2) + '\n')
