"""TPUs on Kubernetes: a JobSet, one job per slice, one pod per machine.

The image is built from this tree (launch/Dockerfile). The workdir is a bucket
mounted by Cloud Storage FUSE. The bucket needs a hierarchical namespace:
without one, folders are not renamed atomically, as checkpoints require.
"""

from typing import Any

from launch import scripts
from launch.targets import jobs
from nested_learning import accelerators
from nested_learning import errors

_IMAGE = 'REGION-docker.pkg.dev/PROJECT/REPOSITORY/nested-learning:latest'
_GRACE = 300  # seconds from SIGTERM to SIGKILL: time for a step and a save
_USER_ERROR = 2  # exit code after which another attempt does not help


def plan(job: jobs.Job) -> jobs.Plan:
  """Plans a run on slices of TPUs, as in --topology=v5e:16x16."""
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
  programs = ('gcloud', 'docker', 'kubectl')
  return jobs.plan_script('gke', script, topology, programs)


def _manifest(
  job: jobs.Job, topology: accelerators.Topology, image: str
) -> dict[str, Any]:
  """Returns the JobSet. All of it restarts when a pod fails, except with 2."""
  labels = {'kueue.x-k8s.io/queue-name': job.queue} if job.queue else {}
  hosts = topology.hosts_per_slice
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {
      'name': job.name,
      'labels': labels,
      'annotations': {
        # Each job gets a node pool, which is a slice, for itself.
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
  """Returns the pod of one machine; GKE adds TPU_WORKER_* and MEGASCALE_*."""
  bucket = jobs.bucket_of('gke', job)
  accelerator = topology.generation.cloud.gke_accelerator
  selector = {
    'cloud.google.com/gke-tpu-accelerator': accelerator,
    'cloud.google.com/gke-tpu-topology': 'x'.join(map(str, topology.shape)),
  }
  if job.spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  several = topology.num_slices > 1
  # Traffic between slices is faster on the network of the host.
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
        # Without a shell in between, SIGTERM reaches Python.
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
  """Escapes dollars: Kubernetes reads $(NAME) as a variable, $$ as a dollar."""
  return value.replace('$', '$$')
