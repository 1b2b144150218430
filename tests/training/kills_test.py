"""kill -9 at random moments, saves included; every start finds good state."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

from absl.testing import parameterized
import pytest

from nested_learning.training import checkpoint_files
from nested_learning.training import inspection
from nested_learning.training import metrics

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_NUM_STEPS = 400

# A state of some megabytes that is saved at every second step, so that a good
# part of the time goes into saves.
_SCRIPT = textwrap.dedent("""
  import pathlib, sys
  import jax
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_compilation_cache_dir', sys.argv[1] + '/executables')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  from nested_learning import training
  from tests.training import tiny

  root, workdir = map(pathlib.Path, sys.argv[1:3])
  workdir.mkdir(exist_ok=True)
  config = tiny.experiment(
    root,
    model={'embed_dim': 256, 'vocab_size': 2048},
    train={
      'num_steps': int(sys.argv[3]),
      'final_fraction': 1.0,  # rates do not depend on the number of steps
      'checkpoint_every': 2,
      'keep_checkpoints': 3,
    },
  )
  training.train(config, workdir)
""")


@pytest.mark.slow
class KillsTest(parameterized.TestCase):
  """Twenty kills in all: five for every seed."""

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def start(self, name, num_steps):
    arguments = map(str, (self.root, self.root / name, num_steps))
    return subprocess.Popen(
      [sys.executable, '-c', _SCRIPT, *arguments],
      cwd=_ROOT,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  def losses(self, name):
    lines = metrics.read_metrics(self.root / name / 'metrics.jsonl')
    return {line['step']: line['loss'] for line in lines if 'loss' in line}

  def begun(self, name):
    """Returns the last step in the metrics, which grows while a run works."""
    found = self.losses(name)
    return max(found, default=0)

  @parameterized.parameters(1, 2, 3, 4)
  def test_killed_again_and_again(self, seed):
    rng = random.Random(seed)
    reached = 0
    for _ in range(5):
      process = self.start('cut', _NUM_STEPS)
      before = self.begun('cut')
      while self.begun('cut') in (0, before):  # it takes steps again
        self.assertIsNone(process.poll(), 'ended by itself')
        time.sleep(0.05)
      time.sleep(rng.uniform(0, 2))
      process.send_signal(signal.SIGKILL)
      process.communicate()
      self.assertEqual(process.returncode, -signal.SIGKILL)
      steps = checkpoint_files.steps(self.root / 'cut')
      if steps:
        self.assertEqual(inspection.inspect(self.root / 'cut').damaged, {})
        self.assertGreaterEqual(max(steps), reached)
        reached = max(steps)
    self.assertGreater(reached, 0)
    last = reached + 4
    for name in ('cut', 'straight'):
      process = self.start(name, last)
      errors = process.communicate()[1]
      self.assertEqual(process.returncode, 0, errors)
      self.assertNotIn('damaged', errors)
    self.assertEqual(self.losses('cut'), self.losses('straight'))
    self.assertLen(self.losses('cut'), last)
    checksums = [
      checkpoint_files.read_manifest(
        self.root / name / 'checkpoints' / str(last)
      )['checksums']
      for name in ('cut', 'straight')
    ]
    self.assertEqual(*checksums)
