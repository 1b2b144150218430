"""Runs the small suite: models of the zoo on generated tasks, with a page.

    make bench-small
    python experiments/bench_small.py --all
    python experiments/bench_small.py --only=hope,titans,mqar,fuzzy_recall

Each task is a sweep of `experiments/small/suite.py`: all models have the same
steps and number of parameters, all rates are tried with seed 0, and the best
one gets all seeds. By default, four models run on three tasks; --only names
others, and --all takes all.

The same command again runs only what is not finished: interrupted and failed
runs resume, and finished ones are kept beside the pages of the tasks, below
experiments/results/small, from which another --workdir goes on. There the page
has all tasks that were ever run.

Hardware: two CPU cores, about two hours; a day with --all.

The exit code is 0 if all runs are finished and all gates of their models hold;
1, with a line for each run that failed and each gate; 2, with one line, if a
flag is wrong; 128 and more if a signal ended it.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin()  # before the imports, which take longer

import itertools
import pathlib
import shlex
import time

from absl import flags

from launch import programs
from launch import provenance

_SEEDS = flags.DEFINE_integer(
  'seeds', 3, 'Runs of each model at its best rate.', lower_bound=1
)
_ONLY = flags.DEFINE_list(
  'only',
  [],
  'Models and tasks to run: hope,mqar is Hope on MQAR. Without models, the '
  'default ones; without tasks, the default ones.',
)
_ALL = flags.DEFINE_bool(
  'all', False, 'All models and tasks in place of the default ones.'
)
_QUICK = flags.DEFINE_bool(
  'quick', False, 'Two steps of every run, to see that everything works.'
)
_JOBS = flags.DEFINE_integer(
  'jobs',
  None,
  'Runs at a time; by default the number of cores, at most 8.',
  lower_bound=1,
)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/small', 'Folder of the runs.')
_RESULTS = flags.DEFINE_string(
  'results',
  None,
  'Folder of the pages; by default experiments/results/small, and with --quick '
  'WORKDIR/results.',
)
_DEFAULT = 'experiments/results/small'
_MAX_JOBS = 8  # by default; each takes about a gigabyte


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_run, example='--only=hope,parity')


def _run() -> int:
  # Importing takes seconds; --help and wrong flags are answered before.
  from experiments.small import report
  from experiments.small import suite

  programs.check_path('workdir', _WORKDIR.value, folder=True)
  programs.check_path('results', _RESULTS.value, folder=True)
  workdir = pathlib.Path(_WORKDIR.value)
  quick = workdir / 'results' if _QUICK.value else pathlib.Path(_DEFAULT)
  results = pathlib.Path(_RESULTS.value or quick)
  names, families = suite.select(_ONLY.value, everything=_ALL.value)
  todo = list(itertools.product(names, families))
  failed, begin = [], time.monotonic()
  for i, (name, family) in enumerate(todo):
    command = _make_command(name, family, workdir, results)
    command += [f'--set={x}' for x in suite.QUICK] if _QUICK.value else []
    hours = (time.monotonic() - begin) / 3600
    left = f', about {hours / i * (len(todo) - i):.1f} left' if i else ''
    print(
      f'[{i + 1} of {len(todo)}] {shlex.join(["python", *command])}\n'
      f'  {hours:.1f} hours since the start{left}',
      flush=True,
    )
    code = programs.call([sys.executable, *command], _ROOT)
    if code < 0 or code > 128:  # by a signal
      return code if code > 0 else 128 - code
    failed += [f'{family} on {name}: exit code {code}'] if code else []
  verdicts = report.write(_ROOT / results)
  print(f'{results}/{report.PAGE} has the results.')
  for gate, verdict in verdicts.items():
    if verdict.failed and (gate.task, gate.family) in todo:
      failed.append(f'{gate.family} on {gate.task}: the gate does not hold')
  for line in failed:
    print(line, file=sys.stderr)
  return 1 if failed else 0


def _make_command(name, family, workdir, results) -> list[str]:
  """Returns the command of the sweep of a family on a task."""
  num_jobs = _JOBS.value or min(provenance.num_cores(), _MAX_JOBS)
  return [
    'launch/sweep.py',
    f'--config=experiments/small/suite.py:{name}',
    f'--seeds={_SEEDS.value}',
    f'--jobs={num_jobs}',
    f'--workdir={workdir / name}',
    f'--results={results / name}',
    f'--only={family},*',
  ]


if __name__ == '__main__':
  main()
