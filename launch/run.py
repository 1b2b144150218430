"""Runs an experiment.

    python launch/run.py --config=experiments/quickstart.py --workdir=runs/q
    python launch/run.py --workdir=runs/q --mode=generate --prompt='def main('
    python launch/run.py --config=runs/q/config.json --workdir=runs/again
    python launch/run.py --workdir=runs/q --mode=session \
      --session=runs/me.session --feed=FILE --prompt='def '

The same command again resumes an interrupted run. --target says where it runs:
in this process, in several, on TPUs or under Slurm; with --dry_run it prints
what would run there. The exit code is 0 when the run is done; 2, with one line
on stderr, when a flag, a config or a file is wrong; 128 plus the number of the
signal that ended it; 42, with a traceback, when anything else failed.
"""

import contextlib
import dataclasses
import pathlib
import shlex
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(_ROOT) not in sys.path:
  sys.path.insert(0, str(_ROOT))  # A checkout runs without being installed.

from launch import startup  # noqa: E402

if __name__ == '__main__':
  startup.begin(huge_pages=True)

# JAX is imported with the config: --help and a wrong flag are answered at once.
from absl import flags  # noqa: E402

from launch import programs  # noqa: E402
from launch import targets  # noqa: E402
from launch import workdirs  # noqa: E402
from launch.targets import accelerators  # noqa: E402
from nested_learning import configs  # noqa: E402
from nested_learning import distributed  # noqa: E402
from nested_learning import errors  # noqa: E402

_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'Experiment file, optionally with an argument (experiments/x.py:arg), or the '
  'config.json of a run (FILE.py@runs/a/config.json if an experiment outside '
  'of this checkout made it). May be left out where --workdir holds a run.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder that the run writes to, and resumes from.'
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'A field to change, as in --set=train.num_steps=50. Repeatable.'
)
_MODE = flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'eval', 'generate', 'session', 'describe', 'compile', 'inspect'],
  'train; eval or generate from the last checkpoint in --workdir; hold a '
  'session with it, which learns from what it is fed; describe '
  'the model and what it costs, without training; compile its steps for '
  '--topology, which need not be there; or inspect the checkpoints in '
  '--workdir: what is in them, and whether it is what was saved.',
)
_SUGGEST = flags.DEFINE_bool(
  'suggest',
  False,
  '--mode=compile: find a mesh and a number of micro-batches that fit.',
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'Short for --set=generate.prompt=..., or session.prompt.'
)
_SESSION = flags.DEFINE_string(
  'session',
  None,
  'File of a session, for --mode=session; begun where there is none.',
)
_FEED = flags.DEFINE_multi_string(
  'feed', [], 'A file of text that the session reads. Repeatable.'
)
_TARGET = flags.DEFINE_string(
  'target',
  'local',
  'Where to run: local (this process, joined to others by the cluster or the '
  'flags below), local-procs:N or local-procs:NxM (N processes of M CPU '
  'devices on this machine), tpu-vm, gke, slurm.',
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Print what --target would run, as a script; start nothing.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'Host and port of process 0; found in the environment by default.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes; likewise.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0; likewise.', lower_bound=0
)
_HEARTBEAT = flags.DEFINE_integer(
  'heartbeat_timeout',
  60,
  'Seconds of silence after which a process counts as lost; all others end.',
  lower_bound=10,
)
_HANG = flags.DEFINE_integer(
  'hang_timeout',
  1800,
  'Seconds without progress after which one of several processes dumps its '
  'stacks and ends; more than compilation, an evaluation and a save take.',
  lower_bound=10,
)


def main() -> None:
  """Parses the flags and runs."""
  programs.start(_run, example='--config=experiments/quickstart.py')


def _run() -> int | None:
  """Loads the config, checks the workdir and hands over to the run."""
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
      'slurm; --target=local takes the devices that this machine has.'
    )
  if _DRY_RUN.value:
    print(shlex.join([sys.executable, *sys.argv]))
    return 0
  workdir = workdirs.local(_WORKDIR.value)
  if workdir is None and mode != 'describe':
    raise errors.UserError(
      f'--mode={mode} needs a folder for the run: --workdir=runs/NAME.'
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
  distributed.check_alike(configs.to_json(config, experiment.module))
  with contextlib.ExitStack() as held:

    def prepare():
      if mode == 'train':  # the other modes read the run
        held.enter_context(workdirs.lock(workdir))
      return _prepare(experiment, workdir)

    finished = distributed.first_does('workdir', prepare)
    if finished:
      if distributed.is_first():
        print(finished)
      return 0
    if run is None:
      from nested_learning import training

      run = training.run
    return run(config, workdir and str(workdir), mode)


def _compile(workdir: pathlib.Path) -> int:
  """Compiles for machines that need not be there; 1 where it does not fit."""
  if flags.FLAGS.topology is None:
    raise errors.UserError(
      '--mode=compile needs --topology, for instance v5e:4x4 or h100:1x8.'
    )
  topology = accelerators.find(flags.FLAGS.topology)
  experiment = _load(workdir)
  if experiment.run is not None:
    raise errors.UserError(
      f'--config={_CONFIG.value} runs by itself, and has no training step to '
      'compile.'
    )
  from nested_learning import compilation
  from nested_learning.training import ahead_of_time

  pod = compilation.Pod(
    topology.generation.name, topology.shape, topology.num_slices
  )
  summary = ahead_of_time.run(
    experiment.config, pod, workdir, suggest=_SUGGEST.value
  )
  return 0 if summary['fits'] else 1


def _inspect(workdir: pathlib.Path) -> int:
  """Prints what is in a run's checkpoints; 1 where one is damaged."""
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
  """Starts the run somewhere else, or says what would be started."""
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
  """Refuses a mesh that the machines do not have, before asking for them."""
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
  """Loads the config that the flags name, with the changes of --set."""
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
  """The config with --session, --feed and --prompt, to the letter."""
  session = getattr(config, 'session', None)
  if session is None:
    raise errors.UserError(
      '--mode=session needs a language model, which this experiment is not.'
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
