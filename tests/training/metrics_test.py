import contextlib
import dataclasses
import errno
import io
import json
import pathlib
import time
from unittest import mock

from absl.testing import parameterized
import jax.numpy as jnp

from nested_learning.training import metrics
from tests.training import tiny


class MetricsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.config = tiny.experiment(self.root, train={'log_every': 2})

  def report(self, log, step, loss=1.0, norm=2.0, skipped=0, in_a_row=0):
    values = {
      'loss': loss,
      'gradient_norm': norm,
      'skipped': skipped,
      'skipped_in_a_row': in_a_row,
    }
    log.defer(step, {name: jnp.float32(x) for name, x in values.items()})

  def lines(self):
    return metrics.read_metrics(self.root / 'metrics.jsonl')

  def test_writes_every_other_line_one_step_late(self):
    with metrics.RunLog(self.root, self.config) as log:
      for step in (1, 2):
        self.report(log, step, loss=step)
      self.assertEmpty(self.lines())
      self.report(log, 3)
      (line,) = self.lines()
    self.assertEqual((line['step'], line['loss']), (2, 2.0))
    self.assertGreater(line['tokens_per_second'], 0)
    self.assertAlmostEqual(line['learning_rate'], 1e-2)
    self.assertNotEmpty(list((self.root / 'tensorboard').iterdir()))

  def test_a_resumed_run_drops_what_came_after_its_checkpoint(self):
    path = self.root / 'metrics.jsonl'
    written = [{'step': step, 'loss': 1.0} for step in (2, 4, 6)]
    cut = '{"step": 8, "lo'
    path.write_text('\n'.join([*map(json.dumps, written), cut]))
    with metrics.RunLog(self.root, self.config, start=4) as log:
      log.write(5, {'loss': float('nan')})
    *kept, line = self.lines()
    self.assertEqual(kept, written[:2])
    self.assertAlmostEqual(line.pop('time'), time.time(), delta=60)
    self.assertEqual(line, {'step': 5, 'loss': None})

  @parameterized.parameters(
    b'5', b'[1]', b'{"step": "x"}', b'\xff\xfe', b'null'
  )
  def test_a_line_that_is_none_is_dropped(self, line):
    path = self.root / 'metrics.jsonl'
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    self.assertEqual(self.lines(), [{'step': 1}, {'step': 2}])
    with metrics.RunLog(self.root, self.config, start=2) as log:
      log.write(3, {'loss': 1.0})
    self.assertLen(path.read_text().splitlines(), 3)

  @parameterized.parameters('metrics.jsonl', 'tensorboard')
  def test_a_file_that_cannot_be_written_is_reported_once(self, name):
    output = io.StringIO()
    writer = metrics._Lines if name == 'metrics.jsonl' else metrics._Board
    error = OSError(errno.ENOSPC, 'No space left on device')
    with (
      contextlib.redirect_stderr(output),
      metrics.RunLog(self.root, self.config) as log,
      mock.patch.object(writer, 'write', side_effect=error) as write,
    ):
      for step in range(1, 41):
        self.report(log, step)
      log.flush()
    self.assertEqual(write.call_count, 1)
    said = output.getvalue()
    self.assertEqual(said.count('WARNING'), 1)
    self.assertIn(
      f'WARNING: {name} is no longer written: No space left on device.', said
    )
    if name == 'tensorboard':
      self.assertLen([x for x in self.lines() if 'loss' in x], 20)

  @parameterized.parameters('metrics.jsonl', 'tensorboard')
  def test_a_file_that_cannot_be_opened_is_reported(self, name):
    if name == 'tensorboard':
      (self.root / name).write_text('')
    else:
      (self.root / name).mkdir()
    output = io.StringIO()
    with (
      contextlib.redirect_stderr(output),
      metrics.RunLog(self.root, self.config) as log,
    ):
      log.write(2, {'loss': 1.0})
    self.assertIn(f'WARNING: {name} is no longer written: ', output.getvalue())

  def test_tensorboard_is_written_without_waiting(self):
    with metrics.RunLog(self.root, self.config) as log:
      with mock.patch.object(time, 'time', lambda: 0.0):  # a clock set back
        for step in range(100):
          log.write(step, {'loss': float(step)})
    (path,) = (self.root / 'tensorboard').iterdir()
    content = path.read_bytes()
    self.assertIn(b'brain.Event:2', content)
    self.assertEqual(content.count(b'loss'), 100)

  def test_skipped_steps_are_reported_and_counted(self):
    output = io.StringIO()
    with (
      contextlib.redirect_stderr(output),
      metrics.RunLog(self.root, self.config) as log,
    ):
      self.report(log, 1, loss=float('inf'), skipped=1, in_a_row=1)
      self.report(log, 2, norm=8.0, skipped=2, in_a_row=2)
      log.flush()
    for line in (
      'loss is inf at step 1: skipped (1 in a row).\n',
      'gradient_norm is 8 at step 2, above train.spike_factor=None times the '
      'usual: skipped (2 in a row).\n',
    ):
      self.assertIn(line, output.getvalue())
    line, _ = self.lines()
    self.assertEqual(line['skipped'], 2)
    self.assertNotIn('skipped_in_a_row', line)
    self.assertAlmostEqual(line['learning_rate'], 5e-3)  # of the first step

  @parameterized.parameters(
    (0, 1, 'loss is nan at step 7$'),
    (2, 3, 'loss is nan at step 7, and 2 steps before it were skipped'),
  )
  def test_one_too_many_is_raised(self, max_skipped, in_a_row, message):
    train = dataclasses.replace(self.config.train, max_skipped=max_skipped)
    config = dataclasses.replace(self.config, train=train)
    with metrics.RunLog(self.root, config) as log:
      self.report(log, 7, float('nan'), skipped=in_a_row, in_a_row=in_a_row)
      with self.assertRaisesRegex(FloatingPointError, message):
        log.flush()
