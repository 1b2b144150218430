"""Tests of runs of several processes, also when some are killed or hang."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from nested_learning.training import metrics

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_EXPERIMENT = """
from tests.training import tiny

def get_config(arg):
  train = {'num_steps': 24, 'checkpoint_every': 4, 'evaluate_every': 16}
  return tiny.experiment(arg, train=train)
"""

_BUG = """
import dataclasses
import jax

@dataclasses.dataclass(frozen=True)
class Config:
  text: str = 'three'

def get_config(arg=None):
  return Config()

def run(config, workdir, mode):
  if jax.process_index() == 1:
    int(config.text)
"""

# A process that joins the others and runs `body`; `me` is its index.
_JOIN = """
import os, signal, sys, time
import jax
from nested_learning import distributed
from nested_learning import errors

distributed.initialize(heartbeat_seconds=10, hang_seconds=12)
distributed.barrier('start')
me = jax.process_index()
print('joined', flush=True)
try:
{body}
except errors.UserError as error:
  distributed.end(2, str(error))
  sys.exit(2)
"""


def _children(pid: int) -> dict[int, int]:
  """Returns the process ids of the processes of a run, by index."""
  path = pathlib.Path(f'/proc/{pid}/task/{pid}/children')
  found = {}
  for child in map(int, path.read_text().split()):
    environ = pathlib.Path(f'/proc/{child}/environ').read_bytes().split(b'\0')
    for entry in environ:
      if entry.startswith(b'JAX_PROCESS_ID='):
        found[int(entry.partition(b'=')[2])] = child
  return found


@pytest.mark.slow
class RunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.create_tempdir()
    self.root = pathlib.Path(folder.full_path)
    folder.create_file('experiments/small.py', content=_EXPERIMENT)

  def start(self, name, *args, devices=1):
    command = [
      sys.executable,
      _ROOT / 'launch' / 'run.py',
      f'--config=experiments/small.py:{self.root}',
      f'--workdir={self.root / name}',
      *args,
    ]
    environ = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}
    return subprocess.Popen(
      command,
      cwd=self.root,
      env={**os.environ, **environ},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def finish(self, process, code):
    output, _ = process.communicate(timeout=240)
    self.assertEqual(process.returncode, code, output)
    return output

  def wait_for(self, step, process):
    while not (self.root / 'run' / 'checkpoints' / str(step)).exists():
      self.assertIsNone(process.poll(), process.stdout)
      time.sleep(0.02)

  def losses(self, name):
    lines = metrics.read_metrics(self.root / name / 'metrics.jsonl')
    return {line['step']: line['loss'] for line in lines if 'loss' in line}

  def test_killed_stopped_and_resumed_by_other_numbers_of_processes(self):
    self.finish(self.start('whole', devices=2), 0)
    expected = self.losses('whole')
    self.assertLen(expected, 24)

    process = self.start('run', '--target=local-procs:2x2')
    self.wait_for(4, process)
    os.kill(_children(process.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    output = self.finish(process, 137)
    self.assertLess(time.monotonic() - killed, 10)
    self.assertIn('process 1 of 2 ended with SIGKILL; ending the oth', output)

    process = self.start('run', '--target=local-procs:4x1')
    self.wait_for(12, process)
    process.send_signal(signal.SIGTERM)
    output = self.finish(process, 143)
    self.assertRegex(output, r'Going on from step \d+ in')
    self.assertRegex(output, r'SIGTERM: saved step \d+ in .*same command again')

    output = self.finish(self.start('run', devices=4), 0)
    self.assertRegex(output, r'Going on from step 1\d in')
    losses = self.losses('run')
    self.assertEqual(losses.keys(), expected.keys())
    for step, loss in expected.items():
      self.assertAlmostEqual(losses[step], loss, delta=1e-5, msg=f'{step=}')
    whole, run = (
      json.loads((self.root / name / 'summary.json').read_text())
      for name in ('whole', 'run')
    )
    self.assertAlmostEqual(
      run['bits_per_byte'], whole['bits_per_byte'], delta=1e-5
    )
    log = (self.root / 'run' / 'logs' / 'process-1.log').read_text()
    self.assertNotIn('step', log)  # one process logs

  def test_processes_agree_on_a_checkpoint_that_is_not_damaged(self):
    steps = '--set=train.num_steps=8'
    process = self.start('run', '--target=local-procs:2', steps)
    self.finish(process, 0)
    folder = self.root / 'run' / 'checkpoints'
    expected = self.losses('run')
    for path in (folder / '8').glob('params/**/d/*'):
      path.write_bytes(path.read_bytes()[:-64])
    (self.root / 'run' / 'summary.json').unlink()
    output = self.finish(self.start('run', '--target=local-procs:2', steps), 0)
    self.assertRegex(output, '/8 .*moved to .*Going on from step 4')
    self.assertEqual(self.losses('run'), expected)
    self.assertTrue((folder / '8').exists())
    self.assertTrue((self.root / 'run' / 'checkpoints_damaged' / '8').exists())

  def test_mistake_is_said_once(self):
    process = self.start(
      'run', '--target=local-procs:2', f'--set=data.source={self.root}/none'
    )
    output = self.finish(process, 2)
    said = [line for line in output.splitlines() if 'run.py: ' in line]
    self.assertLen(said, 1, output)
    self.assertIn(f'{self.root}/none', said[0])

  def test_bug_of_one_process_is_worth_another_attempt(self):
    path = self.root / 'experiments' / 'bug.py'
    path.write_text(_BUG)
    arguments = (f'--config={path}', '--target=local-procs:2')
    output = self.finish(self.start('run', *arguments, '--max_restarts=1'), 42)
    said = 'process 1 of 2 ended with exit code 42'
    self.assertEqual(output.count(said), 2, output)
    self.assertIn('ValueError: invalid literal', output)

  def test_launcher_that_is_killed_leaves_nothing_behind(self):
    names = ('num_steps', 'checkpoint_every', 'evaluate_every')
    changes = [f'--set=train.{name}=400' for name in names]
    process = self.start('run', '--target=local-procs:2', *changes)
    while len(self.losses('run')) < 2:
      self.assertIsNone(process.poll())
      time.sleep(0.02)
    children = _children(process.pid).values()
    process.kill()
    process.communicate(timeout=60)  # until the last one has closed its output
    for child in children:
      self.assertFalse(os.path.exists(f'/proc/{child}/exe'))
    # They have saved, at a step at which they would not have otherwise.
    folder = self.root / 'run' / 'checkpoints'
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    self.assertBetween(max(steps), 2, 399)


@pytest.mark.slow
class EndTest(parameterized.TestCase):
  """Tests the other process when one of two stops."""

  def run_both(self, body, environs=None):
    """Returns exit codes, outputs and seconds since both had joined."""
    code = _JOIN.format(body=textwrap.indent(textwrap.dedent(body), '  '))
    processes = []
    for i in range(2):
      explicit = {
        'JAX_COORDINATOR_ADDRESS': f'localhost:{20000 + os.getpid() % 20000}',
        'JAX_NUM_PROCESSES': '2',
        'JAX_PROCESS_ID': str(i),
      }
      environ = environs[i] if environs else explicit
      processes.append(
        subprocess.Popen(
          [sys.executable, '-c', code],
          cwd=_ROOT,
          env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environ},
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    for process in processes:
      self.assertEqual(process.stdout.readline(), 'joined\n')
    start = time.monotonic()
    outputs = [process.communicate(timeout=90)[1] for process in processes]
    seconds = time.monotonic() - start
    return [process.returncode for process in processes], outputs, seconds

  @parameterized.named_parameters(
    (
      'slurm',
      lambda i: {
        'SLURM_JOB_ID': str(os.getpid()),
        'SLURM_STEP_NODELIST': 'localhost',
        'SLURM_NTASKS': '2',
        'SLURM_PROCID': str(i),
        'SLURM_LOCALID': str(i),
      },
    ),
    (
      'open_mpi_5',
      lambda i: {
        'OMPI_COMM_WORLD_SIZE': '2',
        'OMPI_COMM_WORLD_RANK': str(i),
        'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
        'OMPI_COMM_WORLD_LOCAL_RANK': str(i),
        'PMIX_NAMESPACE': f'prterun-{os.getpid()}@1',
      },
    ),
  )
  def test_processes_meet(self, environ):
    codes, outputs, _ = self.run_both(
      """
      print('number', me, 'of', jax.process_count(), file=sys.stderr)
      """,
      [environ(0), environ(1)],
    )
    self.assertEqual(codes, [0, 0])
    for i, output in enumerate(outputs):
      self.assertIn(f'number {i} of 2\n', output)

  def test_fails_alone(self):
    codes, outputs, seconds = self.run_both("""
      if me == 1:
        raise errors.UserError('this one is wrong.')
      while True:
        distributed.progress()
        time.sleep(1)
    """)
    self.assertEqual(codes, [-signal.SIGABRT, 2])
    self.assertIn('process 1 of 2: this one is wrong.', outputs[1])
    self.assertLess(seconds, 40)  # ten to wait, ten of silence, and more

  def test_fail_alike(self):
    codes, outputs, seconds = self.run_both("""
      raise errors.UserError('both are wrong.')
    """)
    self.assertEqual(codes, [2, 2])
    self.assertEqual(outputs[0].splitlines()[-1], 'both are wrong.')
    self.assertNotIn('both are wrong.', outputs[1])
    self.assertLess(seconds, 10)

  def test_hangs(self):
    codes, outputs, seconds = self.run_both("""
      def wait_for_data():
        time.sleep(80)

      if me == 1:
        wait_for_data()
      while True:
        distributed.progress()
        time.sleep(1)
    """)
    self.assertEqual(codes, [-signal.SIGABRT, 42])
    self.assertIn('process 1 of 2: no progress in 12 s', outputs[1])
    self.assertIn('in wait_for_data', outputs[1])
    self.assertLess(seconds, 45)

  def test_does_not_come(self):
    codes, outputs, _ = self.run_both("""
      if me == 1:
        time.sleep(4)
        os._exit(0)
      try:
        distributed.barrier('here', timeout_seconds=1)
      except TimeoutError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)
    """)
    self.assertEqual(codes[0], 3)
    self.assertRegex(outputs[0], "'here:1' in 1 s; missing: 1")

  def test_differ(self):
    codes, outputs, _ = self.run_both("""
      distributed.check_alike('the same')
      assert distributed.first_does('it', lambda: f'by {me}') == 'by 0'
      assert distributed.gather('who', str(me)) == ['0', '1']
      assert distributed.gather('what', '') == ['', '']
      def full():
        raise errors.Retryable('the disk is full.')
      try:
        distributed.first_does('full', full)
        assert False
      except errors.Retryable:  # in both
        pass
      distributed.check_alike(f'config of {me}')
    """)
    self.assertEqual(codes, [2, 2])
    self.assertIn('process 1 has a config with the hash', outputs[0])
