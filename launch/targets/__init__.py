"""Targets: the places where a run can run.

A target is a function from a `Job` to a `Plan`, which has a shell script of
exactly what would run and a function that runs it. No target imports JAX.
"""

from collections.abc import Callable, Mapping
import difflib

from launch.targets import gke
from launch.targets import local_procs
from launch.targets import slurm
from launch.targets import tpu_vm
from launch.targets.jobs import Job as Job
from launch.targets.jobs import make_job as make_job
from launch.targets.jobs import Plan as Plan
from launch.targets.jobs import user_arguments as user_arguments
from nested_learning import errors

TARGETS: Mapping[str, Callable[[Job], Plan]] = {
  'local-procs': local_procs.plan,
  'tpu-vm': tpu_vm.plan,
  'gke': gke.plan,
  'slurm': slurm.plan,
}


def find(spec: str) -> tuple[str, str]:
  """Splits --target into the name of a target and its size.

  Args:
    spec: The flag --target, for instance 'local-procs:4x2'.

  Returns:
    Name and size; the size is '' if there is none. The name may be 'local',
    which is this process and not in `TARGETS`.

  Raises:
    errors.UserError: There is no such target, or it takes no size.
  """
  name, _, size = spec.partition(':')
  names = ['local', *TARGETS]
  if name not in names:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
    raise errors.UserError(
      f'--target={spec}: there is no such target; the nearest is {nearest}. '
      f'There are {", ".join(names)}.'
    )
  if size and name != 'local-procs':
    raise errors.UserError(
      f'--target={spec}: {name} takes no size; its size is --topology.'
    )
  return name, size
