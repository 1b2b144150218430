"""Tests of the page, the tables and the plots of a sweep."""

import contextlib
import csv
import json
import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from launch import sweeps
from launch.sweeps import report
from launch.sweeps import results
from tests.launch.sweeps import toy


class CollectTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.create_tempdir().full_path
    name = 'collect_' + self._testMethodName
    self.spec = toy.write_experiment(folder, name)
    self.workdir = pathlib.Path(folder, 'sweep')

  def _write(self, cell, seed, text, name='summary.json'):
    folder = self.workdir / 'cells' / cell / f'seed_{seed}'
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(text, str):
      text = json.dumps(text)
    (folder / name).write_text(text)

  def _collect(self, *grid, **changes):
    record = toy.make_record(self.spec, *grid, **changes)
    self.warnings = sweeps.collect(record, self.workdir)
    page = (self.workdir / 'README.md').read_text()
    self.page = re.sub(' +', ' ', page)  # without the blanks that align it
    self.summary = json.loads((self.workdir / 'summary.json').read_text())

  def test_mean_and_spread_over_the_seeds_there_are(self):
    for seed, loss in enumerate((1.0, 2.0, 4.0)):
      self._write('size=1', seed, {'loss': loss})
    self._write('size=2', 0, {'loss': 2.0})
    self._collect('size=1,2', num_seeds=3)
    self.assertAlmostEqual(self.summary['size=1/loss'], 7 / 3)
    self.assertAlmostEqual(
      self.summary['size=1/loss/spread'], np.std([1, 2, 4], ddof=1)
    )
    self.assertEqual(self.summary['size=2/loss'], 2.0)
    self.assertNotIn('size=2/loss/spread', self.summary)
    self.assertIn('| size=1 | 2.333 ± 1.5 | 3 of 3 |', self.page)
    self.assertIn('| size=2 | **2** | 1 of 3 |', self.page)

  def test_differences_from_the_first_cell_are_taken_seed_by_seed(self):
    for seed, loss in enumerate((1.0, 2.0, 4.0)):
      self._write('size=1', seed, {'loss': loss})
      self._write('size=2', seed, {'loss': loss - 0.1 - 0.01 * seed})
      self._write('size=3', seed, {'loss': 7 / 3})
    self._write('size=4', 0, {'loss': 2.0})
    self._collect('size=1,2,3,4', num_seeds=3)
    self.assertIn('| size=2 | -0.11 ± 0.01 | lower |', self.page)
    self.assertRegex(self.page, r'\| size=3 \| .* ± 1.5 \| no different \|')
    self.assertNotRegex(self.page, r'\| size=[14] \| [^|]* \| no different')
    self.assertAlmostEqual(self.summary['size=2/loss/difference'], -0.11)

  def test_in_a_folder_of_its_own(self):
    self._write('size=1', 0, {'loss': 1.0})
    self._collect('size=1')
    record = toy.make_record(self.spec, 'size=1')
    folder = self.workdir.parent / 'deep' / 'page'
    sweeps.collect(record, self.workdir, folder)
    for path in folder.iterdir():
      same = self.workdir / path.name
      self.assertEqual(path.read_bytes(), same.read_bytes(), path)
    self.assertTrue((folder / 'loss.png').exists())

  def test_the_command_is_that_of_the_whole_sweep(self):
    self._write('size=1', 0, {'loss': 1.0})
    plain = 'python launch/sweep.py --config=x.py --seeds=3 --workdir='
    commands = (
      f"{plain}/a/b/runs --results=/a/page '--only=size=1,*'",
      f'{plain}/a/b/runs --only size=2 --jobs=2 --results /b/page',
      f'{plain}other --results=/a/page -only=*',
    )
    self._collect('size=1,2', commands=commands)
    self.assertIn(f'{plain}/a/b/runs --results=/a/page\n', self.page)
    self.assertNotIn('--only', self.page)
    self.assertNotIn('--jobs', self.page)
    record = toy.make_record(self.spec, 'size=1,2', commands=commands)
    with contextlib.chdir(self.workdir.parent):
      sweeps.collect(record, self.workdir, pathlib.Path('a/page'))
    page = (self.workdir.parent / 'a' / 'page' / 'README.md').read_text()
    lines = [line for line in page.splitlines() if line.startswith('python')]
    self.assertEqual(
      lines,
      [f'{plain}runs --results=a/page', f'{plain}other --results=a/page'],
    )

  def test_damage_stays_with_its_run(self):
    self._write('size=1', 0, '{"loss": 1')
    self._write('size=1', 1, {'loss': 3})
    self._write('size=2', 0, [1])
    self._write('size=2', 1, 'out of luck | today', name='error.txt')
    self._collect('size=1,2', num_seeds=2)
    self.assertEqual(self.summary['failed'], 3)
    self.assertEqual(self.summary['size=1/loss'], 3)
    self.assertIn('| size=2 | – | 0 of 2, **2 failed** |', self.page)
    self.assertIn('out of luck', self.page)
    with open(self.workdir / 'results.csv') as file:
      lines = list(csv.DictReader(file))
    self.assertEqual(
      [line['status'] for line in lines],
      ['failed', 'finished', 'failed', 'failed'],
    )
    self.assertEqual(lines[3]['error'], 'out of luck | today')

  def test_runs_that_diverged_are_not_the_best(self):
    self._write('size=1', 0, {'loss': 'nan', 'steps': 5})
    self._write('size=2', 0, '{"loss": NaN, "steps": 5}')
    self._write('size=3', 0, {'loss': 5.0, 'steps': 5})
    self._write('size=4', 0, {'loss': 9.0, 'steps': 5})
    self._collect('size=1,2,3,4')
    self.assertIn('| cell | loss | seeds |', self.page)  # steps do not differ
    self.assertIn('| size=1 | nan | 1 of 1 |', self.page)
    self.assertIn('| size=3 | **5** | 1 of 1 |', self.page)
    self.assertEqual(self.summary['size=2/loss'], 'nan')

  def test_metrics_choose_the_columns_and_what_is_best(self):
    self._write('size=1', 0, {'loss': 1.0, 'accuracy': 0.5, 'odd': 1, 'x': 2})
    self._write('size=2', 0, {'loss': 2.0, 'accuracy': 0.6, 'odd': 3, 'x': 4})
    metrics = ('accuracy', 'loss:max', 'odd', 'los')
    self._collect('size=1,2', metrics=metrics)
    self.assertIn('| cell | accuracy | loss | odd | seeds |', self.page)
    self.assertIn('| size=2 | **0.6** | **2** | 3 | 1 of 1 |', self.page)
    self.assertEqual(
      self.warnings, ["no run has the metric 'los'; the nearest is loss."]
    )
    self.assertFalse((self.workdir / 'x.png').exists())
    for name in ('accuracy', 'loss', 'odd'):
      png = (self.workdir / f'{name}.png').read_bytes()
      self.assertStartsWith(png, b'\x89PNG')
      self.assertIn(f'({name}.png)', self.page)

  def test_page_of_a_sweep_that_has_not_begun(self):
    self._collect('size=1,2', metrics=('loss',))
    self.assertIn('0 of 2 runs are finished', self.page)
    self.assertEqual(self.summary['finished'], 0)
    self.assertEmpty(self.warnings)


