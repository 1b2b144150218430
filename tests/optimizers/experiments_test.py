"""Tests that the optimiser experiments run, resume and write their files."""

import dataclasses
import json
import pathlib
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from experiments import cells as cells_lib
from experiments import report_files
from experiments.benchmarks import optimizer_moves
from experiments.benchmarks import optimizers as benchmark
from experiments.optimizers import classification
from experiments.optimizers import compare
from experiments.optimizers import landscape
from experiments.optimizers import language
from experiments.optimizers import least_squares
from experiments.optimizers import orthogonal_tasks
from experiments.optimizers import rules
from experiments.optimizers import stream_tasks
from experiments.optimizers import streams
from experiments.optimizers import training_report
from experiments.optimizers import trainings
from nested_learning import errors
from nested_learning import training as training_lib

LEFT = ('config.json', 'metrics.jsonl', 'report.md', 'summary.json')
SEARCH = trainings.Search(
  ('M3', 'Muon', 'M3 no second moment', 'M3 no slow momentum'), (0.1, 1.0), 3
)


def make_training(calls, scores=None, num_steps=4):
  """Returns a training of made numbers that notes its calls."""

  def train(optimizer, rate, seed):
    calls.append((optimizer, rate, seed))
    base = (scores or {}).get(optimizer, 1.0)
    score = base + abs(np.log10(rate / 0.01)) + 0.01 * seed
    return {'score': score, 'losses': [score] * num_steps, 'seconds': 1.0}

  return trainings.Training(
    name='made',
    title='Made',
    description='Made numbers.',
    score='score',
    columns={},
    num_steps=num_steps,
    per_entry=1,
    settings=lambda optimizer: {'num_steps': num_steps},
    train=train,
    time=lambda optimizer: {'over_adamw': 2.0, 'state_bytes': 8.0},
  )


class TrainingsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.store = cells_lib.open_store(self.folder)

  def report(self, training):
    task = training_report.make_task(training, SEARCH)
    with mock.patch.object(report_files, 'save_figure') as save:  # takes long
      sections, numbers = task.report(self.store, self.folder)
    self.assertEqual(save.call_count, bool(numbers))
    return '\n'.join(sections), numbers

  def test_search_and_seeds(self):
    calls = []
    trainings.measure(make_training(calls), SEARCH, self.store)
    ours = [call[1:] for call in calls if call[0] == 'M3']
    # Two rates beyond the grid, since the best one was at its end.
    searched = [(0.1, 0), (1.0, 0), (0.01, 0), (0.001, 0)]
    self.assertEqual(ours, [*searched, (0.01, 1), (0.01, 2)])
    trainings.measure(make_training(calls), SEARCH, self.store)
    self.assertLen(calls, 6 * len(SEARCH.names))

  def test_diverged_optimisers_get_no_more_seeds(self):
    calls = []
    made = make_training(calls, {'M3': np.inf})
    trainings.measure(made, SEARCH, self.store)
    rates = [call[1] for call in calls if call[0] == 'M3']
    self.assertEqual(
      rates, [0.1, 1.0, *(float(f'1e-{i}') for i in range(2, 8))]
    )
    text, _ = self.report(made)
    self.assertIn('Diverged: M3.', text)
    self.assertNotIn('cells are finished', text)

  def test_interrupted_searches_go_on_and_say_so(self):
    calls = []
    made = make_training(calls)
    stops = mock.Mock(side_effect=[made.train('M3', 0.1, 0), KeyboardInterrupt])
    with self.assertRaises(KeyboardInterrupt):
      trainings.measure(made._replace(train=stops), SEARCH, self.store)
    text, numbers = self.report(made)
    self.assertIn('**2 of 20 cells are finished.**', text)
    self.assertEqual(numbers['m3_seeds'], 1)
    calls.clear()
    trainings.measure(made, SEARCH, self.store)
    self.assertEqual(calls[0], ('M3', 1.0, 0))
    self.assertLen(calls, 6 * len(SEARCH.names) - 1)

  def test_report_of_parts(self):
    scores = {'Muon': 0.5, 'M3 no second moment': 0.7}
    made = make_training([], scores)
    trainings.measure(made, SEARCH, self.store)
    text, numbers = self.report(made)
    for sentence in (
      'The lowest score is that of Muon.',
      'M3 is worse than Muon.',
      'Its second moment hurts.',
      'Its slow momentum makes no difference.',
      # Seeds of 0, 1 and 2 hundredths, and so a spread of 0.01.
      'Muon has the lowest training loss at equal steps. Muon has the lowest '
      'training loss when AdamW has ended.',
    ):
      self.assertIn(sentence, text)
    self.assertEqual(numbers['m3_rate'], 0.01)
    self.assertAlmostEqual(numbers['m3_spread'], 0.01)

  def test_losses_within_the_spread_are_no_different(self):
    scores = {'Muon': 0.5, 'M3': 0.51}
    made = make_training([], scores)
    trainings.measure(made, SEARCH, self.store)
    text, _ = self.report(made)
    self.assertIn(
      'Muon has the lowest training loss at equal steps; no different: M3.',
      text,
    )

  def test_rates_at_the_edge_are_named(self):
    found = {'M3': [0.1, 1.0], 'Muon': [0.1, 0.01], 'AdamW': [0.1]}
    rates = np.logspace(-2, 1, 4)
    self.assertEqual(
      rules.at_the_edge(found, rates),
      'The best rate is at an end of those tried for Muon.',
    )
    self.assertEqual(rules.at_the_edge({'M3': [0.1]}, rates), '')

  def test_cells_of_other_settings_are_not_reported(self):
    trainings.measure(make_training([]), SEARCH, self.store)
    text, numbers = self.report(make_training([], num_steps=8))
    self.assertIn('**0 of 20 cells are finished.**', text)
    self.assertEqual(numbers, {})

  def test_loss_at_equal_time(self):
    values = {'losses': list(range(24))}
    cell = cells_lib.Cell('made', 'cell', {}, values, {})
    self.assertEqual(trainings.loss_at(cell, 1.0), 22.5)
    self.assertEqual(trainings.loss_at(cell, 0.5), 10.5)
    # A ratio of AdamW to itself is noise, which must not cut it off.
    clock = cells_lib.Cell('made', 'time', {}, {'over_adamw': 2.0}, {})
    for name, expected in (('M3', 10.5), ('AdamW', 22.5)):
      result = trainings.Result(name, {0.1: 1.0}, 0.1, [cell], clock)
      self.assertEqual(trainings.losses_in_time(result), ([22.5], [expected]))

  @parameterized.parameters(
    ([2.05, 2.07], '2.060 ± 0.014'),
    ([0.00011, 0.00013], '0.000120 ± 0.000014'),
    ([3.0846, 3.0847], '3.085 ± 0.000'),
    ([0.5, np.inf], 'diverged'),
    ([0.12345678], '0.1235'),
    ([0.0, 0.0], '0.0000 ± 0.0000'),
    ([-0.138, -0.158], '-0.148 ± 0.014'),
  )
  def test_show(self, values, expected):
    self.assertEqual(trainings.show(values), expected)

  def test_times(self):
    calls = []
    numbers = trainings.time_in_turn(
      lambda: calls.append('adamw'),
      lambda: calls.append('other'),
      num_steps=2,
      num_rounds=2,
    )
    self.assertEqual(calls, ['adamw', 'other'] * 3)
    self.assertCountEqual(numbers, ['step_seconds', 'over_adamw'])


class StreamsTest(absltest.TestCase):
  def test_every_order_has_all_batches(self):
    for block, start in (
      (1, [(0, 0), (1, 0), (0, 1)]),
      (2, [(0, 0), (0, 1), (1, 0)]),
      (4, [(0, 0), (0, 1), (0, 2)]),
    ):
      place = [tuple(row) for row in streams.arrange(2, 4, block)]
      self.assertEqual(place[:3], start)
      self.assertLen(set(place), 8)

  def test_forgetting(self):
    stream = mock.Mock(num_tasks=2, steps_per_task=4)
    observed = np.zeros((1, 8, 2))  # 4 shortest blocks of 2 tasks
    observed[0, 3, 0] = 1.0  # the first task, once it has been learned
    observed[0, 7] = [1.5, 0.25]
    once = streams.summarize(stream, 4, np.zeros(1), observed, 1)
    np.testing.assert_allclose(once['forgotten'], [[0.5]])
    np.testing.assert_allclose(once['final'], [[0.875]])
    observed[0, 6, 0] = 1.25
    returning = streams.summarize(stream, 1 + 0, np.zeros(1), observed, 1)
    self.assertNotIn('forgotten', returning)

  @pytest.mark.slow
  def test_topics(self):
    stream = stream_tasks.make_topics(4, 2, num_tasks=2)
    store = cells_lib.open_store(pathlib.Path(self.create_tempdir().full_path))
    with mock.patch.object(rules, 'STREAM_NAMES', ('AdamW',)):
      streams.measure(stream, store, rates=(1e-3, 1e-1), num_seeds=2)
    cells = cells_lib.read(store, 'topics')
    self.assertLen(cells, 3)
    online = np.array(cells['once,adamw'].values['online'])
    self.assertEqual(online.shape, (2, 2))
    self.assertTrue(np.all((online > 1) & (online < 10)))


