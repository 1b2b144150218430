"""The small suite: its tables, its page, and how it runs."""

import json
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from experiments.small import report
from experiments.small import running
from experiments.small import suite
from launch import sweeps
from nested_learning import errors

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# A run that writes what its own name says; that of the Transformer breaks.
_RUN = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
if 'transformer' in str(folder):
  raise MemoryError('too large')
with open(folder / 'times.txt', 'a') as file:
  file.write('x')
numbers = {'accuracy': 0.97, 'all_right': 0.5, 'seconds': 60.0}
numbers |= {'num_parameters': 1234, 'all_right_2x': 0.25, 'device': 'cpu'}
(folder / 'summary.json').write_text(json.dumps(numbers))
"""


class SuiteTest(parameterized.TestCase):
  def test_every_run_is_a_config_with_its_seeds(self):
    cells = suite.make_cells() + suite.make_cells(quick=True)
    loaded = sweeps.load_cells(
      cells, num_seeds=2, seed_fields=('seed', 'data.seed')
    )
    for (_, seed), (_, config) in loaded.items():
      self.assertEqual((config.seed, config.data.seed), (seed, seed))
    for cell, (name, _, num_steps) in zip(cells, suite.RUNS, strict=False):
      _, config = loaded[cell.name, 0]
      self.assertEqual(config.train.num_steps, num_steps)
      self.assertEqual(config.data.longer, suite.TASKS[name].longer)

  def test_tables_name_what_there_is(self):
    rows = {(task, family) for task, family, _ in suite.RUNS}
    self.assertLen(rows, len(suite.RUNS))
    self.assertEqual({task for task, _ in rows}, set(suite.TASKS))
    for gate in suite.GATES:
      self.assertIn((gate.task, gate.family), rows)
      self.assertIn(gate.key, suite.TASKS[gate.task].columns)
    for task, column in suite.PRINTED.items():
      self.assertLessEqual({(task, family) for family in column.values}, rows)
    for task in suite.TASKS.values():
      for key in task.columns:
        _, factor = report.split_key(key)
        self.assertIn(factor, ('', *(f'{n}x' for n in task.longer)))

  @parameterized.parameters(
    (['hope', 'mqar'], 'task == "mqar" and family == "hope"'),
    (['hope', 'titans'], 'family in ("hope", "titans")'),
    (['hope.mqar', 'parity'], 'task == "parity" or row == "hope.mqar"'),
    ([], 'True'),
  )
  def test_part(self, only, rule):
    cells = suite.make_cells()
    expected = []
    for cell in cells:
      family, task = cell.row.split('.')
      if eval(rule, {'family': family, 'task': task, 'row': cell.row}):
        expected.append(cell)
    self.assertEqual(list(suite.select(cells, only)), expected)

  @parameterized.parameters(
    (['hop'], 'not a family or task .* the nearest is hope'),
    (['gated_deltanet', 'parity'], r"no run of \['gated_deltanet'\]"),
  )
  def test_no_part(self, only, message):
    with self.assertRaisesRegex(errors.UserError, message):
      suite.select(suite.make_cells(), only)

  def test_other_settings_are_other_runs(self):
    names = [cell.name for cell in suite.make_cells()]
    self.assertEqual(names, [cell.name for cell in suite.make_cells()])
    quick = {cell.name for cell in suite.make_cells(quick=True)}
    self.assertTrue(quick.isdisjoint(names))

  def test_gates_hold_with_every_seed_and_not_without_any(self):
    solved = suite.Gate('mqar', 'hope', 'accuracy', at_least=0.95)
    self.assertTrue(solved.passed([0.95, 1.0]))
    self.assertFalse(solved.passed([0.94, 1.0]))
    self.assertFalse(solved.passed([float('nan')]))
    self.assertIsNone(solved.passed([]))
    unsolved = suite.Gate('mqar', 'hope', 'accuracy', below=0.5)
    self.assertTrue(unsolved.passed([0.49]))
    self.assertFalse(unsolved.passed([0.5]))


class RunningTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path, 'small')

  def _run(self, **options):
    options = running.Options(self.workdir, jobs=2, **options)
    command = lambda run: [sys.executable, '-c', _RUN, str(run.folder)]
    code = running.run(options, command)
    results = options.results or self.workdir / 'results'
    page = (results / 'README.md').read_text()
    self.page = re.sub(' +', ' ', page)  # tables are padded
    self.summary = json.loads((results / 'summary.json').read_text())
    self.images = sorted(path.name for path in results.glob('*.png'))
    return code

  def test_models_may_have_more_seeds_than_others(self):
    self.assertEqual(self._run(only=('deltanet.mqar',), seeds=2), 0)
    self.assertEqual(self._run(only=('deltanet.mqar', 'titans.mqar')), 0)
    times = [path.read_text() for path in self.workdir.rglob('times.txt')]
    self.assertEqual(times, ['x'] * 3)
    self.assertEqual(self.summary['finished'], 3)
    self.assertIn('- seeds: 1 to 2\n', self.page)

  def test_finished_runs_stay_and_failed_ones_are_listed(self):
    only = ('mqar', 'transformer', 'linear_attention', 'deltanet')
    self.assertEqual(self._run(only=only, seeds=2), 1)
    self.assertEqual(self._run(only=only), 1)
    times = [path.read_text() for path in self.workdir.rglob('times.txt')]
    self.assertEqual(times, ['x'] * 4)
    self.assertEqual(self.summary['finished'], 4)
    self.assertEqual(self.summary['failed'], 2)
    self.assertEqual(self.summary['seeds'], 2)
    self.assertEqual(self.summary['deltanet.mqar'], 0.97)
    self.assertEqual(self.summary['deltanet.mqar.spread'], 0.0)
    self.assertEqual(self.summary['deltanet.mqar.all_right_2x'], 0.25)
    self.assertNotIn('transformer.mqar', self.summary)
    gate = 'gate.linear_attention.mqar.all_right'
    self.assertEqual(self.summary[gate], 'failed')
    self.assertEqual(self.summary['gate.deltanet.mqar.accuracy'], 'passed')
    self.assertIn('below 50 % | 50.0, 50.0 | **failed** |', self.page)
    self.assertIn('at least 95 % | 97.0, 97.0 | passed |', self.page)
    row = '| deltanet | 97.0 ± 0.0 | 50.0 ± 0.0 | – | 25.0 ± 0.0 | 1,234 | 2 of'
    self.assertIn(row, self.page)
    self.assertIn('| transformer | – | – | – | – | – | 0 of 2, **2', self.page)
    self.assertRegex(self.page, r'- transformer.mqar-\w+/seed_0: MemoryError')
    self.assertIn('- minutes, the sum over the runs: 4\n', self.page)
    self.assertRegex(self.page, r'- machine: \d+ cores, .*, 2 runs at a')
    self.assertEqual(self.images, ['mqar.png'])

  def test_printed_numbers_stand_beside_ours_as_of_another_scale(self):
    results = self.workdir / 'page'
    self.assertEqual(self._run(only=('hope.parity',), results=results), 0)
    self.assertIn('| 1 of 1 | 100 / 100 |', self.page)
    self.assertIn('Table 5', self.page)
    self.assertIn('**Another scale**', self.page)
    self.assertEqual(self.summary['hope.parity'], 0.25)

  @pytest.mark.slow
  def test_the_command_trains(self):
    command = [
      sys.executable,
      str(_ROOT / 'experiments' / 'bench_small.py'),
      '--quick',
      '--only=linear_attention.mqar,transformer.regression',
      f'--workdir={self.workdir}',
    ]
    subprocess.run(command, check=True)
    results = self.workdir / 'results'
    summary = json.loads((results / 'summary.json').read_text())
    self.assertEqual(summary['finished'], 2)
    self.assertBetween(summary['linear_attention.mqar'], 0, 1)
    self.assertGreater(summary['transformer.regression'], 0)
    self.assertTrue((results / 'regression.png').stat().st_size)


if __name__ == '__main__':
  absltest.main()
