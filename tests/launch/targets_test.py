"""Tests of the targets' scripts, with stand-ins for the clouds' programs."""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized
import pytest
import yaml

from launch import targets
from launch.targets import jobs
from launch.targets import local_procs
from launch.targets import xla_flags
from nested_learning import accelerators
from nested_learning import errors

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _job(topology=None, **changes):
  values = {
    'name': 'run-a',
    'arguments': ('--set=train.num_steps=5', '--set=generate.prompt=a b'),
    'config': str(_ROOT / 'experiments' / 'quickstart.py') + ':hope',
    'workdir': 'gs://bucket/runs/a',
    'topology': topology and accelerators.find(topology),
  }
  return jobs.Job(**values | changes)


def _here(script, end):
  """Returns the text of a here-document."""
  return script.split(f"<<'{end}'\n")[1].split(f'\n{end}')[0] + '\n'


class FindTest(parameterized.TestCase):
  def test_targets(self):
    self.assertEqual(targets.find('local'), ('local', ''))
    self.assertEqual(targets.find('local-procs:4x2'), ('local-procs', '4x2'))
    for spec, message in (
      ('lokal', 'nearest is local.'),
      ('tpu_vm', 'nearest is tpu-vm.'),
      ('k8s', 'There are local, local-procs, tpu-vm, gke, slurm.'),
      ('slurm:4', 'its size is --topology'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        targets.find(spec)

  @parameterized.parameters(
    # chips per host, hosts, devices, processes
    ('v5e:1x1', 1, 1, 1, 1),
    ('v5e:16x16', 4, 64, 256, 64),
    ('v6e:8x16*4', 4, 128, 512, 128),
    ('v5p:4x8x8', 4, 64, 256, 64),
    ('v4:2x2x1', 4, 1, 4, 1),
    ('tpu7x:4x4x8', 4, 32, 256, 32),
    ('h100:4x8', 8, 4, 32, 32),
    ('a100:1x2', 2, 1, 2, 2),
  )
  def test_topologies(self, spec, chips, hosts, devices, processes):
    topology = accelerators.find(spec)
    self.assertEqual(str(topology), spec)
    self.assertEqual(topology.chips_per_host, chips)
    self.assertEqual(topology.num_hosts, hosts)
    self.assertEqual(topology.num_devices, devices)
    self.assertEqual(topology.num_processes, processes)

  @parameterized.parameters(
    ('v5e:3x3', 'no such slice; the nearest is v5e:2x4'),
    ('v5e:32x32', 'the nearest is v5e:16x16'),
    ('v5e-256', 'not GENERATION:SHAPE; the nearest is v5e:16x16'),
    ('v5p-128', 'the nearest is v5p:4x4x4'),
    ('v7x:4x4x4', 'the nearest is tpu7x:4x4x4'),
    ('v5p:4x4', 'the nearest is v5p:2x2x4'),
    ('v5p:8x4x4', 'the nearest is v5p:4x4x8'),
    ('h100:2x7', 'the nearest is h100:2x8'),
    ('v5e:4x4*0', 'the nearest is v5e:4x4'),
    ('H100:2x8', 'the nearest is h100:2x8'),
    ('v5e', 'the nearest is v5e:2x2'),
  )
  def test_topology_that_does_not_exist(self, spec, message):
    with self.assertRaisesRegex(errors.UserError, message):
      accelerators.find(spec)


class JobTest(parameterized.TestCase):
  def test_arguments_of_the_launcher_are_left_out(self):
    typed = [
      '--config=x.py',
      '--topology=v5e:4x4',
      '--env',
      'A=B',
      '--set=a.b=--env',
      '-spot',
      '--nospot',
      '--set',
      'c=d',
      '--mode=eval',
    ]
    kept = ['--config=x.py', '--set=a.b=--env', '--set', 'c=d', '--mode=eval']
    self.assertEqual(list(targets.user_arguments(typed)), kept)
    self.assertEqual(
      list(targets.user_arguments(kept[:2], ['config'])), kept[1:2]
    )

  def _make(
    self, target='gke', dry_run=True, workdir=None, config='a/b_c.py:x'
  ):
    return targets.make_job(
      target, '', (), config=config, workdir=workdir, dry_run=dry_run
    )

  def test_names(self):
    self.assertEqual(self._make().name, 'b-c-x')
    self.assertEqual(self._make().workdir, 'gs://BUCKET/b_c-x')
    self.assertEqual(self._make('slurm').workdir, 'runs/b_c-x')
    self.assertEqual(self._make(workdir='gs://b/A_1').name, 'a-1')
    with flagsaver.flagsaver(name='Mine!'):
      self.assertEqual(self._make().name, 'mine')

  def test_environment(self):
    with flagsaver.flagsaver(
      topology='h100:1x8', env=['A=1=2', 'XLA_FLAGS=--more']
    ):
      env = self._make('slurm').env
    self.assertEqual(env['A'], '1=2')
    self.assertRegex(env['XLA_FLAGS'], r'^--xla_gpu.* --more$')

  @parameterized.parameters(
    ({'env': ['A']}, '--env=A is not NAME=VALUE'),
    ({'max_restarts': -1}, '--max_restarts=-1 must be'),
    ({'topology': 'v5e:3x3'}, 'the nearest'),
  )
  def test_wrong_flag(self, changes, message):
    with (
      flagsaver.flagsaver(**changes),
      self.assertRaisesRegex(errors.UserError, message),
    ):
      self._make()

  def test_workdir_is_needed_to_start(self):
    with self.assertRaisesRegex(errors.UserError, '--workdir=gs://BUCKET'):
      self._make(dry_run=False)


class ScriptTest(parameterized.TestCase):
  """Tests of scripts, with programs that log their calls."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.calls = self.folder / 'calls'
    self.calls.touch()
    self.program('sleep', 'exit 0')

  def program(self, name, body):
    path = self.folder / 'bin' / name
    path.parent.mkdir(exist_ok=True)
    log = f'printf "%s\\n" "{name} $*" >> {self.calls}\n'
    path.write_text(f'#!/bin/bash\n{log}{body}\n')
    path.chmod(0o755)

  def run_script(self, script):
    environ = {'PATH': f'{self.folder / "bin"}:{os.environ["PATH"]}'}
    return subprocess.run(
      ['bash', '-c', script],
      env=environ,
      cwd=self.folder,
      capture_output=True,
      text=True,
    )

  def called(self, *words):
    lines = self.calls.read_text().splitlines()
    return [line for line in lines if all(word in line for word in words)]

  @parameterized.parameters(
    ('gke', 'v5e:16x16'), ('tpu-vm', 'v6e:4x4*2'), ('slurm', 'h100:4x8')
  )
  def test_dry_run_is_a_script(self, target, topology):
    job = _job(topology, dry_run=True)
    if target == 'slurm':
      job = _job(topology, dry_run=True, workdir='runs/a')
    script = targets.TARGETS[target](job).script
    subprocess.run(['bash', '-n', '-c', script], check=True)
    self.assertIn('--set=train.num_steps=5', script)
    self.assertIn('a b', script)

  @parameterized.parameters(
    ('gke', None, {}, 'needs --topology, for instance v5e:4x4'),
    ('gke', 'h100:1x8', {}, 'runs on TPUs, and --topology=h100:1x8 is none'),
    ('slurm', 'v5e:4x4', {}, 'runs on GPUs, and --topology=v5e:4x4 is none'),
    ('gke', 'v5e:4x4', {}, 'needs --image'),
    ('tpu-vm', 'tpu7x:2x2x1', {}, 'has no tpu7x.* use --target=gke'),
    ('tpu-vm', 'v5e:4x4', {'workdir': 'runs/a'}, '--workdir=gs://BUCKET/NAME'),
    ('slurm', 'h100:1x8', {}, 'gs://bucket/runs/a is no folder'),
    ('tpu-vm', 'v5e:4x4', {'config': '/etc/x.py'}, 'does not go along'),
    ('local-procs', None, {'size': '0x2'}, 'must say how many processes'),
    ('local-procs', 'v5e:4x4', {'size': '2'}, 'is not for --target=local'),
    (
      'slurm',
      'h100:1x8',
      {'workdir': '/dev/null/x'},
      'Cannot write to --workdir=/dev/null/x',
    ),
    (
      'local-procs',
      None,
      {'size': '2', 'workdir': '/dev/null/x'},
      'Cannot write to --workdir=/dev/null/x',
    ),
    (
      'slurm',
      'h100:1x8',
      {'workdir': 'runs/a', 'sbatch': ('partition=x',)},
      'is no option of sbatch',
    ),
  )
  def test_refused(self, target, topology, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      targets.TARGETS[target](_job(topology, **changes))

  @parameterized.parameters(
    ('tpu-vm', 'v5e:4x4', 'gcloud'),
    ('gke', 'v5e:4x4', 'gcloud'),
    ('slurm', 'h100:1x8', 'sbatch'),
  )
  def test_program_that_is_missing(self, target, topology, program):
    workdir = 'runs/a' if target == 'slurm' else 'gs://b/a'
    plan = targets.TARGETS[target](_job(topology, workdir=workdir, image='i'))
    with (
      mock.patch.dict(os.environ, PATH='/nowhere'),
      self.assertRaisesRegex(errors.UserError, f'needs {program}, .*dry_run'),
    ):
      plan.run()

  def test_gke(self):
    for program in ('gcloud', 'docker', 'kubectl'):
      self.program(program, f'cat > {self.folder}/{program}.in')
    job = _job(
      'v6e:4x4*2',
      image='reg/x:1',
      env={'A': 'b'},
      spot=True,
      queue='q',
      max_restarts=3,
    )
    result = self.run_script(targets.TARGETS['gke'](job).script)
    self.assertEqual(result.returncode, 0, result.stderr)
    self.assertEqual(
      [line.split()[:2] for line in self.called()],
      [
        ['gcloud', 'storage'],
        ['docker', 'build'],
        ['docker', 'push'],
        ['kubectl', 'apply'],
      ],
    )
    self.assertIn(str(_ROOT / 'launch' / 'Dockerfile'), self.called('build')[0])
    manifest = yaml.safe_load((self.folder / 'kubectl.in').read_text())
    self.assertEqual(manifest['kind'], 'JobSet')
    self.assertEqual(manifest['metadata']['name'], 'run-a')
    self.assertIn('q', manifest['metadata']['labels'].values())
    self.assertEqual(manifest['spec']['failurePolicy']['maxRestarts'], 3)
    (slices,) = manifest['spec']['replicatedJobs']
    self.assertEqual(slices['replicas'], 2)
    spec = slices['template']['spec']
    self.assertEqual((spec['parallelism'], spec['completions']), (4, 4))
    self.assertEqual(spec['backoffLimit'], 0)
    (rule,) = spec['podFailurePolicy']['rules']
    self.assertEqual(rule['onExitCodes']['values'], [2])
    pod = spec['template']['spec']
    self.assertEqual(pod['restartPolicy'], 'Never')
    self.assertEqual(
      pod['nodeSelector'],
      {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
        'cloud.google.com/gke-tpu-topology': '4x4',
        'cloud.google.com/gke-spot': 'true',
      },
    )
    self.assertTrue(pod['hostNetwork'])
    (container,) = pod['containers']
    name = rule['onExitCodes']['containerName']
    self.assertEqual(container['name'], name)
    self.assertEqual(container['image'], 'reg/x:1')
    self.assertEqual(
      container['command'],
      [
        'python',
        'launch/run.py',
        '--set=train.num_steps=5',
        '--set=generate.prompt=a b',
        '--workdir=/gs/bucket/runs/a',
        '--config=experiments/quickstart.py:hope',
      ],
    )
    self.assertEqual(container['resources']['limits'], {'google.com/tpu': 4})
    self.assertEqual(container['env'], [{'name': 'A', 'value': 'b'}])
    mounts = {m['name']: m['mountPath'] for m in container['volumeMounts']}
    self.assertEqual(mounts['workdir'], '/gs/bucket')
    volumes = {volume['name']: volume for volume in pod['volumes']}
    attributes = volumes['workdir']['csi']['volumeAttributes']
    self.assertEqual(attributes['bucketName'], 'bucket')

  def gcloud(self, *codes):
    """Makes a gcloud that takes the machines away when a run ends with 255."""
    state, left = self.folder / 'state', self.folder / 'codes'
    left.write_text('\n'.join(map(str, codes)) + '\n')
    self.program(
      'gcloud',
      f"""
      case "$*" in
        *describe*state*) [[ -e {state} ]] && cat {state} ;;
        *queued-resources*create*) echo PROVISIONING > {state} ;;
        *queued-resources*delete*) rm {state} ;;
        *ssh*)
          code=$(head -1 {left})
          sed -i 1d {left}
          [[ $code -ne 255 ]] || echo SUSPENDED > {state}
          exit $code
          ;;
        *scp*) tar -tzf "$5" > {self.folder}/listing ;;
      esac
      """,
    )
    waiting = f'grep -q PROVISIONING {state} && echo ACTIVE > {state}'
    self.program('sleep', waiting)

  def test_tpu_vm_starts_again_on_new_machines(self):
    self.gcloud(255, 134, 0)
    job = _job('v5p:2x2x2', zone='z-1', spot=True)
    result = self.run_script(targets.TARGETS['tpu-vm'](job).script)
    self.assertEqual(result.returncode, 0, result.stderr)
    create, again = self.called('queued-resources create')
    self.assertEqual(create, again)
    for word in (
      'run-a --zone=z-1',
      '--accelerator-type=v5p-16',
      '--runtime-version=v2-alpha-tpuv5',
      '--node-id=run-a',
      '--spot',
    ):
      self.assertIn(word, create)
    self.assertLen(self.called('ssh', '--worker=all', 'bash start.sh'), 3)
    self.assertLen(self.called('scp', '--worker=all', 'run-a:'), 3)
    # Taken once, given back once.
    self.assertLen(self.called('queued-resources delete'), 2)
    listing = (self.folder / 'listing').read_text()
    for name in ('launch/run.py', 'nested_learning/data/', 'constraints.txt'):
      self.assertIn(name, listing)

  @parameterized.parameters(
    ((2,), 1, 2), ((134, 134, 134), 3, 134), ((42, 0), 2, 0)
  )
  def test_tpu_vm_gives_up(self, codes, attempts, code):
    self.gcloud(*codes)
    job = _job('v5e:4x4', max_restarts=2)
    result = self.run_script(targets.TARGETS['tpu-vm'](job).script)
    self.assertEqual(result.returncode, code, result.stderr)
    self.assertLen(self.called('ssh'), attempts)
    kept = not self.called('queued-resources delete')
    self.assertEqual(kept, code != 0)
    self.assertEqual('still cost money' in result.stderr, code != 0)

  def test_tpu_vm_asks_for_nothing_without_its_bucket(self):
    self.program('gcloud', 'exit 1')
    result = self.run_script(targets.TARGETS['tpu-vm'](_job('v5e:4x4')).script)
    self.assertEqual(result.returncode, 2)
    self.assertLen(self.called(), 1)

  def test_tpu_vm_of_several_slices(self):
    self.gcloud(0, 0)
    job = _job('v6e:4x4*2')
    self.assertEqual(
      self.run_script(targets.TARGETS['tpu-vm'](job).script).returncode, 0
    )
    (create,) = self.called('queued-resources create')
    self.assertIn('--node-count=2 --node-prefix=run-a', create)
    self.assertLen(self.called('ssh run-a-0'), 1)
    self.assertLen(self.called('ssh run-a-1'), 1)

  def test_tpu_vm_worker(self):
    start = _here(
      targets.TARGETS['tpu-vm'](_job('v5e:4x4')).script, 'END_OF_START'
    )
    subprocess.run(['bash', '-n', '-c', start], check=True)
    self.assertIn('gcsfuse --implicit-dirs bucket /gs/bucket', start)
    self.assertIn('export JAX_COORDINATOR_PORT=8476', start)
    self.assertRegex(
      start.splitlines()[-1],
      r'^exec \S+python launch/run.py .*--set=generate.prompt=a b'
      r'.* --workdir=/gs/bucket/runs/a --config=experiments/quickstart.py:hope',
    )

  def slurm(self, code, restarts=0):
    """Submits a job and runs its batch script, with an exit code of srun."""
    self.program('sbatch', f'cat > {self.folder}/batch')
    self.program('srun', f'exit {code}')
    self.program('scontrol', 'exit 0')
    job = _job(
      'h100:4x8',
      workdir='runs/a',
      config=None,
      env={'A': 'b c'},
      sbatch=('--partition=gpu',),
      max_restarts=2,
    )
    result = self.run_script(targets.TARGETS['slurm'](job).script)
    self.assertEqual(result.returncode, 0, result.stderr)
    batch = (self.folder / 'batch').read_text()
    ended = self.run_script(
      f'export SLURM_JOB_ID=7 SLURM_RESTART_COUNT={restarts}\n{batch}'
    )
    return batch, ended.returncode

  def test_slurm(self):
    batch, code = self.slurm(0)
    self.assertEqual(code, 0)
    for line in (
      '#SBATCH --job-name=run-a',
      '#SBATCH --nodes=4',
      '#SBATCH --ntasks-per-node=8',
      '#SBATCH --gpus-per-node=8',
      '#SBATCH --requeue',
      '#SBATCH --partition=gpu',
      "export A='b c'",
    ):
      self.assertIn(line, batch.splitlines())
    # All options come before the first command, where sbatch stops reading.
    first = re.search(r'^[^#\n]', batch, re.MULTILINE).start()
    self.assertNotIn('#SBATCH', batch[first:])
    (srun,) = self.called('srun')
    self.assertIn('--kill-on-bad-exit=1', srun)
    self.assertIn('--set=generate.prompt=a b --workdir=runs/a', srun)
    self.assertEmpty(self.called('scontrol'))

  @parameterized.parameters(
    (137, 0, True), (42, 1, True), (137, 2, False), (2, 0, False), (1, 0, False)
  )
  def test_slurm_requeues(self, code, restarts, again):
    self.assertEqual(self.slurm(code, restarts)[1], code)
    self.assertEqual(bool(self.called('scontrol requeue 7')), again)


class LocalProcsTest(parameterized.TestCase):
  """Tests of the launcher with processes of plain Python."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def launch(self, code, size='3', **changes):
    code = 'import os, pathlib, signal, sys, time\n' + textwrap.dedent(code)
    command = [sys.executable, '-c', code, str(self.folder)]
    job = _job(size=size, workdir=str(self.folder / 'run'), **changes)
    output = io.StringIO()
    with (
      mock.patch.object(jobs, 'local_command', lambda _: command),
      contextlib.redirect_stderr(output),
    ):
      start = time.monotonic()
      result = targets.TARGETS['local-procs'](job).run()
    self.seconds = time.monotonic() - start
    return result, output.getvalue()

  def test_environment(self):
    code, _ = self.launch(
      """
      names = ('JAX_NUM_CPU_DEVICES', 'JAX_NUM_PROCESSES', 'A')
      text = ' '.join(os.environ[name] for name in names)
      path = pathlib.Path(sys.argv[1], os.environ['JAX_PROCESS_ID'])
      path.write_text(text + ' ' + os.environ['JAX_COORDINATOR_ADDRESS'])
      """,
      size='3x2',
      env={'A': 'b'},
    )
    self.assertEqual(code, 0)
    texts = {(self.folder / str(i)).read_text() for i in range(3)}
    (text,) = texts  # all the same
    self.assertRegex(text, r'^2 3 b localhost:\d+$')

  def test_process_that_is_killed_ends_all(self):
    code, output = self.launch(
      """
      if os.environ['JAX_PROCESS_ID'] == '1':
        print('last words', flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
      time.sleep(60)
      """
    )
    self.assertEqual(code, 137)
    self.assertLess(self.seconds, 10)
    self.assertIn('process 1 of 3 ended with SIGKILL; ending the oth', output)
    self.assertIn('  last words\n', output)

  def test_processes_that_fail_alike_are_not_killed(self):
    code, output = self.launch(
      'time.sleep(float(os.environ["JAX_PROCESS_ID"]) / 4)\nsys.exit(2)'
    )
    self.assertEqual(code, 2)
    self.assertEqual(output, '')

  @parameterized.parameters((42, 3, 0), (2, 1, 2))
  def test_starts_again(self, code, attempts, result):
    ended, _ = self.launch(
      f"""
      if os.environ['JAX_PROCESS_ID'] == '0':
        with open(sys.argv[1] + '/attempts', 'a') as file:
          file.write('x')
          done = file.tell() == 3
        sys.exit(0 if done else {code})
      """,
      max_restarts=5,
    )
    self.assertEqual(ended, result)
    self.assertLen((self.folder / 'attempts').read_text(), attempts)

  @parameterized.parameters((signal.SIGTERM, 143), (signal.SIGINT, 130))
  def test_signal_is_passed_on_once_to_all(self, number, code):
    def interrupt():
      while len(list(self.folder.glob('ready*'))) < 3:
        time.sleep(0.05)
      os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    ended, _ = self.launch(
      """
      me = os.environ['JAX_PROCESS_ID']
      def save(number, _):
        pathlib.Path(sys.argv[1], f'saved{me}-{number}').touch()
        sys.exit(143)
      signal.signal(signal.SIGTERM, save)
      pathlib.Path(sys.argv[1], f'ready{me}').touch()
      time.sleep(60)
      """,
      max_restarts=5,
    )
    thread.join()
    self.assertEqual(ended, code)
    saved = sorted(path.name for path in self.folder.glob('saved*'))
    self.assertEqual(saved, ['saved0-15', 'saved1-15', 'saved2-15'])

  def test_dry_run(self):
    job = _job(size='2x4', workdir=str(self.folder / 'run'))
    plan = local_procs.plan(job)
    self.assertEqual((plan.num_processes, plan.num_devices), (2, 8))
    self.assertEqual(plan.script.count('JAX_NUM_CPU_DEVICES=4'), 2)
    self.assertIn("'--set=generate.prompt=a b'", plan.script)
    self.assertFalse((self.folder / 'run').exists())


