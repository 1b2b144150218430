"""Compares the optimisers, with the same rates, data and seeds for all.

Command (the digits need scikit-learn: pip install -c constraints.txt -e
'.[experiments]'):
  python launch/run.py --config=experiments/optimizers/compare.py \
    --workdir=runs/cmp

`compare.py:digits`, `:vit`, `:language`, `:streams` and `:toy` run a part, each
in a --workdir of its own; `:digits,vit` runs two. The same command again goes
on where it was interrupted. The page is written to --workdir/results at the
end, and from the cells that are finished at any time by
  python launch/run.py --workdir=runs/cmp --mode=eval

--set=results=experiments/results/optimizers, with either command, also takes
finished cells from that folder, and writes page and cells there.

Hardware: one CPU core, three to four hours of it for `:language` (two minutes
for each of its trainings); the other parts take a quarter of an hour each.
Results: experiments/results/optimizers/README.md.
"""

import dataclasses
import math
import pathlib

from experiments import cells as cells_lib
from experiments import report_files
from experiments.optimizers import classification
from experiments.optimizers import landscape
from experiments.optimizers import language
from experiments.optimizers import least_squares
from experiments.optimizers import orthogonal_tasks
from experiments.optimizers import rules
from experiments.optimizers import stream_report
from experiments.optimizers import stream_tasks
from experiments.optimizers import training_report
from experiments.optimizers import trainings
from launch import provenance
from nested_learning import errors

# Parts, in the order in which they are run, and their tasks.
_PARTS = {
  'toy': ('least_squares', 'orthogonal_tasks', 'landscape'),
  'digits': ('digits',),
  'vit': ('vit',),
  'streams': ('digit_pairs', 'topics'),
  'language': ('language',),
}
# Order of the sections.
_SECTIONS = (
  'language', 'vit', 'digits', 'digit_pairs', 'topics',
  'orthogonal_tasks', 'least_squares', 'landscape',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """Tasks, their lengths, and the search."""

  parts: tuple[str, ...] = tuple(_PARTS)
  optimizers: tuple[str, ...] = rules.NAMES
  # Equally far apart, from the quickstart's for AdamW to one that suits DGD.
  rates: tuple[float, ...] = (4e-3, 2.5e-2, 0.16, 1.0)
  num_seeds: int = 3
  digits_steps: int = 300
  vit_steps: int = 400
  batch_size: int = 64  # images
  language_mixer: str = 'hope'  # as the quickstart's argument
  language_steps: int = 600  # as the quickstart
  language_tokens: int = 512  # of a row; as the quickstart
  stream_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)
  stream_steps: int = 64  # of a task
  pretraining_steps: int = 1000  # before the stream of text
  toys: tuple[
    least_squares.LeastSquaresConfig,
    orthogonal_tasks.OrthogonalTasksConfig,
    landscape.LandscapeConfig,
  ] = (
    least_squares.LeastSquaresConfig(),
    orthogonal_tasks.OrthogonalTasksConfig(),
    landscape.LandscapeConfig(),
  )
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None

  def __post_init__(self):
    for name, known in (('parts', _PARTS), ('optimizers', rules.NAMES)):
      unknown = sorted(set(getattr(self, name)) - set(known))
      rule = f'among {", ".join(known)}'
      errors.check_field(self, name, not unknown, rule)
    for name in ('rates', 'stream_rates'):
      rates = getattr(self, name)
      fine = rates and all(0 < rate < math.inf for rate in rates)
      errors.check_field(self, name, fine, 'one or more finite numbers above 0')
    errors.check_field(self, 'num_seeds', self.num_seeds >= 1, 'at least 1')


