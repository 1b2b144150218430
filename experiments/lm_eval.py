r"""Tasks of EleutherAI's lm-evaluation-harness on the checkpoint of a run.

Command (needs the harness: make harness):
  make demo
  python launch/run.py --config=experiments/lm_eval.py \
    --workdir=runs/lm_eval --mode=eval

`--set=checkpoint=runs/NAME` names another run, and `--set='tasks=("piqa",)'`
other tasks: names that the harness knows, or folders of task files, beside
which their data lie. The default is experiments/lm_eval_tasks, three small
tasks about Python that need no network.

`--config=experiments/lm_eval.py:commonsense` is the suite of the papers' tables
of language models. Its data come from the network, or from where an earlier run
with a network left them.

Nested Learning, arXiv:2512.24695, table 2, has the numbers of the papers.
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

from experiments import results
from nested_learning import configs
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning import training
from nested_learning.evaluation import harness
from nested_learning.training import modes
from nested_learning.training import trainer

_ROOT = pathlib.Path(__file__).resolve().parents[1]

# The metric of each task that the papers' tables show.
_COMMONSENSE = {
  'wikitext': 'word_perplexity',
  'lambada_openai': 'acc',
  'piqa': 'acc',
  'hellaswag': 'acc_norm',
  'winogrande': 'acc',
  'arc_easy': 'acc',
  'arc_challenge': 'acc_norm',
  'social_iqa': 'acc',
  'boolq': 'acc',
}
# Nested Learning, table 2: perplexity of wikitext, accuracies, their mean.
_PAPER = (
  ('Transformer++ 760M', 24.18, 37.1, 67.2, 43.8, 53.0, 65.6, 33.4, 39.1, 61.7),
  ('Titans 760M', 20.08, 38.1, 69.1, 48.5, 52.7, 66.2, 35.7, 40.3, 62.8),
  ('Hope 760M', 18.68, 38.8, 69.2, 49.1, 53.6, 66.8, 36.1, 41.2, 63.4),
  ('Transformer++ 1.3B', 17.92, 42.6, 71.4, 52.3, 54.1, 69.9, 36.5, 41.8, 58.4),
  ('Titans 1.3B', 15.60, 49.1, 73.1, 56.3, 59.8, 72.4, 40.8, 42.1, 61.0),
  ('Hope 1.3B', 14.39, 51.0, 73.9, 57.5, 61.2, 73.8, 42.7, 42.8, 61.4),
)


@dataclasses.dataclass(frozen=True)
class LmEvalConfig:
  """Which checkpoint is asked what."""

  checkpoint: str = 'runs/quickstart'  # folder of a run; its last checkpoint
  tasks: tuple[str, ...] = ('experiments/lm_eval_tasks',)  # names or folders
  limit: int | None = None  # documents of each task; None is all
  num_fewshot: int | None = None  # examples in a prompt; None is the task's own
  batch_size: int = 8  # texts that are read together
  max_length: int | None = None  # tokens of a call; None is model.max_length
  seed: int = 0  # of what is drawn where a task samples
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
  """The experiment; `arg` is 'commonsense' for the papers' suite."""
  if arg is None:
    return LmEvalConfig()
  if arg == 'commonsense':
    return LmEvalConfig(tasks=tuple(_COMMONSENSE))
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
    _write(config, workdir, about, found)


def load_tasks(package: Any, specs: Sequence[str]) -> list[Any]:
  """Loads tasks and their data.

  Args:
    package: `lm_eval`.
    specs: Names that the harness knows, or folders of task files; the files'
      paths to data start at their folder.

  Returns:
    The harness' tasks.

  Raises:
    errors.UserError: There is no such task or folder, or a task's data cannot
      be had.
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
  """A task, a group, or the tasks of a tag, with the data."""
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
  """The folder that a spec names, below here or below the repository."""
  for folder in (pathlib.Path(spec).expanduser(), _ROOT / spec):
    if folder.is_dir():
      return folder.resolve()
  return None


def _read_run(config: LmEvalConfig) -> training.ExperimentConfig:
  """The config of the run, on this evaluation's mesh."""
  folder = pathlib.Path(config.checkpoint).expanduser()
  for name in ('config.json', 'checkpoints'):
    if not (folder / name).exists():
      raise errors.UserError(
        f'checkpoint={config.checkpoint!r} is no trained run: it has no '
        f'{name}. Name the folder of one, --set=checkpoint=runs/NAME, or train '
        'the quickstart with `make demo`.'
      )
  experiment = configs.load(str(folder / 'config.json'))
  if not isinstance(experiment, training.ExperimentConfig):
    raise errors.UserError(
      f'checkpoint={config.checkpoint!r} is a run of '
      f'{type(experiment).__name__}, which leaves no language model.'
    )
  return dataclasses.replace(experiment, mesh=config.mesh)


