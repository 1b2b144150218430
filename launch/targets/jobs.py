"""What is to run, and what a target makes of it."""

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

from launch.targets import accelerators
from launch.targets import xla_flags
from nested_learning import errors

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a machine far away needs of this tree.
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
  """A command of run.py and where it is to run.

  Attributes:
    name: Lower-case letters, digits and dashes.
    arguments: Of run.py, without --workdir and what is for the launcher.
    config: The experiment, as --config names it, or None.
    workdir: Folder of the run, as --workdir names it.
    size: What follows the colon in --target.
    topology: From --topology, or None.
    env: Environment of the run.
    max_restarts: From --max_restarts, or None.
    image: From --image, or None.
    spot: From --spot.
    zone: From --zone, or None.
    project: From --project, or None.
    queue: From --queue, or None.
    sbatch: From --sbatch.
    dry_run: Whether placeholders may stand for what is not given.
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
  """What a target would do.

  Attributes:
    script: Exactly that, for bash.
    run: Does it and returns the exit code.
    num_processes: Processes of the run.
    num_devices: Devices of all of them together.
    shares_disk: Whether they see the disk of this machine.
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
  """Reads the flags of the launcher.

  Args:
    target: Name of the target.
    size: What follows it.
    arguments: Of run.py, from `user_arguments`.
    config: The flag --config.
    workdir: The flag --workdir.
    dry_run: Whether nothing is started.

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
    # What Kubernetes takes: at most 40 here, since it adds to it.
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
  """The arguments that are not for the launcher, as they were typed.

  Args:
    argv: The command line, without the name of the program.
    also: Names of flags that are left out too.
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
  """The topology of a job, if the target has such machines."""
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


def find_programs(target: str, *programs: str) -> None:
  """Refuses to start what needs a program that is not there."""
  for program in programs:
    if shutil.which(program) is None:
      raise errors.UserError(
        f'--target={target} needs {program}, which is not on PATH; install '
        'it, or add --dry_run to see what would run.'
      )


def run_script(script: str) -> int:
  """Runs a script and returns its exit code, as a shell would say it."""
  code = subprocess.run(['bash', '-c', script]).returncode
  return code if code >= 0 else 128 - code


class Bucket(NamedTuple):
  """Where a workdir on gs:// is, as the machines of the run see it."""

  name: str
  mount: str  # folder that is the bucket
  workdir: str  # folder in it that is the workdir


def bucket_of(target: str, job: Job) -> Bucket:
  """The bucket of a workdir on gs://."""
  match = re.fullmatch(
    r'gs://([A-Za-z0-9][\w.-]*)/([^\s\'"$`\x00-\x1f\x7f]+)',
    job.workdir,
    re.ASCII,
  )
  if not match:
    raise errors.UserError(
      f'--workdir={job.workdir} is not where --target={target} can write; name '
      'a folder in a bucket, --workdir=gs://BUCKET/NAME.'
    )
  mount = f'/gs/{match[1]}'
  return Bucket(match[1], mount, f'{mount}/{match[2].strip("/")}')


def local_command(job: Job) -> list[str]:
  """The command of one process, where this tree and the workdir are at hand."""
  script = str(ROOT / 'launch' / 'run.py')
  return [sys.executable, script, *job.arguments, f'--workdir={job.workdir}']


def remote_arguments(target: str, job: Job) -> list[str]:
  """The arguments of run.py where the tree and the workdir lie elsewhere."""
  workdir = bucket_of(target, job).workdir
  arguments = [*job.arguments, f'--workdir={workdir}']
  if job.config is not None:
    path, colon, argument = job.config.partition(':')
    place = pathlib.Path(path).resolve()
    if not place.is_relative_to(ROOT / 'experiments'):
      raise errors.UserError(
        f'--config={job.config} does not go along to --target={target}, only '
        f'what is in {ROOT / "experiments"}; copy it there.'
      )
    config = f'--config={place.relative_to(ROOT)}{colon}{argument}'
    if config not in arguments:
      arguments.append(config)  # the last one counts
  return arguments


def is_writable(folder: str) -> bool:
  """Whether a folder can be written to, or made."""
  path = pathlib.Path(folder).absolute()
  while not path.exists():
    path = path.parent
  return path.is_dir() and os.access(path, os.W_OK)


def _environment(topology: accelerators.Topology | None) -> dict[str, str]:
  """The XLA flags of the hardware, and what --env says."""
  env = xla_flags.environment(topology) if topology else {}
  for assignment in _ENV.value:
    name, equals, value = assignment.partition('=')
    if not equals or not re.fullmatch('[A-Za-z_][A-Za-z0-9_]*', name):
      raise errors.UserError(f'--env={assignment} is not NAME=VALUE.')
    if name in ('LIBTPU_INIT_ARGS', 'XLA_FLAGS') and name in env:
      value = f'{env[name]} {value}'
    env[name] = value
  return env
