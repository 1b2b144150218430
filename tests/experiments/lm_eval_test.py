"""Tests of the evaluation of a checkpoint by lm-evaluation-harness."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import unittest
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import pytest

from experiments import lm_eval as experiment
from experiments import lm_eval_report
from experiments import quickstart
from nested_learning import configs
from nested_learning import errors
from nested_learning import training
from tests.training import tiny

_TASKS = pathlib.Path(experiment.__file__).parent / 'lm_eval_tasks'

needs_harness = unittest.skipUnless(
  importlib.util.find_spec('lm_eval'), 'needs lm_eval: make test-harness'
)


class SettingsTest(parameterized.TestCase):
  def test_suite_of_the_papers(self):
    config = experiment.get_config('commonsense')
    self.assertLen(config.tasks, 9)
    with self.assertRaisesRegex(errors.UserError, "'common'"):
      experiment.get_config('common')

  @parameterized.parameters(
    ({'tasks': ()}, 'names no task'),
    ({'limit': 0}, 'limit=0'),
    ({'num_fewshot': -1}, 'num_fewshot=-1'),
    ({'batch_size': 0}, 'batch_size=0'),
  )
  def test_refuses_settings_out_of_range(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      experiment.LmEvalConfig(**fields)

  def test_refuses_other_modes(self):
    with self.assertRaisesRegex(errors.UserError, 'use --mode=eval'):
      experiment.run(experiment.get_config(), 'unused', 'train')

  def test_refuses_folders_without_a_run(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    config = experiment.LmEvalConfig(checkpoint=str(folder))
    with self.assertRaisesRegex(errors.UserError, 'no config.json'):
      experiment.run(config, 'unused', 'eval')
    path = folder / 'config.json'
    path.write_text(configs.to_json(quickstart.get_config()))
    with self.assertRaisesRegex(errors.UserError, 'no checkpoints'):
      experiment.run(config, 'unused', 'eval')
    (folder / 'checkpoints').mkdir()
    path.write_text(configs.to_json(config))
    with self.assertRaisesRegex(errors.UserError, 'run of LmEvalConfig'):
      experiment.run(config, 'unused', 'eval')
    path.write_text(configs.to_json(quickstart.get_config()))
    with (
      mock.patch.dict(sys.modules, {'lm_eval': None}),
      self.assertRaisesRegex(errors.UserError, 'make harness'),
    ):
      experiment.run(config, 'unused', 'eval')

  def test_each_task_file_has_its_data(self):
    self.assertLen(list(_TASKS.glob('*.yaml')), 3)
    for path in _TASKS.glob('*.yaml'):
      lines = path.with_suffix('.jsonl').read_text().splitlines()
      self.assertGreater(len(lines), 5)
      for line in map(json.loads, lines):
        if 'choices' in line:
          self.assertLess(line['answer'], len(set(line['choices'])))


@pytest.mark.extra
@needs_harness
class RunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    tiny.share_executables(self)
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def train(self):
    config = tiny.experiment(self.root, train={'num_steps': 1})
    training.train(config, self.root / 'run')
    (self.root / 'run' / 'config.json').write_text(configs.to_json(config))

  def evaluate(self, name='eval', **changes):
    config = dataclasses.replace(
      experiment.get_config(), checkpoint=str(self.root / 'run'), **changes
    )
    folder = self.root / name
    experiment.run(config, str(folder), 'eval')
    self.assertEqual(configs.load(str(folder / 'config.json')), config)
    return json.loads((folder / 'summary.json').read_text()), folder

  def test_evaluates_the_tasks_of_the_repository(self):
    self.train()
    summary, folder = self.evaluate()
    self.assertEqual(summary['step'], 1)
    self.assertBetween(summary['python_choice_acc'], 0, 1)
    self.assertBetween(summary['python_completion_exact_match'], 0, 1)
    # After one step, about as good as guessing one of 260 tokens.
    self.assertBetween(summary['python_text_bits_per_byte'], 6, 10)
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    self.assertLen(lines, 6)
    self.assertIn('## python_completion', (folder / 'report.md').read_text())

    _, folder = self.evaluate('few', limit=2, num_fewshot=1)
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    self.assertEqual({json.loads(x)['num_documents'] for x in lines}, {2})

  def test_refuses_tasks_that_are_not_there(self):
    from nested_learning.evaluation import harness

    package = harness.import_package()
    empty = self.create_tempdir().full_path
    with self.assertRaisesRegex(errors.UserError, 'holds no task file'):
      experiment.load_tasks(package, [empty])
    pathlib.Path(empty, 'a.yaml').write_text(
      'task: a\ndataset_path: json\noutput_type: generate_until\n'
      'dataset_kwargs: {data_files: {test: missing.jsonl}}\n'
    )
    with self.assertRaisesRegex(errors.UserError, "'a' cannot be .*missing"):
      experiment.load_tasks(package, [empty])

  def test_names_near_tasks(self):
    from nested_learning.evaluation import harness

    package = harness.import_package()
    manager = package.tasks.TaskManager()  # takes seconds
    self.assertContainsSubset(
      experiment.get_config('commonsense').tasks, manager.all_tasks
    )
    with (
      mock.patch.object(package.tasks, 'TaskManager', return_value=manager),
      self.assertRaisesRegex(errors.UserError, 'nearest are .*lambada'),
    ):
      experiment.load_tasks(package, ['lambada_opena'])


class CommonsenseTest(absltest.TestCase):
  def test_the_mean_is_that_of_the_paper(self):
    means = [sum(row[2:]) / len(row[2:]) for row in lm_eval_report.PAPER]
    self.assertSequenceAlmostEqual(
      means, [50.11, 51.68, 52.28, 53.38, 56.82, 58.04], delta=0.011
    )
