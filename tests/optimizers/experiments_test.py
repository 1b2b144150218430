"""Tests that the optimiser experiments run and write their files."""

import json
import pathlib
import sys
from unittest import mock

from absl.testing import absltest
import pytest

from experiments import report_files
from experiments.benchmarks import optimizer_moves
from experiments.benchmarks import optimizers as benchmark
from experiments.optimizers import compare
from experiments.optimizers import landscape
from experiments.optimizers import least_squares
from experiments.optimizers import orthogonal_tasks
from experiments.optimizers import rules
from nested_learning import errors

LEFT = ('config.json', 'metrics.jsonl', 'report.md', 'summary.json')


class ExperimentsTest(absltest.TestCase):
  def check(self, run, config, plots=()):
    folder = pathlib.Path(self.create_tempdir().full_path)
    run(config, str(folder), 'train')
    for name in (*LEFT, *plots):
      self.assertTrue((folder / name).stat().st_size, name)
    with open(folder / 'summary.json', encoding='utf-8') as file:
      return json.load(file)

  def test_orthogonal_tasks(self):
    summary = self.check(
      orthogonal_tasks.run,
      orthogonal_tasks.OrthogonalTasksConfig(
        num_inputs=8, num_outputs=2, num_steps=20, num_rates=2
      ),
      ['orthogonal_tasks.png'],
    )
    self.assertIn('m3_first_after_second', summary)
    # Gradients of the second task do not move the map on the first one.
    self.assertAlmostEqual(
      summary['gradient_descent_first_after_first'],
      summary['gradient_descent_first_after_second'],
      places=3,
    )

  @pytest.mark.slow
  def test_landscape_and_least_squares(self):
    summary = self.check(
      landscape.run,
      landscape.LandscapeConfig(num_steps=10, num_rates=3),
      ['landscape.png'],
    )
    self.assertLen(summary, 2 * len(rules.NAMES))
    config = least_squares.LeastSquaresConfig(
      num_inputs=6, num_outputs=2, conditions=(10.0,), num_steps=10, num_rates=2
    )
    summary = self.check(least_squares.run, config, ['least_squares.png'])
    self.assertLess(summary['adam_condition_10'], 1)

  @pytest.mark.slow
  def test_compare(self):
    pytest.importorskip('sklearn')
    summary = self.check(
      compare.run,
      compare.get_config('small'),
      ['digits.png', 'language.png'],
    )
    for task in ('digits', 'language'):
      self.assertIn(summary[f'{task}_best'], rules.NAMES)
      for name in rules.NAMES:
        key = f'{task}_{report_files.key(name)}'
        self.assertIn(summary[f'{key}_rate'], (1e-2, 1e-1))
    self.assertLess(summary['digits_adam_validation_loss'], 2.3)  # log 10

  @pytest.mark.slow
  def test_benchmark(self):
    summary = self.check(benchmark.run, benchmark.get_config('small'))
    for name in ('m3_over_muon', 'm3_over_muon_update', 'dgd_overhead'):
      self.assertIsInstance(summary[name], float)
    size = lambda name: summary[f'state_bytes_per_parameter_{name}']
    self.assertAlmostEqual(size('adamw'), 8, places=2)
    self.assertLess(size('m3_bfloat16'), size('muon_bfloat16') + 8)

  @pytest.mark.slow
  def test_moves_of_sharded_parameters(self):
    counts = optimizer_moves.count(2, 32)
    self.assertLen(counts, 6)
    for moves in counts:
      if moves.optimizer == 'M3':
        self.assertEqual(moves.per_stack, 2)
        self.assertEqual(moves.per_stack_slow, 2)
        self.assertEqual(moves.in_loops, 0)
        muon = next(
          other
          for other in counts
          if other.optimizer == 'Muon' and other.side == moves.side
        )
        self.assertLess(4 * moves.sent, muon.sent)

  def test_rejects_bad_arguments(self):
    with self.assertRaisesRegex(errors.UserError, '--mode=eval'):
      report_files.check_mode('eval')
    with self.assertRaisesRegex(errors.UserError, "'cifar' must be"):
      compare.get_config('cifar')
    folder = self.create_tempdir().full_path
    with mock.patch.dict(sys.modules, {'sklearn': None}):
      with self.assertRaisesRegex(errors.UserError, r"'.\[experiments\]'"):
        compare.run(compare.get_config('digits'), folder, 'train')
    config = compare.CompareConfig(tasks=('digit',))
    with self.assertRaisesRegex(errors.UserError, r"tasks \['digit'\] are not"):
      compare.run(config, folder, 'train')


if __name__ == '__main__':
  absltest.main()
