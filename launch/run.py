"""Runs an experiment.

    python launch/run.py --config=experiments/quickstart.py --workdir=runs/q
    python launch/run.py --workdir=runs/q --mode=generate --prompt='def main('
    python launch/run.py --config=runs/q/config.json --workdir=runs/again
    python launch/run.py --workdir=runs/q --mode=session \
      --session=runs/me.session --feed=FILE --prompt='def '

The same command again resumes an interrupted run. --target selects where it
runs: in this process, in several, on TPUs or under Slurm; --dry_run prints the
script instead. launch/README.md describes targets, flags and exit codes.
"""

import os
import sys

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _ROOT not in sys.path:
  sys.path.insert(0, _ROOT)  # A checkout runs without being installed.

from launch import startup

if __name__ == '__main__':
  startup.begin(huge_pages=True)  # before the imports, which take longer

import contextlib
import dataclasses
import pathlib
import shlex

# JAX is imported with the config, so that --help and wrong flags are quick.
from absl import flags

from launch import programs
from launch import targets
from launch import workdirs
from nested_learning import accelerators
from nested_learning import configs
from nested_learning import distributed
from nested_learning import errors

_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'Experiment file, optionally with an argument (experiments/x.py:arg), or the '
  'config.json of a run (FILE.py@runs/a/config.json if an experiment outside '
  'of this checkout made it). May be left out where --workdir holds a run.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; a run in it is resumed.'
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'Changes a field, as in --set=train.num_steps=50. Repeatable.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'eval', 'generate', 'session', 'describe', 'compile', 'inspect'],
  'train; eval or generate: use the last checkpoint in --workdir; session: '
  'the same, with levels that learn from --feed; describe: print sizes and '
  'costs of the model; compile: compile its steps for a --topology that need '
  'not exist here; inspect: list the checkpoints in --workdir and check them.',
)
_SUGGEST = flags.DEFINE_bool(
  'suggest',
  False,
  '--mode=compile: search a mesh and a number of micro-batches that fit.',
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'Sets generate.prompt, or session.prompt.'
)
_SESSION = flags.DEFINE_string(
  'session',
  None,
  '--mode=session: file of the session; a new one is begun if it is missing.',
)
_FEED = flags.DEFINE_multi_string(
  'feed', [], '--mode=session: a file of text to read. Repeatable.'
)
_TARGET = flags.DEFINE_string(
  'target',
  'local',
  'Where to run: local (this process, which may be one of several, as the '
  'cluster or the flags below say), local-procs:N or local-procs:NxM (N '
  'processes of M CPU devices on this machine), tpu-vm, gke, slurm.',
)
_PROFILE = flags.DEFINE_string(
  'profile',
  None,
  '--mode=train: START:STOP, the first and the last step to profile; the '
  "profile goes to WORKDIR/profile, for TensorBoard's plugin xprof.",
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Prints the script of --target and starts nothing.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'Host and port of process 0; by default from the environment.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes',
  None,
  'Number of processes; by default from the environment.',
  lower_bound=1,
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id',
  None,
  'Index of this process, from 0; by default from the environment.',
  lower_bound=0,
)
_HEARTBEAT = flags.DEFINE_integer(
  'heartbeat_timeout',
  60,
  'Seconds of silence after which a process is lost and all others end.',
  lower_bound=10,
)
_HANG = flags.DEFINE_integer(
  'hang_timeout',
  1800,
  'Seconds without progress after which one of several processes prints its '
  'stacks and ends; longer than compilation, an evaluation or a save.',
  lower_bound=10,
)


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_run, example='--config=experiments/quickstart.py')


def _run() -> int | None:
  """Loads the config, checks the workdir and calls the run."""
  mode = _MODE.value
  programs.check_path('workdir', _WORKDIR.value, folder=True)
  programs.check_path('session', _SESSION.value)
  if _CONFIG.value is not None:
    programs.check_path('config', _CONFIG.value.partition('.py:')[0])
  target, size = targets.find(_TARGET.value)
  if target != 'local':
    return _launch(target, size)
  if flags.FLAGS.topology is not None and mode != 'compile':
    raise errors.UserError(
      f'--topology={flags.FLAGS.topology} is for --target=tpu-vm, gke and '
      'slurm; --target=local uses the devices of this machine.'
    )
  if _DRY_RUN.value:
    print(shlex.join([sys.executable, *sys.argv]))
    return 0
  workdir = workdirs.local(_WORKDIR.value)
  if workdir is None and mode != 'describe':
    raise errors.UserError(
      f'--mode={mode} needs a folder for the run: --workdir=runs/NAME.'
    )
  if _PROFILE.value is not None and mode != 'train':
    raise errors.UserError(
      f'--profile={_PROFILE.value} is for --mode=train, not {mode}.'
    )
  if mode == 'compile':
    return _compile(workdir)
  if mode == 'inspect':
    return _inspect(workdir)
  if mode != 'describe':
    distributed.initialize(
      coordinator_address=_COORDINATOR.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
      heartbeat_seconds=_HEARTBEAT.value,
      hang_seconds=_HANG.value,
    )
  experiment = _load(workdir)
  config, run = experiment.config, experiment.run
  if _PROFILE.value is not None and run is not None:
    raise errors.UserError(
      f'--profile={_PROFILE.value} is for experiments of the trainer, and '
      f'--config={_CONFIG.value} has its own run().'
    )
  distributed.check_alike(configs.to_json(config, experiment.module))
  with contextlib.ExitStack() as held:

    def prepare():
      if mode == 'train':  # the other modes read the run
        held.enter_context(workdirs.lock(workdir))
        held.enter_context(workdirs.beginning(workdir))
      return _prepare(experiment, workdir)

    finished = distributed.first_does('workdir', prepare)
    if finished:
      if distributed.is_first():
        print(finished)
      return 0
    if run is None:
      from nested_learning import training

      run = training.run
    options = {} if _PROFILE.value is None else {'profile': _PROFILE.value}
    return run(config, workdir and str(workdir), mode, **options)


