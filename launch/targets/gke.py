"""TPUs on Kubernetes: a JobSet, one job per slice, one pod per machine.

The image is built from this tree (launch/Dockerfile). The workdir is a bucket,
mounted by Cloud Storage FUSE; it needs a hierarchical namespace, without which
a folder does not get its name all at once, as checkpoints must.
"""

from typing import Any

from launch import scripts
from launch.targets import accelerators
from launch.targets import jobs
from nested_learning import errors

_IMAGE = 'REGION-docker.pkg.dev/PROJECT/REPOSITORY/nested-learning:latest'
_GRACE = 300  # seconds from SIGTERM to SIGKILL, for a step and a save
_USER_ERROR = 2  # the exit code that no other attempt mends


def plan(job: jobs.Job) -> jobs.Plan:
  """Slices of TPUs, from --target=gke and --topology=v5e:16x16."""
  topology = jobs.needs('gke', job, 'tpu')
  if job.image is None and not job.dry_run:
    raise errors.UserError(
      '--target=gke needs --image, the name under which the image of this tree '
      f'is pushed, as in {_IMAGE}.'
    )
  import yaml

  image = job.image or _IMAGE
  manifest = yaml.safe_dump(_manifest(job, topology, image), sort_keys=False)
  bucket = jobs.bucket_of('gke', job).name
  first = (
    f'jobset.sigs.k8s.io/jobset-name={job.name},'
    'jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0'
  )
  dockerfile = jobs.ROOT / 'launch' / 'Dockerfile'
  apply = scripts.here_document(
    'kubectl apply --filename -', manifest, 'END_OF_MANIFEST'
  )
  tag = scripts.quote(f'--tag={image}')
  file = scripts.quote(f'--file={dockerfile}')
  script = f"""\
set -euo pipefail
gcloud storage buckets describe gs://{bucket} --format='value(name)'
docker build {tag} {file} {scripts.quote(str(jobs.ROOT))}
docker push -- {scripts.quote(image)}
{apply}echo 'Follow it: kubectl logs --follow --selector={first}'
echo 'Stop it:   kubectl delete jobset {job.name}'
"""

  def run() -> int:
    jobs.find_programs('gke', 'gcloud', 'docker', 'kubectl')
    return jobs.run_script(script)

  return jobs.Plan(
    script=script,
    run=run,
    num_processes=topology.num_processes,
    num_devices=topology.num_devices,
    shares_disk=False,
  )


def _manifest(
  job: jobs.Job, topology: accelerators.Topology, image: str
) -> dict[str, Any]:
  """The JobSet: restarted whole when a pod fails, but not for a wrong flag."""
  labels = {'kueue.x-k8s.io/queue-name': job.queue} if job.queue else {}
  hosts = topology.hosts_per_slice
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {
      'name': job.name,
      'labels': labels,
      'annotations': {
        # One job has a node pool, which is a slice, for itself.
        'alpha.jobset.sigs.k8s.io/exclusive-topology': (
          'cloud.google.com/gke-nodepool'
        )
      },
    },
    'spec': {
      'failurePolicy': {
        'maxRestarts': 10 if job.max_restarts is None else job.max_restarts,
        'rules': [
          {
            'action': 'FailJobSet',
            'onJobFailureReasons': ['PodFailurePolicy'],
          }
        ],
      },
      'replicatedJobs': [
        {
          'name': 'slice',
          'replicas': topology.num_slices,
          'template': {
            'spec': {
              'parallelism': hosts,
              'completions': hosts,
              'completionMode': 'Indexed',
              'backoffLimit': 0,
              'podFailurePolicy': {
                'rules': [
                  {
                    'action': 'FailJob',
                    'onExitCodes': {
                      'containerName': 'train',
                      'operator': 'In',
                      'values': [_USER_ERROR],
                    },
                  }
                ]
              },
              'template': {
                'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}},
                'spec': _pod(job, topology, image),
              },
            }
          },
        }
      ],
    },
  }


def _pod(
  job: jobs.Job, topology: accelerators.Topology, image: str
) -> dict[str, Any]:
  """One machine of a slice. TPU_WORKER_* and MEGASCALE_* come from GKE."""
  bucket = jobs.bucket_of('gke', job)
  selector = {
    'cloud.google.com/gke-tpu-accelerator': topology.generation.gke_accelerator,
    'cloud.google.com/gke-tpu-topology': 'x'.join(map(str, topology.shape)),
  }
  if job.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  several = topology.num_slices > 1
  # Between slices the network of the host is the faster one.
  network = {'hostNetwork': True, 'dnsPolicy': 'ClusterFirstWithHostNet'}
  attributes = {'bucketName': bucket.name, 'mountOptions': 'implicit-dirs'}
  if several:
    attributes['hostNetworkPodKSA'] = 'true'
  chips = topology.chips_per_host
  return {
    **(network if several else {}),
    'restartPolicy': 'Never',
    'terminationGracePeriodSeconds': _GRACE,
    'nodeSelector': selector,
    'containers': [
      {
        'name': 'train',
        'image': image,
        # Python is the first process of the pod, so that SIGTERM reaches it.
        'command': [
          'python',
          'launch/run.py',
          *map(_unexpanded, jobs.remote_arguments('gke', job)),
        ],
        'env': [
          {'name': name, 'value': _unexpanded(value)}
          for name, value in job.env.items()
        ],
        'ports': [{'containerPort': port} for port in (8471, 8080, 8482)],
        'securityContext': {'privileged': True},
        'resources': {
          'requests': {'google.com/tpu': chips},
          'limits': {'google.com/tpu': chips},
        },
        'volumeMounts': [
          {'name': 'workdir', 'mountPath': bucket.mount},
          {'name': 'memory', 'mountPath': '/dev/shm'},
        ],
      }
    ],
    'volumes': [
      {
        'name': 'workdir',
        'csi': {
          'driver': 'gcsfuse.csi.storage.gke.io',
          'volumeAttributes': attributes,
        },
      },
      {'name': 'memory', 'emptyDir': {'medium': 'Memory'}},
    ],
  }


def _unexpanded(value: str) -> str:
  """A value as Kubernetes takes it: $(NAME) is a variable, $$ is a dollar."""
  return value.replace('$', '$$')