def get_config(arg: str | None = None) -> CompareConfig:
  """Returns the experiment; `arg` lists parts, or is 'small' for tests."""
  if arg is None:
    return CompareConfig()
  if arg != 'small':
    return CompareConfig(parts=tuple(arg.split(',')))
  return CompareConfig(
    optimizers=('AdamW', 'Muon', 'M3'),
    rates=(1e-2,),
    num_seeds=2,
    digits_steps=4,
    vit_steps=4,
    batch_size=8,
    language_mixer='transformer',
    language_steps=2,
    language_tokens=32,
    stream_rates=(1e-2,),
    stream_steps=4,
    pretraining_steps=2,
    toys=(
      least_squares.LeastSquaresConfig(
        num_inputs=6,
        num_outputs=2,
        conditions=(10.0,),
        num_steps=10,
        num_rates=2,
      ),
      orthogonal_tasks.OrthogonalTasksConfig(
        num_inputs=8, num_outputs=2, num_steps=20, num_rates=2
      ),
      landscape.LandscapeConfig(num_steps=10, num_rates=3),
    ),
  )


def run(config: CompareConfig, workdir: str, mode: str) -> None:
  """Measures every cell that is not finished (train), and writes the page."""
  if mode != 'eval':
    report_files.check_mode(mode)
  folder = pathlib.Path(workdir)
  store = cells_lib.open_store(folder, config.results)
  tasks = _make_tasks(config)
  if mode == 'train':
    for part, names in _PARTS.items():
      for name in names if part in config.parts else ():
        tasks[name].measure(store)
  page = folder / 'results' if config.results is None else store.results
  summary = _write_page(config, tasks, store, page)
  print(f'{page}/README.md has the results.')
  if mode == 'train':
    report_files.write(
      workdir,
      config,
      module=__name__,
      summary=summary,
      sections=['# Optimisers', f'The results are in {page}/README.md.'],
    )


def _make_tasks(config) -> dict[str, cells_lib.Task]:
  """Returns all tasks by name; nothing is read or compiled yet."""
  search = trainings.Search(config.optimizers, config.rates, config.num_seeds)
  made = [
    training_report.make_task(training, search)
    for training in (
      classification.make_mlp(config.digits_steps, config.batch_size),
      classification.make_vit(config.vit_steps, config.batch_size),
      language.make_training(
        mixer=config.language_mixer,
        num_steps=config.language_steps,
        num_tokens=config.language_tokens,
      ),
    )
  ]
  made += [
    stream_report.make_task(stream, config.stream_rates, config.num_seeds)
    for stream in (
      stream_tasks.make_digits(config.stream_steps),
      stream_tasks.make_topics(config.stream_steps, config.pretraining_steps),
    )
  ]
  made += [
    module.make_task(toy, config.optimizers)
    for module, toy in zip(
      (least_squares, orthogonal_tasks, landscape), config.toys, strict=True
    )
  ]
  return {task.name: task for task in made}


def _write_page(config, tasks, store, folder) -> dict[str, float]:
  """Writes README.md, plots, cells and summary.json; returns its numbers."""
  sections, summary, counts, sources = [], {}, {}, []
  folder.mkdir(parents=True, exist_ok=True)
  for name in _SECTIONS:
    cells = cells_lib.read(store, name)
    if cells:
      counts[name] = len(cells)
      sources += [cell.source for cell in cells.values()]
      report = tasks[name].report(store, folder)
      sections += report.sections
      summary |= {f'{name}.{k}': value for k, value in report.numbers.items()}
  finished = ', '.join(f'{name} {count}' for name, count in counts.items())
  sections = [
    '# Optimisers compared',
    'Every optimiser gets the same data, steps, batches, initial parameters '
    f'and learning rates ({", ".join(f"{rate:g}" for rate in config.rates)} '
    'in trainings). All are tried with seed 0, and while the best is at '
    'an end of those tried, the next one beyond it; the one with the best '
    f'score then gets seeds up to {config.num_seeds - 1}. Numbers are means '
    'over seeds ± the standard deviation of a sample. A difference below '
    'twice the larger of two such spreads is no difference. The rate is '
    'selected on the data that the score is measured on, for all alike.',
    provenance.listed(sources, {'cells': finished or 'none'}),
    *sections,
  ]
  cells_lib.write_results(store, list(counts), folder, sections, summary)
  return summary
