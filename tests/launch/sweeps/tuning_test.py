"""Tests of the search of one field before the seeds."""

import functools
import json
import pathlib
import re

from absl.testing import parameterized

from launch import sweeps
from launch.sweeps import results
from launch.sweeps import tuning
from nested_learning import errors
from tests.launch.sweeps import toy


class TuningTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.create_tempdir().full_path
    self.spec = toy.write_experiment(folder, f'tune_{self._testMethodName}')
    self.workdir = pathlib.Path(folder, 'sweep')

  def _write(self, cell, *losses):
    """Writes a result for each seed; None is a run that failed."""
    for seed, loss in enumerate(losses):
      folder = self.workdir / 'cells' / cell / f'seed_{seed}'
      folder.mkdir(parents=True, exist_ok=True)
      if loss is None:
        (folder / 'error.txt').write_text('out of memory')
      else:
        (folder / 'summary.json').write_text(json.dumps({'loss': loss}))

  def _make_record(self, *grid, **changes):
    changes = {'metrics': ('loss',), 'num_seeds': 3, 'tune': 'size'} | changes
    return toy.make_record(self.spec, *grid, **changes)

  def _list_due(self, record, only='*'):
    runs = sweeps.list_runs(record, self.workdir)
    due, waiting = sweeps.list_due(record, self.workdir, runs, only=only)
    return [run.name for run in due if not run.finished], waiting

  def test_cells_are_those_of_the_grid(self):
    grid = ('text=a,b', 'size=1,2')
    tuned = sweeps.Sweep(grid=grid[:1], tune=grid[1])
    self.assertEqual(
      sweeps.make_cells(self.spec, tuned),
      sweeps.make_cells(self.spec, sweeps.Sweep(grid=grid)),
    )
    swapped = sweeps.as_grid(tuned, ('size', 'text'))
    self.assertEqual(swapped, grid[::-1])
    with self.assertRaisesRegex(errors.UserError, 'has text twice'):
      sweeps.Sweep(grid=grid, tune='text=c')

  def test_numbers_are_tried_from_the_largest_down(self):
    make = functools.partial(
      self._make_record, 'size=1,2,4,8,16', descends=True
    )
    record = make()
    self.assertEqual(
      self._list_due(record), (['size=8/seed_0', 'size=16/seed_0'], ['config'])
    )
    self._write('size=16', 'nan')
    self.assertEqual(self._list_due(record), (['size=8/seed_0'], ['config']))
    self._write('size=8', 'nan')
    self.assertEqual(self._list_due(record), (['size=4/seed_0'], ['config']))
    self._write('size=4', 2.0)
    self.assertEqual(self._list_due(record), (['size=2/seed_0'], ['config']))
    self._write('size=2', 3.0)  # worse, so that 1 is not tried
    expected = ['size=4/seed_1', 'size=4/seed_2']
    self.assertEqual(self._list_due(record), (expected, []))
    largest = make(metrics=('loss:max',))
    self.assertEqual(self._list_due(largest), (['size=1/seed_0'], ['config']))

  def test_largest_value_wins_after_two(self):
    record = self._make_record('size=1,2,4', descends=True)
    self._write('size=4', 1.0)
    self._write('size=2', 2.0)
    expected = ['size=4/seed_1', 'size=4/seed_2']
    self.assertEqual(self._list_due(record), (expected, []))
    # One that is added beside it is tried as well.
    record = self._make_record('size=1,2,4,8', descends=True)
    self.assertEqual(self._list_due(record), (['size=8/seed_0'], ['config']))

  def test_values_without_an_order_are_all_tried(self):
    record = self._make_record('text=a,b,c', tune='text', descends=True)
    self._write('text=a', 1.0)
    due = ['text=b/seed_0', 'text=c/seed_0']
    self.assertEqual(self._list_due(record), (due, ['config']))

  def test_seeds_of_the_best_value_when_all_are_tried(self):
    record = self._make_record('size=1,2,4')
    seed_0 = [f'size={value}/seed_0' for value in (1, 2, 4)]
    self.assertEqual(self._list_due(record), (seed_0, ['config']))
    self._write('size=1', 3.0)
    self._write('size=4', 1.0)
    self.assertEqual(self._list_due(record), (seed_0[1:2], ['config']))
    self._write('size=2', 2.0)
    expected = ['size=4/seed_1', 'size=4/seed_2']
    self.assertEqual(self._list_due(record), (expected, []))
    largest = self._make_record('size=1,2,4', metrics=('loss:max',))
    expected = ['size=1/seed_1', 'size=1/seed_2']
    self.assertEqual(self._list_due(largest), (expected, []))

  def test_rows_and_points_have_searches_of_their_own(self):
    record = self._make_record('text=a,b', 'size=1,2', num_seeds=2)
    for cell, loss in (
      ('text=a,size=1', 1.0),
      ('text=a,size=2', 2.0),
      ('text=b,size=1', 2.0),
      ('text=b,size=2', 1.0),
    ):
      self._write(cell, loss)
    due, _ = self._list_due(record)
    self.assertEqual(due, ['text=a,size=1/seed_1', 'text=b,size=2/seed_1'])

  @parameterized.parameters(
    ({'1': 'nan', '2': 5.0, '4': None}, '2'),
    ({'1': '-inf', '2': 5.0, '4': 4.0}, '4'),
    ({'1': None, '2': 5.0, '4': 5.0}, '2'),  # the first of equal ones
    ({'1': None, '2': 'nan', '4': 'inf'}, None),
  )
  def test_neither_diverged_nor_failed_runs_win(self, losses, best):
    record = self._make_record('size=1,2,4')
    for value, loss in losses.items():
      self._write(f'size={value}', loss)
    found = results.read(record, self.workdir)
    (search,) = tuning.search(record, found)
    self.assertEqual(search.best, best)
    due, waiting = self._list_due(record)
    self.assertEmpty(waiting)
    due = [name for name in due if not name.endswith('seed_0')]
    expected = [f'size={best}/seed_{seed}' for seed in (1, 2)] if best else []
    self.assertEqual(due, expected)

  def test_run_that_is_named_is_due(self):
    record = self._make_record('size=1,2')
    due, _ = self._list_due(record, only='size=2/seed_1')
    self.assertIn('size=2/seed_1', due)

  @parameterized.parameters(((),), (('steps', 'loss'),))
  def test_refuses_a_metric_without_a_best_value(self, metrics):
    record = self._make_record('size=1,2', metrics=metrics)
    with self.assertRaisesRegex(errors.UserError, '--metrics=loss:min'):
      self._list_due(record)

  def test_grid_becomes_tuned_in_the_same_folder(self):
    stored = self._make_record('size=4', tune='')
    record = sweeps.update(self._make_record('size=1,2'), stored)
    self.assertEqual(record.tune, 'size')
    names = [cell.name for cell in record.cells]
    self.assertEqual(names, ['size=4', 'size=1', 'size=2'])

  def _collect(self, record):
    sweeps.collect(record, self.workdir)
    page = (self.workdir / 'README.md').read_text()
    self.page = re.sub(' +', ' ', page)  # without the blanks that align it
    self.summary = json.loads((self.workdir / 'summary.json').read_text())

  def test_page_has_the_best_values(self):
    record = self._make_record('text=a,b,c', 'size=1,2,4')
    self._write('text=a,size=1', 3.0, 9.0)  # the rest of an earlier grid
    self._write('text=a,size=2', 1.0, 2.0, 3.0)
    self._write('text=a,size=4', None)
    self._write('text=b,size=1', 4.0)
    self._write('text=b,size=2', 'nan')
    self._write('text=b,size=4', 2.0, 3.0)
    self._write('text=c,size=1', 0.5)
    self._collect(record)
    self.assertIn('| cell | size | loss | seeds |', self.page)
    self.assertIn('| text=a | 2 | **2 ± 1** | 3 of 3 |', self.page)
    self.assertIn('| text=b | 4 | 2.5 ± 0.71 | 2 of 3 |', self.page)
    self.assertIn('| text=c | – | – | – |', self.page)
    self.assertIn('| cell | 1 | 2 | 4 |', self.page)
    self.assertIn('| text=a | 3 | **1** | failed |', self.page)
    self.assertIn('| text=b | 4 | diverged | **2** |', self.page)
    self.assertIn('| text=c | 0.5 | – | – |', self.page)
    self.assertIn('the values tried: text=b (4).**', self.page)
    self.assertIn('lowest loss is that of text=a. No different', self.page)
    # Nine of seed 0, two more of text=a and of text=b, and the earlier one.
    self.assertIn('10 of 14 runs are finished', self.page)
    self.assertEqual(self.summary['text=a/loss'], 2.0)
    self.assertEqual(self.summary['text=a/loss/spread'], 1.0)
    self.assertEqual(self.summary['text=b/size'], 4.0)
    self.assertNotIn('text=c/size', self.summary)
    lines = (self.workdir / 'results.csv').read_text().splitlines()
    self.assertLen(lines, 1 + 14)
    self.assertIn('"text=a,size=1",1,finished,,a,1,9.0', lines)

  def test_values_without_an_order_have_no_ends(self):
    record = self._make_record('text=a,b', tune='text')
    self._write('text=a', 1.0, 2.0)
    self._write('text=b', 2.0)
    self._collect(record)
    self.assertIn('| config | a | 1.5 ± 0.71 | 2 of 3 |', self.page)
    self.assertNotIn('the values tried', self.page)
    self.assertEqual(self.summary['config/text'], 'a')