class ExperimentsTest(parameterized.TestCase):
  def check(self, run, config, files=(), mode='train'):
    folder = pathlib.Path(self.create_tempdir().full_path)
    run(config, str(folder), mode)
    for name in (*LEFT, *files):
      self.assertTrue((folder / name).stat().st_size, name)
    return json.loads((folder / 'summary.json').read_text())

  def test_orthogonal_tasks(self):
    config = orthogonal_tasks.OrthogonalTasksConfig(
      num_inputs=8, num_outputs=2, num_steps=20, num_rates=3
    )
    name = 'SGD with momentum'
    with mock.patch.object(rules, 'NAMES', (name,)):
      summary = self.check(
        orthogonal_tasks.run, config, ['orthogonal_tasks.png']
      )
    self.assertLess(summary['sgd_with_momentum_second_after_second'], 1)
    self.assertIn('sgd_with_momentum_first_after_second', summary)

  @pytest.mark.slow
  def test_landscape_and_least_squares(self):
    summary = self.check(
      landscape.run,
      landscape.LandscapeConfig(num_steps=10, num_rates=3),
      ['landscape.png'],
    )
    for name in rules.NAMES:
      self.assertIn(f'{report_files.key(name)}_end', summary)
    config = least_squares.LeastSquaresConfig(
      num_inputs=6, num_outputs=2, conditions=(10.0,), num_steps=10, num_rates=2
    )
    summary = self.check(least_squares.run, config, ['least_squares.png'])
    self.assertLess(summary['adamw_condition_10'], 1)

  @pytest.mark.slow
  def test_compare(self):
    pytest.importorskip('sklearn')
    folder = pathlib.Path(self.create_tempdir().full_path)
    results = folder / 'results'
    config = dataclasses.replace(
      compare.get_config('small'),
      parts=('digits', 'vit', 'language'),
      optimizers=('AdamW', 'M3'),
      results=str(results),
    )
    compare.run(config, str(folder / 'run'), 'train')
    page = (results / 'README.md').read_text()
    for name in ('digits', 'vit', 'language'):
      self.assertIn(f'{name}.png', page)
      self.assertTrue((results / f'{name}.png').stat().st_size)
    summary = json.loads((results / 'summary.json').read_text())
    self.assertEqual(summary['language.m3_rate'], 1e-2)
    self.assertEqual(summary['digits.adamw_seeds'], 2)
    # Another folder goes on from the cells among the results.
    compare.run(config, str(folder / 'again'), 'train')
    self.assertFalse((folder / 'again' / 'cells').exists())

  @pytest.mark.slow
  def test_language_cells_are_runs_of_the_trainer(self):
    sizes = {'mixer': 'transformer', 'num_steps': 3, 'num_tokens': 64}
    training = language.make_training(**sizes)
    cell = training.train('M3', 1e-2, 1)
    config = language.make_config('M3', 1e-2, 1, **sizes)
    folder = pathlib.Path(self.create_tempdir().full_path)
    outcome = training_lib.train(config, folder)
    self.assertAlmostEqual(
      cell['bits_per_byte'], outcome.evaluation.bits_per_byte, places=4
    )

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
    with self.assertRaisesRegex(errors.UserError, '--mode=generate'):
      report_files.check_mode('generate')
    with self.assertRaisesRegex(
      errors.UserError, "parts=.*'cifar'.* among toy"
    ):
      compare.get_config('cifar')
    for setting in ({'rates': ()}, {'rates': (-1.0,)}, {'num_seeds': 0}):
      (name,) = setting
      with self.assertRaisesRegex(errors.UserError, f'{name}=.* must be'):
        compare.CompareConfig(**setting)
    with mock.patch.dict(sys.modules, {'sklearn': None}):
      classification.load.cache_clear()  # other tests may have read them
      with self.assertRaisesRegex(errors.UserError, r"'.\[experiments\]'"):
        compare.run(
          compare.get_config('digits'),
          self.create_tempdir().full_path,
          'train',
        )
