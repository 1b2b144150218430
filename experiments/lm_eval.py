r"""Evaluates the checkpoint of a run with EleutherAI's lm-evaluation-harness.

Command (needs the harness: make harness):
  make demo
  python launch/run.py --config=experiments/lm_eval.py \
    --workdir=runs/lm_eval --mode=eval

`--set=checkpoint=runs/NAME` names another run, and `--set='tasks=("piqa",)'`
other tasks: names that the harness knows, or folders of task files with their
data. The default is experiments/lm_eval_tasks, three small
tasks about Python that need no network.

`--config=experiments/lm_eval.py:commonsense` is the suite of the papers' tables
of language models. Its data come from the network, or from the cache of an
earlier run.

Hardware: two CPU cores; half a minute to a minute, mostly compilation.
Results: experiments/results/lm_eval/README.md.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, table 2.
  https://github.com/EleutherAI/lm-evaluation-harness
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import difflib
import logging
import pathlib
import time
from typing import Any

import jax

from experiments import lm_eval_report
from nested_learning import configs
from nested_learning import data as data_lib
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning import training
from nested_learning.evaluation import harness
from nested_learning.training import modes
from nested_learning.training import trainer

_ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class LmEvalConfig:
  """A checkpoint, and the tasks to evaluate it on."""

  checkpoint: str = 'runs/quickstart'  # folder of a run; its last checkpoint
  tasks: tuple[str, ...] = ('experiments/lm_eval_tasks',)  # names or folders
  limit: int | None = None  # documents of each task; None is all
  num_fewshot: int | None = None  # examples in a prompt; None is the task's own
  batch_size: int = 8  # texts that are read together
  max_length: int | None = None  # tokens of a call; None is model.max_length
  seed: int = 0  # for tasks that sample
  mesh: sharding.MeshConfig = sharding.MeshConfig()

  def __post_init__(self):
    if not self.tasks:
      raise errors.UserError(
        'tasks=() names no task; give names of the harness or folders.'
      )
    for name, least in (('limit', 1), ('num_fewshot', 0), ('batch_size', 1)):
      value = getattr(self, name)
      if value is not None and value < least:
        raise errors.UserError(f'{name}={value} must be at least {least}.')


def get_config(arg: str | None = None) -> LmEvalConfig:
  """Returns the experiment; `arg` is 'commonsense' for the papers' suite."""
  if arg is None:
    return LmEvalConfig()
  if arg == 'commonsense':
    return LmEvalConfig(tasks=tuple(lm_eval_report.COMMONSENSE))
  raise errors.UserError(f"{arg!r} must be 'commonsense', or left out.")


def run(config: LmEvalConfig, workdir: str, mode: str) -> None:
  """Evaluates the checkpoint and writes tables."""
  if mode != 'eval':
    raise errors.UserError(
      f'--mode={mode} does nothing here: the checkpoint of another run is '
      'evaluated; use --mode=eval.'
    )
  experiment = _read_run(config)
  package = harness.import_package()
  with _quiet():
    tasks = load_tasks(package, config.tasks)
    start = time.perf_counter()
    lm, about = _make_lm(config, experiment)
    with jax.set_mesh(trainer.make_mesh(experiment)):
      found = package.simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=package.tasks.TaskManager(include_defaults=False),
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        bootstrap_iters=1000,
      )
  if jax.process_index() == 0:
    about['seconds'] = time.perf_counter() - start
    lm_eval_report.write(config, workdir, about, found)


