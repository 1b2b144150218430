"""Jobs and plans: the input and the output of a target."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

from absl import flags

from launch.targets import xla_flags
from nested_learning import accelerators
from nested_learning import errors

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The files of this tree that a remote machine needs.
TREE = (
  'nested_learning',
  'launch',
  'experiments',
  'setup.cfg',
  'pyproject.toml',
  'constraints.txt',
  'README.md',
  'LICENSE',
)

_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'Slice or nodes, as in v5e:16x16, v5p:4x8x8*2 (two slices), h100:4x8.',
)
_IMAGE = flags.DEFINE_string(
  'image', None, 'gke: name under which the image of this tree is pushed.'
)
_NAME = flags.DEFINE_string(
  'name', None, 'Name of the job; by default that of the workdir.'
)
_ENV = flags.DEFINE_multi_string(
  'env', [], 'Environment of the run, as in --env=NAME=VALUE. Repeatable.'
)
_MAX_RESTARTS = flags.DEFINE_integer(
  'max_restarts',
  None,
  'How often to start again after a failure that another attempt may mend; by '
  'default 10, and 0 for local-procs.',
)
_SPOT = flags.DEFINE_bool(
  'spot', False, 'tpu-vm, gke: machines that may be taken away at any time.'
)
_ZONE = flags.DEFINE_string('zone', None, "tpu-vm: zone; gcloud's by default.")
_PROJECT = flags.DEFINE_string(
  'project', None, "tpu-vm: project; gcloud's by default."
)
_QUEUE = flags.DEFINE_string('queue', None, 'gke: the local queue of Kueue.')
_SBATCH = flags.DEFINE_multi_string(
  'sbatch', [], 'slurm: option for sbatch, as in --sbatch=--partition=gpu.'
)


@dataclasses.dataclass(frozen=True)
class Job:
  """A command of run.py, and the flags that say where it runs.

  Attributes:
    name: Name of the job: lower-case letters, digits and dashes.
    arguments: Arguments of run.py, without --workdir and the launcher's flags.
    config: --config, or None.
    workdir: --workdir.
    size: The text after the colon in --target.
    topology: --topology, or None.
    env: Environment of the run.
    max_restarts: --max_restarts, or None.
    image: --image, or None.
    spot: --spot.
    zone: --zone, or None.
    project: --project, or None.
    queue: --queue, or None.
    sbatch: --sbatch.
    dry_run: Whether placeholders may stand for missing flags.
  """

  name: str
  arguments: tuple[str, ...]
  config: str | None
  workdir: str
  size: str = ''
  topology: accelerators.Topology | None = None
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)
  max_restarts: int | None = None
  image: str | None = None
  spot: bool = False
  zone: str | None = None
  project: str | None = None
  queue: str | None = None
  sbatch: tuple[str, ...] = ()
  dry_run: bool = False


class Plan(NamedTuple):
  """The plan of a target for a job.

  Attributes:
    script: A bash script of exactly what `run` does.
    run: Runs the job and returns its exit code.
    num_processes: Number of processes of the run.
    num_devices: Number of devices of all processes together.
    shares_disk: Whether the processes see the disk of this machine.
  """

  script: str
  run: Callable[[], int]
  num_processes: int
  num_devices: int
  shares_disk: bool


def make_job(
  target: str,
  size: str,
  arguments: Sequence[str],
  *,
  config: str | None,
  workdir: str | None,
  dry_run: bool,
) -> Job:
  """Makes a job from the launcher's flags.

  Args:
    target: Name of the target.
    size: Size of the target, from `targets.find`.
    arguments: Arguments of run.py, from `user_arguments`.
    config: The flag --config.
    workdir: The flag --workdir.
    dry_run: Whether nothing will be started.

  Raises:
    errors.UserError: A flag is wrong or missing.
  """
  if _MAX_RESTARTS.value is not None and _MAX_RESTARTS.value < 0:
    raise errors.UserError(
      f'--max_restarts={_MAX_RESTARTS.value} must be at least 0.'
    )
  topology = None
  if _TOPOLOGY.value is not None:
    topology = accelerators.find(_TOPOLOGY.value)
  experiment = re.sub(r'\.\w+(:|$)', '-', config or 'run').rstrip('-')
  name = _NAME.value or pathlib.PurePath(workdir or experiment).name
  if workdir is None:
    if not dry_run:
      raise errors.UserError(
        f'--target={target} needs a folder for the run: --workdir='
        + ('gs://BUCKET/NAME.' if target in ('gke', 'tpu-vm') else 'runs/NAME.')
      )
    remote = target in ('gke', 'tpu-vm')
    workdir = ('gs://BUCKET/' if remote else 'runs/') + name
  return Job(
    # Kubernetes takes 63 letters, and appends some of its own.
    name=re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:40] or 'run',
    arguments=tuple(arguments),
    config=config,
    workdir=workdir,
    size=size,
    topology=topology,
    env=_environment(topology),
    max_restarts=_MAX_RESTARTS.value,
    image=_IMAGE.value,
    spot=_SPOT.value,
    zone=_ZONE.value,
    project=_PROJECT.value,
    queue=_QUEUE.value,
    sbatch=tuple(_SBATCH.value),
    dry_run=dry_run,
  )


def user_arguments(
  argv: Sequence[str], also: Sequence[str] = ()
) -> tuple[str, ...]:
  """Returns the arguments that are not flags of the launcher, as typed.

  Args:
    argv: The command line, without the name of the program.
    also: Names of more flags to leave out.
  """
  ours = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[__name__]}
  ours |= set(also)
  kept, position = [], 0
  while position < len(argv):
    argument = argv[position]
    name, equals, _ = argument.lstrip('-').partition('=')
    bare = name.removeprefix('no') if name not in ours else name
    if argument.startswith('-') and bare in ours:
      takes_next = not equals and not flags.FLAGS[bare].boolean
      position += 2 if takes_next else 1
      continue
    kept.append(argument)
    position += 1
  return tuple(kept)


def needs(target: str, job: Job, kind: str) -> accelerators.Topology:
  """Returns the topology of a job; raises if it does not fit the target."""
  example = {'tpu': 'v5e:4x4', 'gpu': 'h100:2x8'}[kind]
  if job.topology is None:
    raise errors.UserError(
      f'--target={target} needs --topology, for instance {example}.'
    )
  if job.topology.generation.kind != kind:
    raise errors.UserError(
      f'--target={target} runs on {kind.upper()}s, and --topology='
      f'{job.topology} is none; choose for instance {example}.'
    )
  return job.topology


def plan_script(
  target: str,
  script: str,
  topology: accelerators.Topology,
  programs: Sequence[str],
  *,
  shares_disk: bool = False,
) -> Plan:
  """Plans a script; a signal that ends it gives exit code 128 plus its number.

  Args:
    target: Name of the target.
    script: The script.
    topology: Processes and devices.
    programs: Programs that have to be on PATH.
    shares_disk: See `Plan`.
  """

  def run() -> int:
    for program in programs:
      if shutil.which(program) is None:
        raise errors.UserError(
          f'--target={target} needs {program}, which is not on PATH; install '
          'it, or add --dry_run to see what would run.'
        )
    code = subprocess.run(['bash', '-c', script]).returncode
    return code if code >= 0 else 128 - code

  return Plan(
    script, run, topology.num_processes, topology.num_devices, shares_disk
  )


class Bucket(NamedTuple):
  """The bucket of a workdir, as the machines of the run see it."""

  name: str
  mount: str  # folder where it is mounted
  workdir: str  # the workdir, below the mount


def bucket_of(target: str, job: Job) -> Bucket:
  """Returns the bucket of a workdir on gs://."""
  match = re.fullmatch(
    r'gs://([A-Za-z0-9][\w.-]*)/([^\s\'"$`\x00-\x1f\x7f]+)',
    job.workdir,
    re.ASCII,
  )
  if not match:
    raise errors.UserError(
      f'--target={target} cannot write to --workdir={job.workdir}; name a '
      'folder in a bucket, --workdir=gs://BUCKET/NAME.'
    )
  mount = f'/gs/{match[1]}'
  return Bucket(match[1], mount, f'{mount}/{match[2].strip("/")}')


