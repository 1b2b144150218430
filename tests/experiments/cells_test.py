"""Tests that finished measurements are kept, and found again."""

import pathlib

from absl.testing import absltest
import numpy as np

from experiments import cells as cells_lib
from nested_learning import errors


class CellsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.store = cells_lib.open_store(self.folder)
    self.count = 0

  def measure(self, settings, store=None, values=None):
    def make():
      self.count += 1
      return values or {'loss': np.float32(0.5), 'curve': np.array([1, np.nan])}

    return cells_lib.measure(
      store or self.store, 'task', 'cell', settings, make
    )

  def test_finished_cells_are_not_measured_again(self):
    first = self.measure({'steps': 3, 'optimizer': {'decay': 0.9}})
    self.assertEqual(first.values, {'loss': 0.5, 'curve': [1.0, None]})
    self.assertEqual(first.source['command'][:6], 'python')
    again = self.measure({'steps': 3, 'optimizer': {'decay': 0.9, 'new': 1}})
    self.assertEqual((self.count, again), (1, first))

  def test_cells_of_other_settings_are_measured_again(self):
    self.measure({'optimizer': {'decay': 0.9}})
    self.measure({'optimizer': {'decay': 0.8}})
    self.assertEqual(self.count, 2)

  def test_interrupted_cells_leave_nothing(self):
    def stop():
      raise KeyboardInterrupt

    with self.assertRaises(KeyboardInterrupt):
      cells_lib.measure(self.store, 'task', 'cell', {}, stop)
    self.assertEqual(cells_lib.read(self.store, 'task'), {})

  def test_results_keep_cells(self):
    cell = self.measure({'steps': 3})
    results = self.folder / 'results'
    cells_lib.publish(self.store, 'task', results)
    elsewhere = self.folder / 'elsewhere'
    store = cells_lib.open_store(elsewhere, str(results))
    self.assertEqual(cells_lib.read(store, 'task'), {'cell': cell})
    self.assertEqual(self.measure({'steps': 3}, store), cell)
    self.measure({'steps': 4}, store, {'loss': 0.25})
    self.assertEqual(self.count, 2)
    found = cells_lib.read(store, 'task')['cell']  # the run's own comes first
    self.assertEqual(found.values, {'loss': 0.25})

  def test_damaged_files_are_named(self):
    self.measure({})
    (path,) = (self.folder / 'cells' / 'task').glob('*.json')
    path.write_text('{"task": ')
    with self.assertRaisesRegex(errors.UserError, 'cell.json .* remove it'):
      cells_lib.read(self.store, 'task')