def _make_lm(
  config: LmEvalConfig, experiment: training.ExperimentConfig
) -> tuple[Any, dict[str, Any]]:
  """The harness' model of a run's last checkpoint, and what it is."""
  folder = pathlib.Path(config.checkpoint).expanduser()
  tokenizer = trainer.make_tokenizer(experiment)
  params, step = modes.restore_params(experiment, folder, tokenizer.fingerprint)
  model = models.make_model(experiment.model)
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


def _write(
  config: LmEvalConfig,
  workdir: str,
  about: dict[str, Any],
  found: dict[str, Any],
) -> None:
  """Writes what a run leaves, and prints the table."""
  lines = list(_lines(found))
  summary = about | {
    'lm_eval_version': found['lm_eval_version'],
    'device': jax.devices()[0].device_kind,
  }
  for line in lines:
    names = [line['task'], line['metric'], line.get('filter')]
    key = results.key('_'.join(filter(None, names)))
    summary[key] = line['value']
    if line['stderr'] is not None:
      summary[f'{key}_stderr'] = line['stderr']
  head = ('task', 'metric', 'value', 'standard error', 'documents')
  table = results.table(
    head,
    [
      (
        line['task'],
        ', '.join(filter(None, (line['metric'], line.get('filter')))),
        line['value'],
        '' if line['stderr'] is None else line['stderr'],
        line['num_documents'],
      )
      for line in lines
    ],
  )
  sections = [
    f'# {about["name"]} on tasks of lm-evaluation-harness',
    f'`{about["checkpoint"]}` after step {about["step"]}, '
    f'{about["num_parameters"]:,} parameters; lm_eval '
    f'{found["lm_eval_version"]}, {about["seconds"]:.0f} seconds.',
    table,
  ]
  ours = _commonsense_row(about['name'], summary)
  if ours is not None:
    summary['commonsense_average'] = ours[-1]
    sections += [_commonsense_section(ours)]
  sections += _answers(found)
  results.write(
    workdir,
    config,
    module='experiments.lm_eval',
    summary=summary,
    metrics=lines,
    sections=sections,
  )
  print(table)


def _lines(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """One mapping per task, metric and filter."""
  counts = found['n-samples']
  for task, values in found['results'].items():
    for key, value in values.items():
      metric, comma, name = key.partition(',')
      if not comma or metric.endswith('_stderr'):
        continue
      stderr = values.get(f'{metric}_stderr,{name}')
      line = {'task': task, 'metric': metric}
      if name != 'none':
        line['filter'] = name
      yield line | {
        'value': float(value),
        'stderr': stderr if isinstance(stderr, float) else None,
        'num_documents': counts.get(task, {}).get('effective', 0),
      }


def _commonsense_row(name: str, summary: dict[str, Any]) -> list[Any] | None:
  """Perplexity and percentages as in the papers' table, the mean at the end."""
  keys = [f'{task}_{metric}' for task, metric in _COMMONSENSE.items()]
  if not all(key in summary for key in keys):
    return None
  perplexity, *accuracies = [summary[key] for key in keys]
  percent = [100 * accuracy for accuracy in accuracies]
  return [name, perplexity, *percent, sum(percent) / len(percent)]


def _commonsense_section(ours: list[Any]) -> str:
  rows = [[*row, sum(row[2:]) / len(row[2:])] for row in _PAPER]
  head = ('model', *_COMMONSENSE, 'mean')
  return (
    'Beside the numbers printed in arXiv:2512.24695, table 2 (perplexity of '
    'wikitext, then percentages; trained on 30B and 100B tokens):\n\n'
    + results.table(head, [ours, *rows])
  )


def _answers(found: dict[str, Any], num_shown: int = 5) -> Iterator[str]:
  """What the model wrote, for the tasks in which it writes."""
  for task, samples in found.get('samples', {}).items():
    if found['configs'][task]['output_type'] != 'generate_until':
      continue
    rows = [
      [
        _code(text)
        for text in (
          sample['arguments'][0][0][-50:],
          sample['resps'][0][0],
          str(sample['target']),
        )
      ]
      for sample in samples[:num_shown]
    ]
    head = ('end of the prompt', 'written', 'right')
    yield f'## {task}\n\n' + results.table(head, rows)


def _code(text: str) -> str:
  """A text as a cell of a table."""
  return '`' + repr(text).replace('`', "'").replace('|', '\\|') + '`'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences what the packages say of tasks and of lost connections."""
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
