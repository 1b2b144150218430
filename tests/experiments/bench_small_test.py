"""The small suite: its tasks, its page, and the command."""

import contextlib
import io
import json
import pathlib
import re
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized
import pytest

from experiments import bench_small
from experiments.small import report
from experiments.small import suite
from launch import programs
from launch import sweeps
from nested_learning import configs
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from tests.experiments import page_numbers

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FILE = str(_ROOT / 'experiments' / 'small' / 'suite.py')


def _keep(results, task, **scores):
  """Writes the files of a sweep: scores by family, seed and length."""
  summary, runs = {}, {}
  for family, by_seed in scores.items():
    summary[f'{family}/train.learning_rate'] = 0.004
    for rate in ('2e-3', '4e-3'):
      for seed, (score, longer) in enumerate(by_seed):
        values = {'accuracy': score, 'all_right': score}
        values |= {'all_right_2x': longer, 'accuracy_2x': longer}
        values |= {'num_parameters': 1234, 'train_seconds': 60.5 + seed}
        line = {'step': 5, 'validation/accuracy': score}
        runs[f'{family},learning_rate={rate}/seed_{seed}'] = {
          'source': [{'commit': 'abcdef1', 'date': '2026-01-01'}],
          'summary': values if rate == '4e-3' else {'accuracy': 0.123},
          'evaluations': [line],
        }
  folder = results / task
  folder.mkdir(parents=True)
  (folder / 'summary.json').write_text(json.dumps(summary))
  lines = [f'"{name.replace("/seed_", chr(34) + ",")}' for name in runs]
  (folder / 'results.csv').write_text('\n'.join(['cell,seed', *lines]))
  runs['hope,learning_rate=4e-3/seed_7'] = {  # of earlier settings
    'source': [],
    'summary': {'accuracy': 0.456},
  }
  (folder / 'runs.json').write_text(json.dumps({'base': {}, 'runs': runs}))


class SuiteTest(parameterized.TestCase):
  @parameterized.parameters(*suite.TASKS)
  def test_models_of_a_task_differ_in_the_model_only(self, name):
    spec = f'{_FILE}:{name}'
    sweep = sweeps.load_sweep(spec)
    self.assertEqual([row.name for row in sweep.rows], list(suite.FAMILIES))
    configs_by_family = {
      row.name: configs.load(f'{_FILE}:{row.arg}') for row in sweep.rows
    }
    first = configs_by_family['hope']
    sizes = []
    for config in configs_by_family.values():
      for field in configs.differences(config, first):
        self.assertRegex(field, r'^(model\.|name$)')
      sizes.append(parameters.count(models.make_model(config.model).table))
    self.assertLess(max(sizes), 1.03 * min(sizes))
    task = suite.TASKS[name]
    self.assertEqual(first.train.num_steps, task.num_steps)
    self.assertEqual(first.data.longer, task.longer)
    self.assertEqual(first.train.num_steps % first.train.evaluate_every, 0)
    self.assertEqual(sweep.tune, 'train.learning_rate=1e-3,2e-3,4e-3,8e-3')

  def test_tables_name_what_there_is(self):
    for gate in suite.GATES:
      self.assertIn(gate.family, suite.FAMILIES)
      self.assertIn(gate.key, suite.TASKS[gate.task].columns)
    for task, column in suite.PRINTED.items():
      self.assertIn(task, suite.TASKS)
      self.assertLessEqual(set(column.values), set(suite.FAMILIES))
    for task in suite.TASKS.values():
      for key in task.columns:
        factor = re.search(r'_(\d+)x$', key)
        self.assertTrue(factor is None or int(factor[1]) in task.longer)

  @parameterized.parameters(
    ([], False, suite.DEFAULT_TASKS, suite.DEFAULT_FAMILIES),
    ([], True, suite.TASKS, suite.FAMILIES),
    (['titans', 'mqar'], False, ['mqar'], ['titans']),
    (['titans'], False, suite.DEFAULT_TASKS, ['titans']),
    (['parity', 'aa'], True, ['parity', 'aa'], suite.FAMILIES),
  )
  def test_selects(self, only, everything, names, families):
    found, chosen = suite.select(only, everything=everything)
    self.assertCountEqual(found, names)
    self.assertCountEqual(chosen, families)

  @parameterized.parameters(
    lambda: suite.select(['hop']),
    lambda: suite.get_config('parity,hop'),
    lambda: suite.get_sweep('parit'),
  )
  def test_refuses(self, call):
    with self.assertRaisesRegex(errors.UserError, 'the nearest is|nearest are'):
      call()

  def test_gates_hold_with_every_seed_and_not_without_any(self):
    solved = suite.Gate('mqar', 'hope', 'accuracy', at_least=0.95)
    self.assertTrue(solved.passed([0.95, 1.0]))
    self.assertFalse(solved.passed([0.94, 1.0]))
    self.assertFalse(solved.passed([float('nan')]))
    self.assertIsNone(solved.passed([]))
    unsolved = suite.Gate('mqar', 'hope', 'accuracy', below=0.5)
    self.assertTrue(unsolved.passed([0.49]))
    self.assertFalse(unsolved.passed([0.5]))


class ReportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def _write(self):
    verdicts = report.write(self.folder)
    page = page_numbers.read_text(self.folder)
    self.page = re.sub(' +', ' ', page)  # tables are padded
    self.summary = json.loads((self.folder / 'summary.json').read_text())
    # The page has the numbers of summary.json only.
    self.assertEqual(page_numbers.wrong_anywhere(self.folder), [])
    return {
      f'{gate.family} {gate.task} {gate.key}': verdict
      for gate, verdict in verdicts.items()
    }

  def test_models_that_have_not_learned_are_not_compared(self):
    _keep(
      self.folder,
      'parity',
      hope=[(1.0, 0.97), (0.99, 0.96)],
      transformer=[(0.9, 0.5), (0.8, 0.25)],
      deltanet=[(0.97, 0.5), (0.96, 0.25)],
    )
    verdicts = self._write()
    gate = verdicts['transformer parity all_right_2x']
    self.assertEqual((gate.word, gate.failed), ('not trained', False))
    self.assertEqual(verdicts['hope parity all_right_2x'].word, 'passed')
    row = r'\| transformer \| \*\*not trained\*\* \| 85.0 ± 7.1 \| .*\| 4e-3 \|'
    self.assertRegex(self.page, row)
    self.assertRegex(self.page, r'\| hope \| \| 99.5 ± 0.7 \| .*100 / 100 \|')
    self.assertIn('The highest answers right is that of hope. ', self.page)
    for sentence in re.findall('The highest .*', self.page):
      self.assertNotIn('transformer', sentence)
    self.assertIn('**Another scale**', self.page)
    self.assertIs(self.summary['parity/transformer/learned'], False)
    self.assertAlmostEqual(self.summary['parity/deltanet/accuracy'], 0.965)
    self.assertIn('- commit: abcdef1\n', self.page)
    self.assertTrue((self.folder / 'parity.png').stat().st_size)

  def test_a_baseline_that_has_not_learned_fails_its_gate(self):
    _keep(
      self.folder,
      'mqar_rewritten',
      convolved_transformer=[(0.1, 0.1)],
      linear_attention=[(0.95, 0.9)],
      hope=[(0.5, 0.1)],
    )
    verdicts = self._write()
    self.assertTrue(
      verdicts['convolved_transformer mqar_rewritten accuracy'].failed
    )
    self.assertTrue(
      verdicts['linear_attention mqar_rewritten all_right'].failed
    )
    self.assertIn('| 95.0 | **failed** |', self.page)
    self.assertIn('no comparison', self.page)
    key = 'gate/mqar_rewritten/convolved_transformer/accuracy'
    self.assertEqual(self.summary[key], 'failed')
    self.assertEqual(self.summary[f'{key}/seed_0'], 0.1)


class CommandTest(absltest.TestCase):
  def test_fails_with_a_gate_of_its_models_or_a_sweep(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    scores = {'convolved_transformer': [(0.1, 0.1)], 'hope': [(1.0, 1.0)]}
    _keep(folder, 'mqar_rewritten', **scores)
    for family, code, expected in (
      ('hope', 0, ''),
      ('hope', 1, 'hope on mqar_rewritten: exit code 1\n'),
      (
        'convolved_transformer',
        0,
        'convolved_transformer on mqar_rewritten: the gate does not hold\n',
      ),
    ):
      with (
        flagsaver.as_parsed(
          only=f'{family},mqar_rewritten', results=str(folder)
        ),
        mock.patch.object(programs, 'call', return_value=code) as call,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
      ):
        self.assertEqual(bench_small._run(), int(bool(expected)))
      self.assertEqual(err.getvalue(), expected)
      command, _ = call.call_args.args
      self.assertIn(f'--only={family},*', command)
      self.assertIn(f'--results={folder}/mqar_rewritten', command)
      self.assertIn('--seeds=3', command)
    with (
      flagsaver.as_parsed(only='hope,mqar_rewritten', results=str(folder)),
      mock.patch.object(programs, 'call', return_value=-15),
      contextlib.redirect_stdout(io.StringIO()),
    ):
      self.assertEqual(bench_small._run(), 143)

  @pytest.mark.slow
  def test_trains_resumes_and_fails_with_a_gate(self):
    workdir = pathlib.Path(self.create_tempdir().full_path, 'small')
    command = [
      sys.executable,
      str(_ROOT / 'experiments' / 'bench_small.py'),
      '--quick',
      '--seeds=2',
      '--only=deltanet,mqar_rewritten',
      f'--workdir={workdir}',
    ]
    for _ in range(2):
      run = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT)
      self.assertEqual(run.returncode, 1)  # two steps are not enough
      self.assertIn('deltanet on mqar_rewritten: the gate', run.stderr)
    starts = list(workdir.rglob('started.jsonl'))
    self.assertLen(starts, 5)  # four rates, and another seed of the best one
    for path in starts:
      self.assertLen(path.read_text().splitlines(), 1)
    results = workdir / 'results'
    summary = json.loads((results / 'summary.json').read_text())
    self.assertBetween(summary['mqar_rewritten/deltanet/accuracy'], 0, 1)
    kept = json.loads((results / 'mqar_rewritten' / 'runs.json').read_text())
    for entry in kept['runs'].values():
      self.assertEqual(entry['evaluations'][-1]['step'], 2)