def _compile(workdir: pathlib.Path) -> int:
  """Compiles for --topology; returns 1 if the step does not fit."""
  if flags.FLAGS.topology is None:
    raise errors.UserError(
      '--mode=compile needs --topology, for instance v5e:4x4 or h100:1x8.'
    )
  topology = accelerators.find(flags.FLAGS.topology)
  experiment = _load(workdir)
  if experiment.run is not None:
    raise errors.UserError(
      f'--config={_CONFIG.value} has its own run() and no training step to '
      'compile; name an experiment of the trainer.'
    )
  from nested_learning import planning

  summary = planning.run(
    experiment.config, topology, workdir, suggest=_SUGGEST.value
  )
  return 0 if summary['fits'] else 1


def _inspect(workdir: pathlib.Path) -> int:
  """Lists the checkpoints of a run; returns 1 if one is damaged."""
  from nested_learning import training

  inspection = training.inspect(workdir)
  print(inspection.text)
  return 1 if inspection.damaged else 0


def _prepare(experiment, workdir: pathlib.Path | None) -> str | None:
  return workdirs.prepare(
    experiment,
    workdir,
    mode=_MODE.value,
    has_config=_CONFIG.value is not None,
  )


def _launch(target: str, size: str) -> int:
  """Starts the run on a target, or prints the script."""
  job = targets.make_job(
    target,
    size,
    targets.user_arguments(sys.argv[1:], ['target', 'dry_run', 'workdir']),
    config=_CONFIG.value,
    workdir=_WORKDIR.value,
    dry_run=_DRY_RUN.value,
  )
  plan = targets.TARGETS[target](job)
  workdir = pathlib.Path(job.workdir) if plan.shares_disk else None
  experiment = _load(workdir)
  _check_fits(experiment.config, plan)
  if _DRY_RUN.value:
    print(plan.script, end='')
    return 0
  if workdir is not None:
    if target == 'local-procs':  # Slurm may queue several after each other
      with workdirs.lock(workdir):  # process 0 takes it, at every attempt
        pass
    finished = _prepare(experiment, workdir)
    if finished:
      print(finished)
      return 0
  return plan.run()


def _check_fits(config, plan: targets.Plan) -> None:
  """Checks the mesh against the machines before asking for them."""
  mesh = getattr(config, 'mesh', None)
  if mesh is not None:
    from nested_learning import sharding

    sharding.mesh_shape(
      mesh,
      num_devices=plan.num_devices,
      num_processes=plan.num_processes,
      num_rows=getattr(config, 'micro_batch_size', None),
    )


def _load(workdir: pathlib.Path | None) -> configs.Experiment:
  """Loads the config of the flags, with the changes of --set."""
  spec = _CONFIG.value
  if spec is None:
    if workdir is None or not (workdir / 'config.json').is_file():
      place = f' ({workdir} holds no run)' if workdir else ''
      raise errors.UserError(
        f'No config{place}: name one, as in --config=experiments/quickstart.py.'
      )
    spec = str(workdir / 'config.json')
  experiment = configs.load_experiment(spec)
  assignments = list(_SET.value)
  in_session = _MODE.value == 'session'
  if not in_session and (_SESSION.value is not None or _FEED.value):
    raise errors.UserError(
      f'--session and --feed are for --mode=session, not {_MODE.value}.'
    )
  if _PROMPT.value is not None and not in_session:
    assignments.append(f'generate.prompt={_PROMPT.value}')
  config = configs.override(experiment.config, assignments)
  if in_session:
    config = _set_session(config)
  return experiment._replace(config=config)


def _set_session(config):
  """Returns the config with --session, --feed and --prompt."""
  session = getattr(config, 'session', None)
  if session is None:
    raise errors.UserError(
      '--mode=session needs the experiment of a language model.'
    )
  changes = {
    'path': _SESSION.value,
    'feed': tuple(_FEED.value) or None,
    'prompt': _PROMPT.value,
  }
  changes = {k: v for k, v in changes.items() if v is not None}
  session = dataclasses.replace(session, **changes)
  return dataclasses.replace(config, session=session)


if __name__ == '__main__':
  main()
