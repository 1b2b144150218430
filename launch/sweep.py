"""Runs an experiment with many settings and seeds, and makes a table.

    python launch/sweep.py --config=experiments/quickstart.py \
      --grid model.mixer.chunk_size=16,64 --grid train.learning_rate=1e-3,4e-3 \
      --seeds=3 --jobs=1 --workdir=runs/chunks
    python launch/sweep.py --config=experiments/ablations/components.py \
      --tune train.learning_rate=1e-3,2e-3,4e-3,8e-3 --seeds=3 \
      --workdir=runs/abl
    python launch/sweep.py --workdir=runs/abl --collect

A cell is one choice of settings. Every cell and seed is a run of launch/run.py
in --workdir/cells/NAME/seed_0. The same command again, or --workdir alone (with
--config for an experiment outside this checkout), runs everything that is not
finished; interrupted and failed runs resume. Rows, values and seeds can be
added; other changes need another --workdir. The finished runs make README.md,
results.csv, summary.json and plots; --collect makes these at any time.
--results=DIR puts them there, with every finished run in runs.json, from which
another --workdir, also on another machine, goes on.

--tune makes the cells that --grid would make, and runs each with seed 0. Of the
cells that differ in its field only, the one with the best first metric then
runs with the other seeds, and has a line in the table. Finished runs of a sweep
that had the field in --grid count.

The exit code is 0 when all runs are finished, 1 with a line for each failed run
if some are not, and otherwise as for launch/run.py (launch/README.md).
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin()  # before the imports, which take longer

from collections.abc import Sequence
import dataclasses
import hashlib
import pathlib
import re
import shlex
import shutil
import subprocess

from absl import flags

from launch import programs
from launch import provenance
from launch import sweeps
from nested_learning import configs
from nested_learning import errors
from nested_learning import files

_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'Experiment file, optionally with an argument; its get_sweep(), if any, '
  'names the cells. Not needed if --workdir holds a sweep.',
)
_GRID = flags.DEFINE_multi_string(
  'grid',
  [],
  'A field and its values, as in --grid model.mixer.chunk_size=16,64. Brackets '
  'or quotes hold a value that has commas, as in (k,v),(k,). Repeatable: the '
  'cells are all combinations.',
)
_TUNE = flags.DEFINE_string(
  'tune',
  None,
  'A field and its values, as for --grid. All are tried with seed 0, and the '
  'best by the first of --metrics gets the other seeds.',
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'Changes a field of all cells, as for launch/run.py. Repeatable.'
)
_SEEDS = flags.DEFINE_integer(
  'seeds', None, 'Runs of each cell, with the seeds 0, 1, ...', lower_bound=1
)
_METRICS = flags.DEFINE_list(
  'metrics',
  [],
  'Keys of summary.json to show, as in loss,score:max; :min or :max says '
  'which value is best if the name does not.',
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the sweep.')
_RESULTS = flags.DEFINE_string(
  'results',
  None,
  'Folder of the tables, plots and finished runs, which are not run again; by '
  'default the tables and plots are in --workdir.',
)
_TARGET = flags.DEFINE_enum(
  'target',
  'local',
  ['local', 'slurm', 'tpu-vm'],
  'Where to run: processes on this machine; an array of Slurm with a task per '
  'run; or a TPU job per run, which a process on this machine starts.',
)
_JOBS = flags.DEFINE_integer(
  'jobs',
  None,
  'Runs at a time; by default 1, under Slurm as many as it allows.',
  lower_bound=1,
)
_SBATCH = flags.DEFINE_multi_string(
  'sbatch',
  [],
  'An option of sbatch, as in --sbatch=--time=4:00:00. Repeatable.',
)
_RUN_FLAG = flags.DEFINE_multi_string(
  'run_flag',
  [],
  'A flag of launch/run.py for every run, as in --run_flag=--topology=v5e:4x4. '
  'Repeatable.',
)
_BUCKET = flags.DEFINE_string(
  'bucket',
  None,
  'tpu-vm: folder of the runs, as in gs://BUCKET/NAME; --workdir holds '
  'everything else.',
)
_ONLY = flags.DEFINE_string(
  'only', '*', "Runs only these cells or runs: a pattern such as 'heads=*'."
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Prints the commands and writes nothing.'
)
_COLLECT = flags.DEFINE_bool(
  'collect', False, 'Only makes the tables and plots of the finished runs.'
)


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_main, example='--config=experiments/quickstart.py')


def _main() -> int:
  if not _WORKDIR.value:
    raise errors.UserError('A sweep needs a folder: --workdir=runs/NAME.')
  on_tpus = _TARGET.value == 'tpu-vm'
  if on_tpus and not re.fullmatch('gs://[^/]+/.+', _BUCKET.value or ''):
    raise errors.UserError(
      '--target=tpu-vm needs a folder in a bucket for the runs: '
      '--bucket=gs://BUCKET/NAME.'
    )
  programs.check_path('workdir', _WORKDIR.value, folder=True)
  programs.check_path('results', _RESULTS.value, folder=True)
  return _run(pathlib.Path(_WORKDIR.value))


def _run(workdir: pathlib.Path) -> int:
  """Plans the sweep, runs the unfinished runs and collects the results."""
  stored = sweeps.load(workdir)
  if _COLLECT.value:
    if stored is None:
      raise errors.UserError(f'{workdir} holds no sweep to collect.')
    if _METRICS.value:
      stored = dataclasses.replace(stored, metrics=tuple(_METRICS.value))
    return _collect(stored, workdir)
  record = _plan(stored)
  _check_named(record)
  _check_folder(record, workdir)
  runs = sweeps.list_runs(record, workdir, only=_ONLY.value)
  due, waiting = sweeps.list_due(record, workdir, runs, only=_ONLY.value)
  left = [run for run in due if not run.finished]
  if _DRY_RUN.value:
    _show(due, left, workdir)
    _report_waiting(waiting)
    return 0
  if record != stored:
    record = sweeps.save(record, workdir)
  if _RESULTS.value:
    every = sweeps.list_runs(record, workdir)
    sweeps.restore(every, pathlib.Path(_RESULTS.value))
    due, waiting = sweeps.list_due(record, workdir, runs, only=_ONLY.value)
    left = [run for run in due if not run.finished]
  if left and _TARGET.value == 'slurm':
    code = _submit(left, workdir)
    _report_waiting(waiting)
    return code
  outcome = _run_here(record, runs, workdir)
  code = _collect(record, workdir)
  return _report(outcome, workdir) or code


def _run_here(record, runs, workdir) -> sweeps.Outcome:
  """Runs the unfinished runs; if a field is tuned, those of seed 0 first."""
  outcome = sweeps.Outcome({}, None, 0, 0)
  started = set()
  while outcome.received is None:
    due, _ = sweeps.list_due(record, workdir, runs, only=_ONLY.value)
    due = [run for run in due if run.name not in started]
    if record.tune:  # which values come next is known after these
      due = [run for run in due if run.seed == 0] or due
    if not due:
      break
    started |= {run.name for run in due}
    more = sweeps.run_all(
      due,
      lambda run: [sys.executable, *_arguments(run)],
      num_jobs=_JOBS.value or 1,
      # The runs of a cell differ only in the seed and share compiled programs.
      environment={
        'JAX_COMPILATION_CACHE_DIR': str(workdir.resolve() / '.compiled'),
        **os.environ,
      },
      fetch=_fetch if _TARGET.value == 'tpu-vm' else None,
    )
    outcome = more._replace(failures=outcome.failures | more.failures)
  return outcome


def _plan(stored: sweeps.Record | None) -> sweeps.Record:
  """Returns the sweep of the flags, added to the one in the folder."""
  spec, assignments = _CONFIG.value, tuple(_SET.value)
  metrics = tuple(_METRICS.value)
  if spec is None:
    if stored is None:
      raise errors.UserError(
        f'No config, and {_WORKDIR.value} holds no sweep: name one, as in '
        '--config=experiments/ablations/components.py.'
      )
    if _GRID.value or _TUNE.value or assignments:
      raise errors.UserError(
        '--grid, --tune and --set need the --config of the sweep.'
      )
    return _plan_again(stored, metrics)
  sweep = sweeps.load_sweep(spec)
  if stored is not None and stored.spec == spec and _is_again(sweep, stored):
    return _plan_again(stored, metrics)
  sweep = dataclasses.replace(
    sweep,
    grid=(*sweep.grid, *_GRID.value),
    tune=_TUNE.value or sweep.tune,
    metrics=metrics or sweep.metrics,
  )
  grid = sweeps.as_grid(sweep, stored.fields if stored else ())
  tune = sweep.tune and sweeps.parse_grid(sweep.tune)[0]
  sweep = dataclasses.replace(sweep, grid=grid, tune='')
  record = sweeps.Record(
    spec=spec,
    assignments=assignments,
    base=_make_base(spec, assignments),
    fields=tuple(sweeps.parse_grid(text)[0] for text in grid),
    cells=sweeps.make_cells(spec, sweep, assignments=assignments),
    num_seeds=_SEEDS.value or (stored.num_seeds if stored else 1),
    seed_fields=sweep.seed_fields,
    metrics=sweep.metrics,
    printed=sweep.printed,
    commands=_command(),
    tune=tune,
    descends=sweep.descends,
  )
  return sweeps.update(record, stored)


def _is_again(sweep: sweeps.Sweep, stored: sweeps.Record) -> bool:
  """Returns whether a call only goes on with the sweep of earlier flags."""
  if _GRID.value or _TUNE.value or _SET.value:
    return False
  ours = {sweeps.parse_grid(text)[0] for text in sweeps.as_grid(sweep)}
  is_plain = not (sweep.rows or ours)
  return is_plain or bool(stored.assignments) or ours < set(stored.fields)


def _plan_again(
  stored: sweeps.Record, metrics: tuple[str, ...]
) -> sweeps.Record:
  """Returns the stored sweep, with the seeds and metrics of the flags."""
  _check_named(stored)
  num_seeds = max(_SEEDS.value or 0, stored.num_seeds)
  record = dataclasses.replace(
    stored,
    base=_make_base(stored.spec, stored.assignments),
    num_seeds=num_seeds,
    metrics=metrics or stored.metrics,
    commands=_command() if num_seeds > stored.num_seeds else (),
  )
  return sweeps.update(record, stored)


def _command() -> tuple[str]:
  return (provenance.shown_command(['launch/sweep.py', *sys.argv[1:]]),)


def _make_base(spec, assignments) -> str:
  return configs.to_json(configs.override(configs.load(spec), assignments))


def _check_named(record: sweeps.Record) -> None:
  """Raises an error if a stored sweep names a file that the user did not.

  sweep.json is data, perhaps somebody else's: no Python file runs because it
  names one, except for the experiments of this checkout.
  """
  ours = os.path.join(_ROOT, 'experiments', '')
  named = _experiment_file(_CONFIG.value or '')
  for spec in (record.spec, *(cell.spec for cell in record.cells)):
    file = _experiment_file(spec)
    if file and file != named and not file.startswith(ours):
      raise errors.UserError(
        f'{_WORKDIR.value} holds a sweep of {spec}, which is not an experiment '
        f'of this checkout; name it too, as in --config={spec}.'
      )


def _check_folder(record: sweeps.Record, workdir: pathlib.Path) -> None:
  """Raises an error if the trainer could keep no checkpoints in the folder.

  Every run would refuse it. Experiments with their own run() may take it, and
  runs on TPUs have their checkpoints in a bucket.
  """
  specs = {cell.spec for cell in record.cells}
  if _TARGET.value != 'tpu-vm' and any(
    configs.load_experiment(spec).run is None for spec in specs
  ):
    # The import takes seconds, which experiments without it do not need.
    from nested_learning.training import checkpoint_files

    checkpoint_files.home(workdir)


def _experiment_file(spec: str) -> str | None:
  """Returns the Python file that a --config names, if any."""
  match = re.match(r'(.*?\.py)(?:[:@]|$)', spec, re.DOTALL)
  return match and os.path.realpath(match[1])


def _arguments(run: sweeps.Run) -> list[str]:
  """Returns the command of a run, without the Python in front."""
  path = pathlib.Path(_ROOT, 'launch', 'run.py')
  if pathlib.Path.cwd() == pathlib.Path(_ROOT):
    path = path.relative_to(_ROOT)
  where, target = str(run.folder), []
  if _TARGET.value == 'tpu-vm':
    where = _remote_folder(run)
    target = ['--target=tpu-vm', f'--name={_job_name(where)}']
  return [
    str(path),
    f'--config={run.cell.spec}',
    f'--workdir={where}',
    *(f'--set={assignment}' for assignment in run.assignments),
    *target,
    *_RUN_FLAG.value,
  ]


def _remote_folder(run: sweeps.Run) -> str:
  """Returns the workdir of a run on TPUs."""
  return f'{_BUCKET.value.rstrip("/")}/cells/{run.name}'


def _job_name(folder: str) -> str:
  """Returns a unique name for the job of a run: letters, digits, dashes."""
  words = re.sub('[^a-z0-9]+', '-', folder.removeprefix('gs://').lower())
  number = hashlib.sha1(folder.encode()).hexdigest()[:8]
  return f'sweep-{words.strip("-")[-24:].strip("-")}-{number}'


def _fetch(run: sweeps.Run) -> None:
  """Copies the summary of a run from its bucket."""
  source = f'{_remote_folder(run)}/summary.json'
  command = ['gcloud', 'storage', 'cp', source, _argument(run.folder)]
  subprocess.run(command, capture_output=True, check=False)


def _argument(path: pathlib.Path) -> str:
  """Returns a path that no program takes for a flag."""
  return f'./{path}' if str(path).startswith('-') else str(path)


def _show(runs, left, workdir) -> None:
  """Prints the commands of a dry run."""
  if _TARGET.value == 'slurm' and left:
    print(_make_script(left, workdir), end='')
  else:
    for run in left:
      print(shlex.join(['python', *_arguments(run)]))
  finished = len(runs) - len(left)
  print(f'# {len(left)} runs; {finished} more are finished.', file=sys.stderr)


def _make_script(left, workdir) -> str:
  # The experiment without the argument of a row: cells have their own.
  spec = _CONFIG.value or sweeps.load(workdir).spec
  return sweeps.make_array_script(
    [run.name for run in left],
    [
      sys.executable,
      str(pathlib.Path(__file__).resolve()),
      f'--workdir={workdir}',
      f'--config={spec}',
      *(f'--run_flag={flag}' for flag in _RUN_FLAG.value),
    ],
    folder=os.getcwd(),
    logs=str(workdir / 'slurm'),
    options=_SBATCH.value,
    num_jobs=_JOBS.value,
  )


def _submit(left, workdir) -> int:
  """Writes the script of the array and submits it to Slurm."""
  path = workdir / 'slurm.sh'
  # Readable by its owner only: --run_flag=--env=... may hold a password.
  files.write_whole(path, _make_script(left, workdir), mode=0o600)
  (workdir / 'slurm').mkdir(exist_ok=True)  # for the logs of the tasks
  if shutil.which('sbatch') is None:
    raise errors.UserError(
      f'sbatch is not on PATH to start {len(left)} runs; on a machine that has '
      f'it: sbatch {shlex.quote(_argument(path))}.'
    )
  return subprocess.run(['sbatch', _argument(path)], check=False).returncode


def _report_waiting(waiting: Sequence[str]) -> None:
  """Prints how many searches have not found their best value yet."""
  if waiting:
    programs.print_error(
      f'{len(waiting)} best values are not known yet; the same command tries '
      'further values, and then runs the other seeds.'
    )


def _collect(record: sweeps.Record, workdir: pathlib.Path) -> int:
  """Writes the tables; prints where they are and what they lack."""
  folder = pathlib.Path(_RESULTS.value or workdir)
  for warning in sweeps.collect(record, workdir, folder):
    programs.print_error(warning)
  if _RESULTS.value:
    sweeps.keep(sweeps.list_runs(record, workdir), folder)
  print(f'{folder}/README.md has the results.')
  return 0


def _report(outcome: sweeps.Outcome, workdir: pathlib.Path) -> int:
  """Prints the runs that did not finish; returns the exit code."""
  if outcome.failures:
    programs.print_error(
      f'{len(outcome.failures)} runs did not finish; the same command runs '
      'these again:'
    )
    for name, reason in outcome.failures.items():
      print(f'  {workdir}/cells/{name}: {reason}', file=sys.stderr)
  if outcome.received is not None:
    again = ['python', 'launch/sweep.py', f'--workdir={workdir}']
    if _CONFIG.value:
      again.append(f'--config={_CONFIG.value}')
    again = shlex.join(again)
    programs.print_error(
      f'{outcome.received.name}: stopped {outcome.num_stopped} runs, and '
      f'{outcome.num_waiting} have not begun; to go on from there: {again}'
    )
    return 128 + outcome.received
  return 1 if outcome.failures else 0


if __name__ == '__main__':
  main()
