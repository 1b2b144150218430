"""Whole runs on tasks: trained, resumed, evaluated at every length."""

import contextlib
import dataclasses
import io
import json
import pathlib
import signal
from unittest import mock

from absl.testing import parameterized
import jax
import numpy as np
import pytest

from nested_learning import configs
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import levels
from nested_learning import models
from nested_learning import tasks
from nested_learning import training
from nested_learning.training import make_workload
from nested_learning.training import workload as workload_lib
from tests import compiling
from tests.training import tiny

_TASKS = {
  'word': tasks.make_config('z2', num_tokens=8),
  'text': tasks.make_config('qa1_small', num_tokens=128),
  'numbers': tasks.RegressionConfig(num_dims=2, num_points=4),
  'compression': tasks.CompressionConfig(num_tokens=8),
}


def _experiment(root, name, **changes):
  task = _TASKS[name]
  data = tasks.TaskDataConfig(
    task, batch_size=8, longer=() if name == 'compression' else (2, 4)
  )
  return tiny.experiment(
    root,
    model={
      'vocab_size': max(task.vocab_size, 1),
      'levels': (models.LevelConfig('mlp', mlp_dim=16),),
      **changes.pop('model', {}),
    },
    **{'data': data, **changes},
  )


class TaskWorkloadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    tiny.share_executables(self)
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.workdir = self.root / 'run'

  def run_mode(self, mode, config):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      training.run(config, self.workdir, mode)
    return output.getvalue()

  def read(self, name):
    return json.loads((self.workdir / name).read_text())

  def test_a_task_of_ids(self):
    config = _experiment(self.root, 'word')
    # Attention gets the room that longer rows need when they are evaluated.
    short = dataclasses.replace(config.model, max_length=8)
    config = dataclasses.replace(config, model=short)
    verdict = self.run_mode('train', config)
    summary = self.read('summary.json')
    for end in ('', '_2x', '_4x'):
      for name in ('accuracy', 'all_right', 'macro_accuracy'):
        self.assertBetween(summary[name + end], 0, 1)
    self.assertContainsSubset(
      {'loss', 'validation_loss', 'tokens_per_second', 'steps', 'seconds'},
      summary,
    )
    for value in summary.values():
      self.assertIsInstance(value, int | float | str)
    self.assertIn('on 8 tokens; ', verdict)
    self.assertIn('rows all right on 32 tokens.', verdict)
    report = (self.workdir / 'report.md').read_text()
    self.assertIn(verdict.strip(), report)
    self.assertRegex(report, r'\| 16 +\| ')
    stored = configs.from_json((self.workdir / 'config.json').read_text())
    self.assertEqual(stored, config)
    sample = (self.workdir / 'sample.txt').read_text()
    self.assertIn('position, target, answer', sample)

    # Rows of 32 tokens were read in four pieces, as one stream.
    params, _ = training.modes.restore_params(
      config, self.workdir, 'WordProblemConfig 4'
    )
    long = dataclasses.replace(short, max_length=32)
    forward = jax.jit(models.make_model(long).forward)
    batches = tasks.make_iterator(config.data, split='validation', factor=4)
    right = []
    for _ in range(config.evaluation.num_batches):
      batch = next(batches)
      logits, _ = forward(params, None, batch['tokens'])
      right.append(np.argmax(logits, axis=-1) == batch['targets'])
    self.assertAlmostEqual(summary['accuracy_4x'], np.mean(right), delta=0.01)

  @pytest.mark.slow
  def test_a_task_in_text(self):
    config = _experiment(self.root, 'text', train={'num_steps': 1})
    config = dataclasses.replace(
      config, model=dataclasses.replace(config.model, max_length=128)
    )
    self.run_mode('train', config)
    summary = self.read('summary.json')
    for end in ('', '_2x', '_4x'):
      self.assertBetween(summary[f'string_match{end}'], 0, 1)
    self.assertRegex(
      (self.workdir / 'sample.txt').read_text(), r'(?s)Where is .*Right: \w+'
    )

  @pytest.mark.slow
  def test_evaluates_and_samples_again(self):
    config = _experiment(self.root, 'word')
    self.run_mode('train', config)
    summary = self.read('summary.json')
    self.run_mode('eval', config)
    for name, value in self.read('evaluation.json').items():
      self.assertAlmostEqual(value, summary[name], places=6)
    sample = self.run_mode('generate', config)
    self.assertEqual(sample, (self.workdir / 'sample.txt').read_text() + '\n')

  def test_levels_that_learn_are_evaluated_while_they_learn(self):
    self.check_inner('word')

  @pytest.mark.slow
  def test_levels_that_learn_write_answers_while_they_learn(self):
    self.check_inner('text')

  def check_inner(self, name):
    # A gradient of a local objective compiles fast.
    inner = levels.make_inner(
      (4,), learning_rate=100.0, objective='dot', max_drift=1e9
    )
    self.enterContext(compiling.quickly())
    config = _experiment(
      self.root,
      name,
      model={'embed_dim': 8, 'max_length': 512},
      train={'num_steps': 1},
      evaluation=evaluation.EvaluationConfig(num_batches=1),
    )
    config = dataclasses.replace(
      config,
      inner=inner,
      data=dataclasses.replace(config.data, batch_size=1, longer=(2,)),
    )
    workload = make_workload.make_workload(config)
    params = jax.jit(workload.model.init_params)(jax.random.key(0))
    mesh = training.trainer.make_mesh(config)
    with jax.set_mesh(mesh):
      batches = workload_lib.validation_batches(workload, 1, mesh)
      evaluated = workload.evaluate(params, batches)
    again = workload.summarize(params, mesh, None).numbers
    self.assertEqual(again['validation_loss'], evaluated.loss)
    sample = workload.sample(params, mesh)
    rested = make_workload.make_workload(
      dataclasses.replace(config, inner=levels.InnerConfig())
    )
    plain = rested.summarize(params, mesh, None).numbers
    for end in ('', '_2x'):
      self.assertNotAlmostEqual(
        plain[f'validation_loss{end}'], again[f'validation_loss{end}'], places=3
      )
    self.assertNotEqual(sample, rested.sample(params, mesh))

  @parameterized.parameters('numbers', 'compression')
  @pytest.mark.slow
  def test_a_run_without_tokens_in_or_out(self, name):
    config = _experiment(self.root, name)
    verdict = self.run_mode('train', config)
    summary = self.read('summary.json')
    is_numbers = name == 'numbers'
    self.assertEqual('squared_error_4x' in summary, is_numbers)
    self.assertEqual('accuracy' in summary, not is_numbers)
    self.assertEqual(verdict.startswith('mean squared error'), is_numbers)
    self.assertIn(verdict.strip(), (self.workdir / 'report.md').read_text())

  def test_learns_numbers(self):
    config = _experiment(self.root, 'numbers')
    self.assertIn('read_in', training.describe(config))
    workload = make_workload.make_workload(config)
    optimizer = training.make_optimizer(config, workload.model.table)
    state = jax.jit(training.make_init(config, workload.model, optimizer))(
      jax.random.key(0)
    )
    step = jax.jit(
      training.make_step(config, workload.model, optimizer, workload.token_loss)
    )
    batches = workload.make_batches('train', process_index=0, process_count=1)
    batch = next(batches)
    losses = []
    for _ in range(20):
      state, metrics = step(state, batch)
      losses.append(float(metrics['loss']))
    self.assertLess(losses[-1], losses[0])
    evaluated = workload.evaluate(state.params, [batch])
    self.assertIn('squared_error', evaluated.numbers)
    self.assertLess(evaluated.score, losses[0])

  def test_resumed_is_uninterrupted_bit_for_bit(self):
    config = _experiment(self.root, 'word')
    straight, cut = self.root / 'straight', self.root / 'cut'
    for folder in (straight, cut):
      folder.mkdir()
    whole = training.train(config, straight)
    put, calls = workload_lib.put, []

    def put_and_signal(*args):
      calls.append(args)
      if len(calls) == 2:
        signal.raise_signal(signal.SIGTERM)
      return put(*args)

    with mock.patch.object(workload_lib, 'put', put_and_signal):
      with self.assertRaises(SystemExit):
        training.train(config, cut)
    resumed = training.train(config, cut)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    other = configs.override(
      config, ['data.task.group=S3', 'model.vocab_size=12']
    )
    with self.assertRaisesRegex(
      errors.UserError, 'on other tokens .*data.task'
    ):
      training.train(other, cut)

  def test_a_task_is_set_by_field(self):
    config = _experiment(self.root, 'word')
    changed = configs.override(
      config,
      ['data.task=MqarConfig', 'data.task.num_tokens=64', 'data.longer=8'],
    )
    self.assertEqual(changed.data.task, tasks.MqarConfig(num_tokens=64))
    self.assertEqual(changed.data.longer, (8,))
    with self.assertRaisesRegex(
      errors.UserError, 'model.vocab_size to at least 8192'
    ):
      training.run(changed, self.workdir)
    with self.assertRaisesRegex(
      errors.UserError, 'data.task.num_tokens=64 must be .*for each of 40 pairs'
    ):
      configs.override(
        config, ['data.task=MqarConfig', 'data.task.num_pairs=40']
      )