class XlaFlagsTest(absltest.TestCase):
  def test_table(self):
    names = [flag for flag, *_ in xla_flags.TABLE]
    self.assertLen(set(names), len(names))
    for flag, generations, _, reason in xla_flags.TABLE:
      self.assertRegex(flag, r'^--xla_\w+=\w+$')
      self.assertContainsSubset(generations, accelerators.GENERATIONS)
      self.assertNotEmpty(reason)

  def test_slices_have_more(self):
    one, two = (
      xla_flags.environment(accelerators.find(spec))['LIBTPU_INIT_ARGS']
      for spec in ('v6e:4x4', 'v6e:4x4*2')
    )
    self.assertStartsWith(two, one)
    self.assertIn('data_parallel', two[len(one) :])

  def test_gpu_flags_are_known(self):
    flags = xla_flags.environment(accelerators.find('h100:1x8'))
    self.assertNotEmpty(flags['XLA_FLAGS'])
    code = 'import jax; jax.devices()'  # aborts if it knows one of them not
    for added, known in (('', True), (' --xla_gpu_no_such_flag=true', False)):
      result = subprocess.run(
        [sys.executable, '-c', code],
        env={
          **os.environ,
          'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': flags['XLA_FLAGS'] + added,
        },
        capture_output=True,
      )
      self.assertEqual(result.returncode == 0, known, result.stderr)

  @pytest.mark.extra
  def test_tpu_flags_are_known(self):
    if not (
      importlib.util.find_spec('libtpu') or os.environ.get('TPU_LIBRARY_PATH')
    ):
      self.skipTest('libtpu is not installed: pip install .[tpu]')
    code = """
    import jax
    from jax.experimental import topologies
    from launch.targets import xla_flags

    device = topologies.get_topology_desc(
      platform='tpu', topology_name='v5e:2x2'
    ).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((8, 128), 'float32', sharding=place)
    lowered = jax.jit(lambda x: x + 1).lower(x)
    for flag, generations, *_ in xla_flags.TABLE:
      if 'v5e' in generations or 'v6e' in generations:
        name, _, value = flag.removeprefix('--').partition('=')
        lowered.compile(compiler_options={name: value})
    """
    result = subprocess.run(
      [sys.executable, '-c', textwrap.dedent(code)],
      cwd=_ROOT,
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'TPU_SKIP_MDS_QUERY': '1',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      },
      capture_output=True,
      text=True,
    )
    self.assertEqual(result.returncode, 0, result.stderr)
