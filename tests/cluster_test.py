"""How processes find each other: environments as launchers set them."""

import sys
import types
from unittest import mock

from absl.testing import parameterized

from nested_learning import cluster
from nested_learning import errors

_SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[01-04]',
  'SLURM_NTASKS': '4',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
}
_OPEN_MPI = {
  'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '3',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '4',
  'OMPI_COMM_WORLD_LOCAL_RANK': '3',
  'PMIX_NAMESPACE': 'prterun-host-12@1',
}
_EXPLICIT = {
  'JAX_COORDINATOR_ADDRESS': 'host0:1234',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '2',
}


class FindTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('nothing', {}),
    ('slurm', _SLURM | {'SLURM_NTASKS': '1'}),
    ('slurm_without_srun', {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4'}),
    ('open_mpi', _OPEN_MPI | {'OMPI_COMM_WORLD_SIZE': '1'}),
    ('explicit', {'JAX_NUM_PROCESSES': '1'}),
    ('tpu_host', {'TPU_WORKER_HOSTNAMES': 'localhost'}),
  )
  def test_one_process(self, environ):
    with mock.patch.dict(sys.modules, libtpu=None):  # it may be installed
      self.assertIsNone(cluster.find(environ))

  @parameterized.named_parameters(
    ('slurm', _SLURM),
    ('open_mpi_4', _OPEN_MPI | {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://h:1'}),
    ('gke', {'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1'}),
    (
      'gke_slices',
      {'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'},
    ),
  )
  def test_left_to_jax(self, environ):
    self.assertEqual(cluster.find(environ), {})

  def test_tpu_vm_is_left_to_jax(self):
    libtpu = types.ModuleType('libtpu')
    libtpu.__spec__ = mock.Mock()
    with mock.patch.dict(sys.modules, libtpu=libtpu):
      self.assertEqual(cluster.find({}), {})
      # JAX sets this where it sees no chip.
      self.assertIsNone(cluster.find({'TPU_SKIP_MDS_QUERY': '1'}))

  def test_explicit(self):
    expected = {
      'coordinator_address': 'host0:1234',
      'num_processes': 4,
      'process_id': 2,
      'cluster_detection_method': 'deactivate',
    }
    self.assertEqual(cluster.find(_EXPLICIT), expected)
    self.assertEqual(cluster.find(_SLURM | _EXPLICIT), expected)
    arguments = {'coordinator_address': 'h:1', 'process_id': 5}
    arguments['num_processes'] = 8
    found = cluster.find(_EXPLICIT, **arguments)
    self.assertEqual(found, expected | arguments)
    job = _EXPLICIT | {'JOB_COMPLETION_INDEX': '3'}
    del job['JAX_PROCESS_ID']
    self.assertEqual(cluster.find(job)['process_id'], 3)

  def test_open_mpi_5(self):
    found = cluster.find(_OPEN_MPI)
    self.assertRegex(found['coordinator_address'], r'localhost:6\d{4}$')
    self.assertEqual(found['process_id'], 3)
    self.assertEqual(found['local_device_ids'], [3])
    other = cluster.find(_OPEN_MPI | {'PMIX_NAMESPACE': 'other'})
    self.assertNotEqual(
      found['coordinator_address'], other['coordinator_address']
    )
    far = _OPEN_MPI | {'OMPI_COMM_WORLD_LOCAL_SIZE': '2'}
    with self.assertRaisesRegex(errors.UserError, 'set JAX_COORDINATOR_ADD'):
      cluster.find(far)
    found = cluster.find(far | {'JAX_COORDINATOR_ADDRESS': 'h:1'})
    self.assertEqual(found['coordinator_address'], 'h:1')

  @parameterized.named_parameters(
    ('address', 'JAX_COORDINATOR_ADDRESS', None, 'ADDRESS must be set too'),
    ('count', 'JAX_NUM_PROCESSES', None, 'JAX_NUM_PROCESSES must be set'),
    ('index', 'JAX_PROCESS_ID', None, 'JAX_PROCESS_ID must be set too'),
    ('range', 'JAX_PROCESS_ID', '4', 'process id 4 must be .* below .* 4'),
    ('number', 'JAX_PROCESS_ID', 'two', "ID='two' must be a whole number"),
    ('port', 'JAX_COORDINATOR_ADDRESS', 'h', "'h' must be host:port"),
  )
  def test_incomplete_or_wrong(self, name, value, message):
    environ = {k: v for k, v in _EXPLICIT.items() if k != name}
    if value is not None:
      environ[name] = value
    with self.assertRaisesRegex(errors.UserError, message):
      cluster.find(environ)