def load_tasks(package: Any, specs: Sequence[str]) -> list[Any]:
  """Loads tasks and their data.

  Args:
    package: `lm_eval`.
    specs: Names that the harness knows, or folders of task files; the files'
      paths to data start at their folder.

  Returns:
    The harness' tasks.

  Raises:
    errors.UserError: If there is no such task or folder, or the data of a task
      cannot be loaded.
  """
  manager = None
  loaded = []
  for spec in specs:
    folder = _find_folder(spec)
    if folder is not None:
      local = package.tasks.TaskManager(
        include_path=str(folder), include_defaults=False
      )
      if not local.all_subtasks:
        raise errors.UserError(f'tasks: {spec!r} holds no task file (*.yaml).')
      with contextlib.chdir(folder):
        loaded += [_load(local, name) for name in local.all_subtasks]
      continue
    manager = manager or package.tasks.TaskManager()
    if spec not in manager.all_tasks:
      near = difflib.get_close_matches(spec, manager.all_tasks, 3, 0.5)
      raise errors.UserError(
        f'tasks: {spec!r} is neither a folder nor a task that the harness '
        f'knows{"; the nearest are " + ", ".join(near) if near else ""}.'
      )
    loaded.append(_load(manager, spec))
  return [
    task
    for item in loaded
    for task in (item if isinstance(item, list) else [item])
  ]


def _load(manager: Any, name: str) -> Any:
  """Loads a task, a group, or the tasks of a tag, with their data."""
  try:
    found = manager.load([name])
  except Exception as error:  # Loading a data set raises anything.
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise errors.UserError(
      f'task {name!r} cannot be loaded ({reason[:200]}). Its data need the '
      'network once; tasks in a folder of your own need none.'
    ) from error
  groups = found.get('groups') or {}
  return groups[name] if name in groups else list(found['tasks'].values())


def _find_folder(spec: str) -> pathlib.Path | None:
  """Returns the folder of a spec, here or in the repository, if any."""
  for folder in (pathlib.Path(spec).expanduser(), _ROOT / spec):
    if folder.is_dir():
      return folder.resolve()
  return None


def _read_run(config: LmEvalConfig) -> training.ExperimentConfig:
  """Returns the config of the run, on the mesh of this evaluation."""
  folder = pathlib.Path(config.checkpoint).expanduser()
  for name in ('config.json', 'checkpoints'):
    if not (folder / name).exists():
      raise errors.UserError(
        f'checkpoint={config.checkpoint!r} is not a trained run: it has no '
        f'{name}. Name the folder of one, --set=checkpoint=runs/NAME, or train '
        'the quickstart with `make demo`.'
      )
  experiment = configs.load(str(folder / 'config.json'))
  if not isinstance(experiment, training.ExperimentConfig):
    raise errors.UserError(
      f'checkpoint={config.checkpoint!r} is a run of '
      f'{type(experiment).__name__}, which leaves no language model.'
    )
  if not isinstance(experiment.data, data_lib.DataConfig):
    raise errors.UserError(
      f'checkpoint={config.checkpoint!r} is a model of '
      f'{type(experiment.data).__name__}, not of text; name one that has read '
      'text.'
    )
  return dataclasses.replace(experiment, mesh=config.mesh)


def _make_lm(
  config: LmEvalConfig, experiment: training.ExperimentConfig
) -> tuple[Any, dict[str, Any]]:
  """Returns the last checkpoint as a model of lm-eval, and facts about it."""
  folder = pathlib.Path(config.checkpoint).expanduser()
  tokenizer = data_lib.make_tokenizer(experiment.data.tokenizer)
  params, step = modes.restore_params(experiment, folder, tokenizer.fingerprint)
  model = models.make_model(experiment.model, experiment.inner)
  lm = harness.make_lm(
    model,
    params,
    tokenizer,
    batch_size=config.batch_size,
    max_length=config.max_length,
    seed=config.seed,
    mesh=trainer.make_mesh(experiment),
  )
  return lm, {
    'name': experiment.name,
    'checkpoint': config.checkpoint,
    'step': step,
    'num_parameters': parameters.count(model.table),
  }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the warnings of the packages about tasks and connections."""
  import datasets

  loggers = [logging.getLogger(name) for name in ('lm_eval', 'huggingface_hub')]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.ERROR)
  datasets.disable_progress_bars()
  try:
    yield
  finally:
    datasets.enable_progress_bars()
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)
