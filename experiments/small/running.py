"""Runs the small suite and writes its page."""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
import shlex
import sys

from experiments.small import report
from experiments.small import suite
from launch import provenance
from launch import sweeps

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / 'experiments' / 'results' / 'small'
_MAX_JOBS = 8  # by default; each takes about a gigabyte


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of the command, by name."""

  workdir: pathlib.Path  # of the runs
  seeds: int = 1
  only: tuple[str, ...] = ()
  quick: bool = False
  jobs: int | None = None  # runs at a time; None: the cores, at most 8
  results: pathlib.Path | None = None  # folder of the page; None: default


def run(
  options: Options,
  make_command: Callable[[sweeps.Run], Sequence[str]] | None = None,
) -> int:
  """Runs the runs that are not finished and writes the page.

  Args:
    options: The flags.
    make_command: Makes the command of a run; None for the launcher's.

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
    base='',  # every cell has its own
    fields=(),
    cells=cells,
    num_seeds=max(options.seeds, _count_seeds(options.workdir, cells)),
    seed_fields=('seed', 'data.seed'),
  )
  num_jobs = options.jobs or min(provenance.num_cores(), _MAX_JOBS)
  runs = [
    run
    for run in sweeps.list_runs(record, options.workdir)
    if run.seed < options.seeds or run.folder.exists()
  ]
  outcome = sweeps.run_all(
    runs,
    make_command or _make_command,
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
  return _report_failures(outcome, options.workdir)


def _count_seeds(workdir: pathlib.Path, cells: Sequence[sweeps.Cell]) -> int:
  """Returns the most seeds that a cell has in the folder."""
  seeds = [
    int(path.name.removeprefix('seed_'))
    for cell in cells
    for path in (workdir / 'cells' / cell.name).glob('seed_*')
    if path.name.removeprefix('seed_').isdecimal()
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
  """Returns the environment of the runs, which share compiled programs."""
  folder = options.workdir.resolve() / '.compiled'
  environment = {'JAX_COMPILATION_CACHE_DIR': str(folder), **os.environ}
  if options.quick:  # compiling takes longer than two steps do
    fast = '--xla_backend_optimization_level=0'
    flags = [fast, '--xla_llvm_disable_expensive_passes=true']
    flags.append(os.environ.get('XLA_FLAGS', ''))
    environment['XLA_FLAGS'] = ' '.join(flags)
  return environment


def _report_failures(outcome: sweeps.Outcome, workdir: pathlib.Path) -> int:
  """Prints the runs that did not finish; returns the exit code."""
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
