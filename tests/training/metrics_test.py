import json
import pathlib

from absl.testing import absltest
import jax.numpy as jnp

from nested_learning.training import metrics
from tests.training import tiny


class MetricsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.config = tiny.experiment(self.root, train={'log_every': 2})

  def report(self, log, step, loss=1.0):
    log.defer(
      step, {'loss': jnp.float32(loss), 'gradient_norm': jnp.float32(2.0)}
    )

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

  def test_a_loss_that_is_not_finite_is_raised(self):
    with metrics.RunLog(self.root, self.config) as log:
      self.report(log, 1, loss=float('inf'))
      with self.assertRaisesRegex(FloatingPointError, 'loss is inf at step 1'):
        log.flush()


if __name__ == '__main__':
  absltest.main()