class OutcomeTest(parameterized.TestCase):
  @parameterized.parameters(
    ([1.0, 1.2], [1.1, 1.3], False),
    ([1.0, 1.01], [1.1, 1.11], True),
    ([1.0], [2.0, 2.1], None),
  )
  def test_differ(self, ours, theirs, expected):
    self.assertEqual(sweeps.differ(ours, theirs), expected)

  def test_outcome(self):
    values = {
      'near': [1.1, 1.3],
      'best': [1.0, 1.2],
      'far': [2.0, 2.1],
      'once': [1.1],
      'nan': [1.0, np.nan],
    }
    lowest = sweeps.outcome('loss', 'min', values)
    self.assertStartsWith(lowest, 'The lowest loss is that of best.')
    for sentence in (
      'No different from it by twice the larger spread: near.',
      'Behind it: far.',
      'Diverged: nan.',
      'Not known yet, for lack of seeds: once.',
    ):
      self.assertIn(sentence, lowest)
    highest = sweeps.outcome('score', 'max', values)
    self.assertStartsWith(highest, 'The highest score is that of far.')
    self.assertIn('Behind it: near, best.', highest)
    self.assertEqual(
      sweeps.outcome('loss', 'min', {'a': [np.inf]}), 'Diverged: a.'
    )


class PlotTest(absltest.TestCase):
  def _draw(self, sweep, means):
    cells = sweeps.make_cells('x.py', sweep)
    values = {
      cell.name: results.Statistic(mean, 0.1, 3)
      for cell, mean in zip(cells, means, strict=True)
    }
    (axes,) = report.make_figure('loss', cells, values).axes
    return axes

  def test_numbers_of_the_grid_are_the_x_axis(self):
    grid = ('read=token,chunk', 'size=64,4,16')
    axes = self._draw(sweeps.Sweep(grid=grid), [1, 2, 3, 4, 5, np.nan])
    token, chunk = axes.containers
    np.testing.assert_array_equal(token.lines[0].get_xdata(), [4, 16, 64])
    np.testing.assert_array_equal(token.lines[0].get_ydata(), [2, 3, 1])
    np.testing.assert_array_equal(chunk.lines[0].get_xdata(), [4, 64])
    self.assertEqual(token.get_label(), 'read=token')
    self.assertEqual((axes.get_xlabel(), axes.get_ylabel()), ('size', 'loss'))

  def test_rows_are_below_each_other(self):
    rows = tuple(sweeps.Row(name) for name in 'abc')
    axes = self._draw(sweeps.Sweep(rows=rows), [3, np.nan, 1])
    names = [label.get_text() for label in axes.get_yticklabels()]
    self.assertEqual(names, ['a', 'c'])
    np.testing.assert_array_equal(
      axes.containers[0].lines[0].get_xdata(), [3, 1]
    )
