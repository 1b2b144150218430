"""Whole runs: resumed, interrupted, killed, diverging."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_learning import errors
from nested_learning import evaluation
from nested_learning import levels
from nested_learning import optimizers
from nested_learning import training
from nested_learning.training import checkpoint_files
from nested_learning.training import checkpoints
from nested_learning.training import metrics
from nested_learning.training import text_workload
from nested_learning.training import workload as workload_lib
from tests.training import tiny

_ROOT = pathlib.Path(__file__).resolve().parents[2]


class TrainerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(checkpoints, '_END_SECONDS', 0))
    self.root = pathlib.Path(self.create_tempdir().full_path)
    tiny.share_executables(self)

  def train(self, name, **changes):
    workdir = self.root / name
    workdir.mkdir(exist_ok=True)
    return training.train(tiny.experiment(self.root, **changes), workdir)

  def losses(self, name):
    lines = metrics.read_metrics(self.root / name / 'metrics.jsonl')
    return {line['step']: line['loss'] for line in lines if 'loss' in line}

  def steps(self, name):
    return checkpoint_files.steps(self.root / name)

  def checksums(self, name):
    """Of every array of the last checkpoint: parameters, optimiser, stream."""
    step = max(self.steps(name))
    folder = self.root / name / 'checkpoints' / str(step)
    manifest = json.loads((folder / 'manifest' / 'metadata').read_text())
    return manifest['checksums']

  @contextlib.contextmanager
  def signal_at(self, number, step):
    """Sends the process a signal while it puts the batch of a step."""
    put, calls = workload_lib.put, []

    def put_and_signal(*args):
      calls.append(args)
      if len(calls) == step:
        signal.raise_signal(number)
      return put(*args)

    with mock.patch.object(workload_lib, 'put', put_and_signal):
      yield

  @parameterized.named_parameters(
    ('rows', {}),
    (
      'stream',
      {
        'data': {
          'reset': 'stream',
          'stream_tokens': 64,
          'sequence_length': 16,
        },
        'inner': levels.make_inner((8, 16), learning_rate=0.3),
      },
    ),
    (
      'other_optimizers',
      {
        'data': {'reset': 'never', 'sequence_length': 16},
        'model': {
          'levels': tuple(
            dataclasses.replace(level, optimizer=optimizers.configs.Dgd())
            for level in tiny.MODEL.levels
          )
        },
        'train': {
          'accumulate': 2,
          'optimizer': optimizers.configs.M3(slow_every=3, ns_steps=1),
        },
      },
    ),
  )
  def test_resumed_is_uninterrupted_bit_for_bit(self, changes):
    whole = self.train('straight', **changes)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
      with self.signal_at(number, 2), self.assertRaises(SystemExit) as end:
        self.train('cut', **changes)
      self.assertEqual(end.exception.code, code)
    self.assertEqual(self.steps('cut'), [2, 4])
    resumed = self.train('cut', **changes)
    self.assertEqual(self.losses('straight'), self.losses('cut'))
    self.assertLen(self.losses('cut'), 6)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    self.assertEqual(self.checksums('straight'), self.checksums('cut'))
    self.assertEqual(
      whole.evaluation.bits_per_byte, resumed.evaluation.bits_per_byte
    )

  def test_keeps_the_last_checkpoints_and_the_best(self):
    scores = iter((5.0, 3.0, 4.0, 4.5, 4.2, 4.1))
    with mock.patch.object(
      evaluation.Evaluation, 'score', property(lambda _: next(scores))
    ):
      self.train('w', train={'evaluate_every': 1, 'keep_checkpoints': 2})
    self.assertEqual(self.steps('w'), [2, 5, 6])

  def evaluations(self, name):
    lines = metrics.read_metrics(self.root / name / 'metrics.jsonl')
    name = 'validation/loss'
    return [(line['step'], line[name]) for line in lines if name in line]

  @parameterized.parameters(3, 6)  # in the middle, at the end
  def test_an_evaluation_that_was_interrupted_is_done_at_the_next_start(
    self, step
  ):
    train = {'evaluate_every': 3}
    self.train('straight', train=train)
    batches, calls = workload_lib.validation_batches, []

    def signalling(*args):
      calls.append(args)
      for batch in batches(*args):
        if len(calls) == step // 3:
          signal.raise_signal(signal.SIGTERM)
        yield batch

    with mock.patch.object(workload_lib, 'validation_batches', signalling):
      with self.assertRaises(SystemExit):
        self.train('w', train=train)
    self.assertEqual(max(self.steps('w')), step)
    self.assertLen(self.evaluations('w'), step // 3 - 1)
    self.train('w', train=train)
    self.assertEqual(self.evaluations('w'), self.evaluations('straight'))
    scores = [checkpoints.read_scores(self.root / n) for n in ('straight', 'w')]
    self.assertEqual(*scores)

  def test_a_checkpoint_is_there_before_an_evaluation_fails(self):
    for _ in range(2):  # the same at the next start
      with (
        mock.patch.object(evaluation.Evaluation, 'loss', float('nan')),
        self.assertRaisesRegex(
          errors.UserError, 'validation/loss is nan at step 3; .*of step 3 stay'
        ),
      ):
        self.train('w', train={'evaluate_every': 3})
      self.assertEqual(self.steps('w'), [3])

  def test_without_validation_data(self):
    outcome = self.train('w', data={'validation_fraction': 0.0})
    self.assertIsNone(outcome.evaluation)
    self.assertEqual(self.steps('w'), [6])
    self.assertEmpty(self.evaluations('w'))

  def test_finds_before_the_first_step_that_it_cannot_evaluate(self):
    make = workload_lib.make_batches

    def broken(workload, split, mesh):
      if split == 'validation':
        raise errors.UserError('no text for validation')
      return make(workload, split, mesh)

    with (
      mock.patch.object(workload_lib, 'make_batches', broken),
      self.assertRaisesRegex(errors.UserError, 'no text for validation'),
    ):
      self.train('w')
    self.assertFalse((self.root / 'w' / 'metrics.jsonl').exists())

  def break_checkpoints(self, *, replace):
    """Moves the folder of checkpoints away before step 5."""
    put, folder, calls = workload_lib.put, self.root / 'w' / 'checkpoints', []

    def put_and_break(*args):
      calls.append(args)
      if len(calls) == 5:
        while not (folder / '3').exists():  # it is written meanwhile
          time.sleep(0.01)
        shutil.move(folder, self.root / 'away')
        if replace:
          folder.write_text('')
      return put(*args)

    self.enterContext(mock.patch.object(workload_lib, 'put', put_and_break))
    return folder

  def test_a_folder_that_is_replaced_during_the_run_is_one_line(self):
    folder = self.break_checkpoints(replace=True)
    with self.assertRaisesRegex(
      errors.UserError, 'Cannot save step 6 in .*: N'
    ):
      self.train('w', train={'checkpoint_every': 3})
    folder.unlink()
    shutil.move(self.root / 'away', folder)
    self.train('w', train={'checkpoint_every': 3})
    self.assertLen(self.losses('w'), 6)

  def test_a_folder_that_is_removed_during_the_run_is_made_again(self):
    folder = self.break_checkpoints(replace=False)
    self.train('w', train={'checkpoint_every': 3})
    self.assertTrue((folder / '6').exists())
    self.assertLen(self.losses('w'), 6)

  @contextlib.contextmanager
  def poison(self, *calls):
    """Gives the batches of some calls a loss that is NaN."""
    put, count = workload_lib.put, itertools.count(1)
    bad = tiny.MODEL.vocab_size - 1  # no byte, so that no text has it

    def poisoned_put(batch, mesh):
      if next(count) in calls:
        batch = {**batch, 'targets': np.full_like(batch['targets'], bad)}
      return put(batch, mesh)

    def token_loss(outputs, targets):
      loss = evaluation.cross_entropy(outputs, targets)
      return jnp.where(targets == bad, jnp.nan, loss)

    with (
      mock.patch.object(workload_lib, 'put', poisoned_put),
      mock.patch.object(text_workload, 'token_loss', token_loss),
    ):
      yield

  def test_bad_steps_are_left_out_and_resume_exactly(self):
    with self.poison(3, 4):
      self.train('straight')
    losses = self.losses('straight')
    self.assertEqual([s for s, x in losses.items() if x is None], [3, 4])
    with self.poison(3), self.signal_at(signal.SIGTERM, 3):
      with self.assertRaises(SystemExit):
        self.train('cut')
    with self.poison(1):
      self.train('cut')
    self.assertEqual(self.losses('cut'), losses)
    self.assertEqual(self.checksums('cut'), self.checksums('straight'))
    lines = metrics.read_metrics(self.root / 'cut' / 'metrics.jsonl')
    self.assertEqual([x['skipped'] for x in lines if 'skipped' in x][-1], 2)

  @parameterized.parameters(
    (0, 'loss is nan at step 4; the checkpoint of step 3 stays in .* Lower'),
    (1, r'step 5, and 1 steps before it were skipped \(train.max_skipped\); '),
  )
  def test_too_many_bad_steps_end_the_run(self, max_skipped, message):
    train = {'max_skipped': max_skipped}
    with self.signal_at(signal.SIGTERM, 3), self.assertRaises(SystemExit):
      self.train('w', train=train)
    with (
      self.poison(1, 2, 3),
      self.assertRaisesRegex(errors.UserError, message),
    ):
      self.train('w', train=train)
    self.assertEqual(self.steps('w'), [3])

  def test_goes_on_before_a_damaged_checkpoint(self):
    self.train('straight', train={'checkpoint_every': 2})
    self.train('w', train={'checkpoint_every': 2})
    folder = self.root / 'w' / 'checkpoints' / '6'
    for path in folder.glob('params/**/d/*'):
      path.write_bytes(path.read_bytes()[:-100])
    with self.assertLogs(level='WARNING') as logs:
      self.train('w', train={'checkpoint_every': 2})
    self.assertRegex(logs.output[-1], '/6 .*Going on from step 4.')
    self.assertEqual(self.steps('w'), [4, 6])
    self.assertTrue((self.root / 'w' / 'checkpoints_damaged' / '6').exists())
    self.assertEqual(self.losses('w'), self.losses('straight'))
    self.assertEqual(self.checksums('w'), self.checksums('straight'))

  def test_a_state_that_is_not_finite_is_never_saved(self):
    with self.assertRaisesRegex(
      errors.UserError, 'is not finite after step 1; there is no checkpoint yet'
    ):
      # The loss of step 1 is still finite: its update is not.
      self.train(
        'w',
        train={
          'learning_rate': 1e38,
          'weight_decay': 1e38,
          'warmup_steps': 0,
          'checkpoint_every': 1,
        },
      )
    self.assertEqual(self.steps('w'), [])

  def test_refuses_a_run_that_is_longer_than_asked_for(self):
    with self.signal_at(signal.SIGTERM, 3), self.assertRaises(SystemExit):
      self.train('w')
    with self.assertRaisesRegex(errors.UserError, 'step 3, past .*num_steps=2'):
      self.train('w', train={'num_steps': 2})

  def test_refuses_a_model_without_room_for_the_tokens(self):
    with self.assertRaisesRegex(
      errors.UserError, 'model.vocab_size to at .*257'
    ):
      self.train('w', model={'vocab_size': 256})

  @pytest.mark.slow
  def test_killed_in_the_middle_of_a_save(self):
    script = textwrap.dedent("""
      import os, pathlib, signal, sys, threading
      import jax
      jax.config.update('jax_platforms', 'cpu')
      jax.config.update('jax_num_cpu_devices', 8)
      from nested_learning import training
      from tests.training import tiny

      root, workdir = (pathlib.Path(x) for x in sys.argv[1:3])
      kill = sys.argv[3] == 'kill'
      workdir.mkdir(exist_ok=True)

      def kill_during_save():
        folder = workdir / 'checkpoints'
        while not [p for p in folder.glob('4*') if 'tmp' in p.name]:
          pass
        os.kill(os.getpid(), signal.SIGKILL)

      if kill:
        threading.Thread(target=kill_during_save, daemon=True).start()
      training.train(
        tiny.experiment(root, train={'checkpoint_every': 2}), workdir
      )
    """)
    command = [sys.executable, '-c', script, str(self.root)]
    environment = {**os.environ, 'PYTHONPATH': str(_ROOT)}
    run = lambda name, what: subprocess.run(
      [*command, str(self.root / name), what],
      cwd=_ROOT,
      env=environment,
      capture_output=True,
    )
    self.assertEqual(run('w', 'kill').returncode, -signal.SIGKILL)
    folder = self.root / 'w' / 'checkpoints'
    self.assertNotEmpty([p for p in folder.glob('4*') if 'tmp' in p.name])
    self.assertFalse((folder / '4').exists())
    self.assertTrue((folder / '2').exists())
    resumed = run('w', 'go on')
    self.assertEqual(resumed.returncode, 0, resumed.stderr)
    self.assertIn(b'Going on from step 2', resumed.stderr)
    # A process of its own too: programs of one that has run others may differ
    # in the last bit.
    straight = run('straight', 'go on')
    self.assertEqual(straight.returncode, 0, straight.stderr)
    self.assertEqual(self.losses('straight'), self.losses('w'))
    self.assertEqual(self.checksums('straight'), self.checksums('w'))
