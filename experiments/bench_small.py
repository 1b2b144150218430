"""Runs the small suite: models of the zoo on generated tasks, with a report.

    make bench-small
    python experiments/bench_small.py --seeds=3
    python experiments/bench_small.py --only=hope,mqar --workdir=runs/try

The same command again runs only what is not finished: interrupted and failed
runs resume. A run with other settings is another run. The page of the whole
suite is written to experiments/results/small, the page of a part of it (--only,
--quick, or interrupted) to --workdir/results, and either to --results if given.

Hardware: two CPU cores, 35 minutes beside other work on the same cores, one
seed.

The exit code is 0 if all runs are finished, also if gates fail; 1, with a line
for each run that failed; 2, with one line, if a flag is wrong.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin()  # before the imports, which take longer

import pathlib

from absl import flags

from launch import programs

_SEEDS = flags.DEFINE_integer(
  'seeds',
  1,
  'Runs of each model and task, with the seeds 0, 1, ...',
  lower_bound=1,
)
_ONLY = flags.DEFINE_list(
  'only',
  [],
  'Families and tasks to run: hope is Hope on all its tasks; hope,mqar and '
  'hope.mqar are Hope on MQAR.',
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
_RESULTS = flags.DEFINE_string('results', None, 'Folder of the page.')


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_run, example='--seeds=3')


def _run() -> int:
  # Importing takes seconds; --help and wrong flags are answered before.
  from experiments.small import running

  programs.check_path('workdir', _WORKDIR.value, folder=True)
  programs.check_path('results', _RESULTS.value, folder=True)
  options = running.Options(
    workdir=pathlib.Path(_WORKDIR.value),
    seeds=_SEEDS.value,
    only=tuple(_ONLY.value),
    quick=_QUICK.value,
    jobs=_JOBS.value,
    results=_RESULTS.value and pathlib.Path(_RESULTS.value),
  )
  return running.run(options)


if __name__ == '__main__':
  main()
