"""Runs the small suite: models of the zoo on generated tasks, with a report.

    make bench-small
    python experiments/bench_small.py --seeds=3
    python experiments/bench_small.py --only=hope,mqar --workdir=runs/try

The same command again runs what is not finished: runs that were interrupted
resume, and so do those that failed. A run whose settings changed is another
run. The whole suite leaves its page in experiments/results/small, a part of it
(--only, --quick, or interrupted) in --workdir/results; --results is a folder
for either.

Hardware: two CPU cores, 35 minutes beside other work on the same cores, one
seed.

Exits with 0 when all runs are finished, whatever the gates say; with 1 and a
line for each run that failed; with 2 and one line when a flag is wrong.
"""

import pathlib
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(_ROOT) not in sys.path:
  sys.path.insert(0, str(_ROOT))  # A checkout runs without being installed.

from launch import startup  # noqa: E402

if __name__ == '__main__':
  startup.begin()

from absl import flags  # noqa: E402

from launch import programs  # noqa: E402

_SEEDS = flags.DEFINE_integer(
  'seeds',
  1,
  'Runs of each model and task, with the seeds 0, 1, ...',
  lower_bound=1,
)
_ONLY = flags.DEFINE_list(
  'only',
  [],
  'Families and tasks to run alone: hope is Hope on all its tasks, hope,mqar '
  'is Hope on MQAR, and so is hope.mqar.',
)
_QUICK = flags.DEFINE_bool(
  'quick', False, 'Two steps of everything: whether it runs, no results.'
)
_JOBS = flags.DEFINE_integer(
  'jobs',
  None,
  'Runs at a time; by default one for each core, at most 8.',
  lower_bound=1,
)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/small', 'Folder of the runs.')
_RESULTS = flags.DEFINE_string('results', None, 'Folder of the page.')


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_run, example='--seeds=3')


def _run() -> int:
  # Here, because it takes seconds: --help and wrong flags are answered at once.
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
