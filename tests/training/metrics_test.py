import contextlib
import dataclasses
import io
import json
import pathlib

from absl.testing import absltest
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
    self.assertEqual(self.lines(), [*written[:2], {'step': 5, 'loss': None}])

  def test_steps_left_out_are_said_and_counted(self):
    output = io.StringIO()
    with (
      contextlib.redirect_stderr(output),
      metrics.RunLog(self.root, self.config) as log,
    ):
      self.report(log, 1, loss=float('inf'), skipped=1, in_a_row=1)
      self.report(log, 2, norm=8.0, skipped=2, in_a_row=2)
      log.flush()
    for line in (
      'loss is inf at step 1: left out (1 in a row).\n',
      'gradient_norm is 8 at step 2, above train.spike_factor=None times the '
      'usual: left out (2 in a row).\n',
    ):
      self.assertIn(line, output.getvalue())
    (line,) = self.lines()
    self.assertEqual(line['skipped'], 2)
    self.assertNotIn('skipped_in_a_row', line)
    self.assertAlmostEqual(line['learning_rate'], 5e-3)  # of the first step

  @parameterized.parameters(
    (0, 1, 'loss is nan at step 7$'),
    (2, 3, 'loss is nan at step 7, and 2 steps before it were left out'),
  )
  def test_one_too_many_is_raised(self, max_skipped, in_a_row, message):
    train = dataclasses.replace(self.config.train, max_skipped=max_skipped)
    config = dataclasses.replace(self.config, train=train)
    with metrics.RunLog(self.root, config) as log:
      self.report(log, 7, float('nan'), skipped=in_a_row, in_a_row=in_a_row)
      with self.assertRaisesRegex(FloatingPointError, message):
        log.flush()


if __name__ == '__main__':
  absltest.main()
