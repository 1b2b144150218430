"""Running the suite: what is left of it, and then the page."""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
import shlex
import sys

from experiments.small import provenance
from experiments.small import report
from experiments.small import suite
from launch import sweeps

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / 'experiments' / 'results' / 'small'
_MOST_JOBS = 8  # by default; each takes about a gigabyte


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command says; its flags have the same names."""

  workdir: pathlib.Path  # of the runs
  seeds: int = 1
  only: tuple[str, ...] = ()
  quick: bool = False
  jobs: int | None = None  # one for each core, up to a limit
  results: pathlib.Path | None = None  # where the page goes, if not by default


def run(
  options: Options,
  make_command: Callable[[sweeps.Run], Sequence[str]] | None = None,
) -> int:
  """Runs what is not finished and writes the page.

  Args:
    options: What to run.
    make_command: From a run to its command; by default that of the launcher.

  Returns:
    The exit code.

  Raises:
    errors.UserError: A name or a setting is wrong.
  """
  cells = suite.make_cells(quick=options.quick)
  cells = suite.select(cells, options.only)
  record = sweeps.Record(
    spec='experiments/bench_small.py',
    assignments=(),
    base=None,  # every cell has its own
    fields=(),
    cells=cells,
    num_seeds=max(options.seeds, _count_seeds(options.workdir, cells)),
    seed_fields=('seed', 'data.seed'),
  )
  num_jobs = options.jobs or min(provenance.num_cores(), _MOST_JOBS)
  make_command = make_command or _make_command

  def start(started):
    provenance.note_start(started.folder, num_jobs=num_jobs)
    return make_command(started)

  runs = [
    run
    for run in sweeps.list_runs(record, options.workdir)
    if run.seed < options.seeds or run.folder.exists()
  ]
  outcome = sweeps.run_all(
    runs,
    start,
    num_jobs=num_jobs,
    environment=_environment(options),
    name='bench-small',
  )
  is_part = options.only or options.quick or outcome.received is not None
  default = options.workdir / 'results' if is_part else _RESULTS
  written = report.write(
    record,
    options.workdir,
    options.results or default,
    runs=[run.name for run in runs],
  )
  verdicts = [verdict.word for verdict in written.gates.values()]
  counts = [f'{verdicts.count(w)} {w}' for w in dict.fromkeys(verdicts)]
  print(f'Gates: {", ".join(counts) or "none of these runs has one"}.')
  print(f'{written.page} has the results.')
  return _say_what_is_left(outcome, options.workdir)


def _count_seeds(workdir: pathlib.Path, cells: Sequence[sweeps.Cell]) -> int:
  """How many seeds the folder has of any cell: they stay on the page."""
  seeds = [
    int(path.name.removeprefix('seed_'))
    for cell in cells
    for path in (workdir / 'cells' / cell.name).glob('seed_*')
  ]
  return max(seeds, default=-1) + 1


def _make_command(started: sweeps.Run) -> list[str]:
  return [
    sys.executable,
    str(_ROOT / 'launch' / 'run.py'),
    f'--config={started.cell.spec}',
    f'--workdir={started.folder}',
    *(f'--set={assignment}' for assignment in started.assignments),
  ]


def _environment(options: Options) -> dict[str, str]:
  """Of the runs; those of a cell share programs, whatever their seed."""
  folder = options.workdir.resolve() / '.compiled'
  environment = {'JAX_COMPILATION_CACHE_DIR': str(folder), **os.environ}
  if options.quick:  # what is run twice need not be compiled well
    fast = '--xla_backend_optimization_level=0'
    flags = [fast, '--xla_llvm_disable_expensive_passes=true']
    flags.append(os.environ.get('XLA_FLAGS', ''))
    environment['XLA_FLAGS'] = ' '.join(flags)
  return environment


def _say_what_is_left(outcome: sweeps.Outcome, workdir: pathlib.Path) -> int:
  """Lists what did not finish; returns the exit code."""
  say = lambda text: print(text, file=sys.stderr)
  if outcome.failures:
    say(
      f'{len(outcome.failures)} runs did not finish; the same command runs '
      'these again:'
    )
    for name, reason in outcome.failures.items():
      say(f'  {workdir}/cells/{name}: {reason}')
  if outcome.received is not None:
    again = shlex.join(['python', *sys.argv])
    say(
      f'{outcome.received.name}: stopped {outcome.num_stopped} runs, and '
      f'{outcome.num_waiting} have not begun; to go on from there: {again}'
    )
    return 128 + outcome.received
  return 1 if outcome.failures else 0
