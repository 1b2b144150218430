"""The script of a Slurm array: one task for each run of a sweep."""

from collections.abc import Sequence

from launch import scripts
from nested_learning import errors

_SECONDS = 300  # before the time limit, for a run to save


def make_array_script(
  names: Sequence[str],
  command: Sequence[str],
  *,
  folder: str,
  logs: str,
  options: Sequence[str] = (),
  num_jobs: int | None = None,
) -> str:
  """Returns the script, for sbatch.

  Each task runs `command --only=NAME`. It gets SIGTERM five minutes before its
  time is over; submitted again, finished runs end at once and others resume.

  Args:
    names: Of the runs.
    command: What runs one of them.
    folder: Where the command runs.
    logs: Folder of what Slurm itself reports, from there.
    options: Of sbatch, as in `--time=4:00:00`; they come before those of the
      script, which they cannot change.
    num_jobs: Most tasks at a time; None leaves that to Slurm.

  Returns:
    A bash script.

  Raises:
    errors.UserError: An option does not begin with a dash, or is --array.
  """
  for option in options:
    if option.startswith('--array'):
      raise errors.UserError(
        f'--sbatch={option} is no option that an array of runs can have; leave '
        'it out.'
      )
  at_once = f'%{num_jobs}' if num_jobs else ''
  directives = [
    '--job-name=sweep',
    *options,
    f'--array=0-{len(names) - 1}{at_once}',
    f'--signal=B:TERM@{_SECONDS}',
    '--requeue',
    '--open-mode=append',
  ]
  lines = [
    '#!/bin/bash',
    *map(scripts.directive, directives),
    scripts.log_directive(logs, 'slurm_%A_%a.txt'),
    '',
    f'cd {scripts.quote(folder)} || exit 1',
    'runs=(',
    *(f'  {scripts.quote(name)}' for name in names),
    ')',
    # exec: the signal is for the shell, and the command takes its place.
    f'exec {scripts.join(command)} "--only=${{runs[$SLURM_ARRAY_TASK_ID]}}"',
  ]
  return '\n'.join(lines) + '\n'