def local_command(job: Job) -> list[str]:
  """Returns the command of a process that sees this tree and the workdir."""
  script = str(ROOT / 'launch' / 'run.py')
  return [sys.executable, script, *job.arguments, f'--workdir={job.workdir}']


def remote_arguments(target: str, job: Job) -> list[str]:
  """Returns the arguments of run.py on a machine with a copy of this tree."""
  workdir = bucket_of(target, job).workdir
  arguments = [*job.arguments, f'--workdir={workdir}']
  if job.config is not None:
    path, colon, argument = job.config.partition(':')
    place = pathlib.Path(path).resolve()
    if not place.is_relative_to(ROOT / 'experiments'):
      raise errors.UserError(
        f'--config={job.config} does not go along to --target={target}; copy '
        f'it to {ROOT / "experiments"}, which does.'
      )
    config = f'--config={place.relative_to(ROOT)}{colon}{argument}'
    if config not in arguments:
      arguments.append(config)  # the last of several flags counts
  return arguments


def is_writable(folder: str) -> bool:
  """Returns whether a folder is writable, or can be made."""
  path = pathlib.Path(folder).absolute()
  while not path.exists():
    path = path.parent
  return path.is_dir() and os.access(path, os.W_OK)


def _environment(topology: accelerators.Topology | None) -> dict[str, str]:
  """Returns the XLA flags of the hardware and the variables of --env."""
  env = xla_flags.environment(topology) if topology else {}
  for assignment in _ENV.value:
    name, equals, value = assignment.partition('=')
    if not equals or not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', name):
      raise errors.UserError(f'--env={assignment} is not NAME=VALUE.')
    if name in ('LIBTPU_INIT_ARGS', 'XLA_FLAGS') and name in env:
      value = f'{env[name]} {value}'
    env[name] = value
  return env
