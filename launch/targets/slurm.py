"""GPUs under Slurm: one sbatch script, one process per GPU.

The nodes share a disk with this machine and run this tree with this Python. A
job that is preempted, loses a node or reaches its time limit is queued again
and resumes from its last checkpoint.
"""

import os
import pathlib

from launch import scripts
from launch.targets import jobs
from nested_learning import errors

_TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
{log}
#SBATCH --open-mode=append
#SBATCH --requeue
# The processes get SIGTERM, and save, this long before the time limit.
#SBATCH --signal=TERM@300
{options}cd {folder}
{exports}
# Every task sees all GPUs of its node and takes the one with its number.
srun --kill-on-bad-exit=1 --export=ALL {command}
code=$?
# 42 and signals get another attempt; 2 is a mistake in a flag or a file.
if [[ $code -eq 42 || $code -ge 128 ]]; then
  if [[ ${{SLURM_RESTART_COUNT:-0}} -lt {max_restarts} ]]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""


def plan(job: jobs.Job) -> jobs.Plan:
  """Plans a run on nodes of GPUs, as in --topology=h100:NODESxGPUS."""
  topology = jobs.needs('slurm', job, 'gpu')
  if job.workdir.startswith('gs://'):
    raise errors.UserError(
      f'--workdir={job.workdir} is no folder; --target=slurm needs a folder on '
      'the disk that this machine shares with the nodes.'
    )
  workdir = pathlib.Path(job.workdir).absolute()
  if not job.dry_run and not jobs.is_writable(str(workdir)):
    raise errors.UserError(
      f'Cannot write to --workdir={job.workdir}; choose a folder that is yours.'
    )
  command = jobs.local_command(job)
  batch = _TEMPLATE.format(
    name=job.name,
    nodes=topology.num_hosts,
    per_node=topology.chips_per_host,
    log=scripts.log_directive(str(workdir / 'logs'), 'slurm-%j.log'),
    options=''.join(f'{scripts.directive(o)}\n' for o in job.sbatch),
    folder=scripts.quote(os.getcwd()),
    exports=scripts.exports(job.env),
    command=scripts.join(command),
    max_restarts=10 if job.max_restarts is None else job.max_restarts,
  )
  script = (
    f'mkdir -p {scripts.quote(str(workdir / "logs"))}\n'
    + scripts.here_document('sbatch', batch, 'END_OF_SCRIPT')
  )
  programs = ('sbatch',)
  return jobs.plan_script('slurm', script, topology, programs, shares_disk=True)
