"""TPU VMs: a queued resource, and ssh to all its workers.

The launcher copies this tree to every worker and installs it there. It stays
with the run: it starts the run again after a failure, on new machines if the
old ones were taken away, and deletes the machines when the run has succeeded.
"""

import re

from launch import scripts
from launch.targets import jobs
from nested_learning import errors

_START = """\
set -euo pipefail
# An attempt that lost its connection may still be running here.
ours={ours}
for signal in TERM KILL; do
  if pkill -$signal -f "$ours"; then
    for ((i = 0; i < 60; i++)); do
      pgrep -f "$ours" > /dev/null || break
      sleep 5
    done
  fi
done
cd ~
if ! cmp -s tree.tgz installed.tgz; then
  rm -rf tree && mkdir tree && tar -xzf tree.tgz -C tree
  # These machines come with a Python that is too old.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --clear --python 3.11 venv
  python3 -m uv pip install --quiet --python venv/bin/python \\
    --constraint tree/constraints.txt './tree[tpu,tokenizers]'
  cp tree.tgz installed.tgz
fi
if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt" \\
    "gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse > /dev/null
fi
sudo mkdir -p {mount} && sudo chown "$USER" {mount}
mountpoint -q {mount} || gcsfuse --implicit-dirs {bucket} {mount} > /dev/null
{exports}
cd tree
exec ../venv/bin/python {command}
"""

_SCRIPT = """\
set -o pipefail
name={name}
nodes=({nodes})
flags=({flags})
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Checks everything that the machines need before asking for them.
gcloud storage buckets describe gs://{bucket} --format='value(name)' || exit 2
tar -czf "$work/tree.tgz" --exclude=__pycache__ -C {root} {tree} || exit 2
{write_start}
state() {{
  gcloud compute tpus queued-resources describe "$name" "${{flags[@]}}" \\
    --format='value(state.state)' 2> /dev/null
}}

delete() {{
  gcloud compute tpus queued-resources delete "$name" "${{flags[@]}}" \\
    --quiet --force
}}

# Waits for the machines; asks for them if there are none, or they were taken.
obtain() {{
  local now
  while now=$(state || true); [[ $now != ACTIVE ]]; do
    case $now in
      SUSPENDED) delete || exit 2 ;;
      FAILED)
        echo "run.py: the queued resource $name failed." >&2
        exit 2
        ;;
      '')
        gcloud compute tpus queued-resources create "$name" "${{flags[@]}}" \\
          {request} || exit 2
        ;;
    esac
    sleep 30
  done
}}

everywhere() {{
  local pids=() code=0 node pid
  for node in "${{nodes[@]}}"; do
    "$@" "$node" &
    pids+=($!)
  done
  for pid in "${{pids[@]}}"; do
    wait "$pid" || code=$?
  done
  return "$code"
}}

copy() {{
  gcloud compute tpus tpu-vm scp "$work/tree.tgz" "$work/start.sh" "$1:" \\
    "${{flags[@]}}" --worker=all --quiet
}}

start() {{
  gcloud compute tpus tpu-vm ssh "$1" "${{flags[@]}}" --worker=all --quiet \\
    --command='bash start.sh'
}}

for ((left = {max_restarts}; ; left--)); do
  obtain
  everywhere copy && everywhere start
  code=$?
  # 2 is a mistake in a flag or a file: another attempt does not help.
  if [[ $code -eq 0 || $code -eq 2 || $left -eq 0 ]]; then
    break
  fi
  echo "run.py: ended with code $code; starting again, $left left." >&2
done
if [[ $code -eq 0 ]]; then
  delete
else
  echo "run.py: ended with code $code. The machines still cost money; give" \\
    "them back: gcloud compute tpus queued-resources delete $name" \\
    "${{flags[@]}} --force" >&2
fi
exit "$code"
"""


def plan(job: jobs.Job) -> jobs.Plan:
  """Plans a run on slices of TPU VMs, as in --topology=v5e:16x16."""
  topology = jobs.needs('tpu-vm', job, 'tpu')
  generation = topology.generation
  if generation.cloud.tpu_vm is None:
    raise errors.UserError(
      f'--target=tpu-vm has no {generation.name}, since the TPU API does not '
      'offer it; use --target=gke.'
    )
  bucket = jobs.bucket_of('tpu-vm', job)
  # The default network blocks JAX's own port.
  env = {'JAX_COORDINATOR_PORT': '8476', **job.env}
  command = ['launch/run.py', *jobs.remote_arguments('tpu-vm', job)]
  # The end keeps runs in folders of longer names alive.
  ours = f'launch/run[.]py .*--workdir={re.escape(bucket.workdir)}( |$)'
  start = _START.format(
    bucket=bucket.name,
    mount=bucket.mount,
    exports=scripts.exports(env),
    command=scripts.join(command),
    ours=scripts.quote(ours),
  )
  number = topology.chips_per_slice * generation.cloud.cores_per_chip
  request = [
    f'--accelerator-type={generation.cloud.tpu_vm}-{number}',
    f'--runtime-version={generation.cloud.runtime}',
  ]
  nodes = [job.name]
  if topology.num_slices > 1:
    nodes = [f'{job.name}-{i}' for i in range(topology.num_slices)]
    request += [f'--node-count={len(nodes)}', f'--node-prefix={job.name}']
  else:
    request += [f'--node-id={job.name}']
  if job.spot:
    request.append('--spot')
  flags = [
    f'--{name}={value}'
    for name, value in (('project', job.project), ('zone', job.zone))
    if value
  ]
  script = _SCRIPT.format(
    name=job.name,
    nodes=' '.join(nodes),
    flags=scripts.join(flags),
    bucket=bucket.name,
    root=scripts.quote(str(jobs.ROOT)),
    tree=' '.join(jobs.TREE),
    write_start=scripts.here_document(
      'cat > "$work/start.sh"', start, 'END_OF_START'
    ),
    request=scripts.join(request),
    max_restarts=10 if job.max_restarts is None else job.max_restarts,
  )
  programs = ('gcloud',)
  return jobs.plan_script('tpu-vm', script, topology, programs)
