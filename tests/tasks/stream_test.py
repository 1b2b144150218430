"""Tests of batches of a task."""

import dataclasses

from absl.testing import parameterized
import numpy as np

from nested_learning import errors
from nested_learning import tasks

_TASK = tasks.make_config('mqar_small')


def _take(count, **settings):
  names = {field.name for field in dataclasses.fields(tasks.TaskDataConfig)}
  data = {k: settings.pop(k) for k in list(settings) if k in names}
  config = tasks.TaskDataConfig(**{'task': _TASK, 'batch_size': 4, **data})
  batches = tasks.make_iterator(config, **settings)
  return batches, [next(batches) for _ in range(count)]


class StreamTest(parameterized.TestCase):
  def assert_same(self, ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
      self.assertEqual(a.keys(), b.keys())
      for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)

  def test_batch_has_the_arrays_of_text(self):
    _, (batch,) = _take(1)
    self.assertEqual(set(batch), {'tokens', 'targets', 'mask', 'reset'})
    for name, dtype in (
      ('tokens', np.int32),
      ('targets', np.int32),
      ('mask', np.bool_),
      ('reset', np.bool_),
    ):
      self.assertEqual(batch[name].shape, (4, 64))
      self.assertEqual(batch[name].dtype, dtype)
    self.assertEqual(batch['reset'].nonzero()[1].tolist(), [0] * 4)

  def test_batch_consists_of_rows(self):
    _, batches = _take(3)
    data = tasks.TaskDataConfig(_TASK, batch_size=4)
    for step, batch in enumerate(batches):
      for row, tokens in enumerate(batch['tokens']):
        expected = tasks.make_row(data, step * 4 + row).tokens
        np.testing.assert_array_equal(tokens, expected)

  @parameterized.parameters(None, 6)
  def test_restores_the_next_batch(self, num_examples):
    first, _ = _take(3, num_examples=num_examples)
    state = first.get_state()
    second, _ = _take(0, num_examples=num_examples)
    second.set_state(state)
    self.assert_same([next(first)], [next(second)])

  def test_refuses_the_state_of_another_task(self):
    first, _ = _take(1)
    other, _ = _take(0, task=tasks.make_config('mqar_small', num_pairs=8))
    with self.assertRaisesRegex(
      errors.UserError, 'data with task.num_pairs=16, not 8'
    ):
      other.set_state(first.get_state())

  def test_processes_make_the_rows_of_one_batch(self):
    _, whole = _take(2)
    parts = [_take(2, process_index=i, process_count=2)[1] for i in range(2)]
    for step, batch in enumerate(whole):
      joined = {
        name: np.concatenate([part[step][name] for part in parts])
        for name in batch
      }
      self.assert_same([batch], [joined])
    with self.assertRaisesRegex(errors.UserError, 'batch_size=4 .* 3 process'):
      _take(1, process_count=3)

  def test_examples_come_again_in_another_order(self):
    _, batches = _take(4, num_examples=8)
    rows = [tuple(row) for batch in batches for row in batch['tokens']]
    self.assertLen(set(rows[:8]), 8)
    self.assertEqual(set(rows[:8]), set(rows[8:]))
    self.assertNotEqual(rows[:8], rows[8:])
    _, (validation,) = _take(1, num_examples=8, split='validation')
    self.assertEmpty({tuple(row) for row in validation['tokens']} & set(rows))

  def test_longer_rows(self):
    _, (batch,) = _take(1, split='validation', factor=4)
    self.assertEqual(batch['tokens'].shape, (4, 256))

  @parameterized.parameters(
    ({'batch_size': 0}, '^batch_size=0 must be at least 1'),
    ({'num_examples': 0}, '^num_examples=0 must be at least 1'),
    ({'longer': (1,)}, r'^longer=\(1,\) must be factors'),
    ({'seed': -1}, '^seed=-1 must be at least 0'),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      tasks.TaskDataConfig(_TASK, **changes)
