"""Tests of the experiments on continual learning, at the smallest size."""

import dataclasses
import json
import pathlib

from absl.testing import parameterized
import jax
import numpy as np
import pytest

from experiments.continual import classes
from experiments.continual import closed_book
from experiments.continual import facts
from experiments.continual import frequencies
from experiments.continual import horizon
from experiments.continual import languages
from experiments.continual import reading
from nested_learning import configs
from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from tests import compiling

_LEARNER = reading.LearnerConfig(embed_dim=16, mlp_dim=16)


class ReadingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())
    self.model = models.make_model(
      reading.make_config(_LEARNER, 20, ('fast', 'slow'))
    )
    self.params = self.model.init_params(jax.random.key(0))
    rng = np.random.default_rng(0)
    self.tokens = rng.integers(20, size=(2, 32))
    self.questions = rng.integers(20, size=(3, 2, 8))

  @parameterized.parameters([()], [(0, 1)])
  def test_questions_leave_the_state_unchanged(self, which):
    inner = reading.only(levels.make_inner((8, 16), learning_rate=0.5), which)
    learner = reading.make_reading(self.model, inner, segment_size=8)
    _, state = learner.read(
      self.params, learner.start(self.params, 2), self.tokens
    )
    asked = learner.ask(self.params, state, self.questions)
    for i, question in enumerate(self.questions):
      read, _ = learner.read(self.params, state, question)
      np.testing.assert_allclose(
        asked.losses[i], read.losses, rtol=1e-4, atol=1e-4
      )
      np.testing.assert_array_equal(asked.answers[i], read.answers)
    few = np.arange(20) < 3
    asked = learner.ask(self.params, state, self.questions, allowed=few)
    self.assertLess(asked.answers.max(), 3)

  def test_what_is_said_of_a_token_stands_at_its_place(self):
    inner = levels.make_inner((None, None))
    learner = reading.make_reading(self.model, inner, segment_size=8)
    said, _ = learner.read(
      self.params, learner.start(self.params, 2), self.tokens
    )
    logits, _ = self.model.forward(self.params, None, self.tokens)
    self.assertTrue(np.isnan(said.losses[:, 0]).all())
    np.testing.assert_array_equal(
      said.answers[:, 1:8], np.argmax(logits, axis=-1)[:, :7]
    )

  def test_refuses_segments_that_levels_do_not_have(self):
    with self.assertRaisesRegex(errors.UserError, 'not a multiple'):
      reading.make_reading(
        self.model, levels.make_inner((8, 16)), segment_size=12
      )

  @parameterized.parameters('no such', 'transformer')
  def test_refuses_families(self, family):
    with self.assertRaisesRegex(errors.UserError, f"family='{family}'"):
      reading.make_config(reading.LearnerConfig(family), 20, ('fast',))


class ContinualTest(parameterized.TestCase):
  def _run(self, experiment):
    self.enterContext(compiling.quickly())
    workdir = pathlib.Path(self.create_tempdir().full_path)
    config = experiment.get_config('small')
    page = workdir / 'page'
    if hasattr(config, 'results'):
      config = dataclasses.replace(config, results=str(page))
    experiment.run(config, str(workdir), 'train')
    saved = (workdir / 'config.json').read_text()
    self.assertEqual(configs.from_json(saved), config)
    self.assertIn('.png)', (workdir / 'report.md').read_text())
    self.assertLen(list(workdir.glob('*.png')), 1)
    if hasattr(config, 'results'):
      # Another machine goes on from the page, and measures nothing.
      again = workdir / 'again'
      experiment.run(config, str(again), 'train')
      self.assertFalse((again / 'cells').exists())
      self.assertFalse((again / 'parts').exists())
      for name in ('summary.json', 'README.md'):
        self.assertTrue((page / name).is_file())
    return json.loads((workdir / 'summary.json').read_text())

  @parameterized.parameters(
    (classes,),
    (closed_book,),
    (facts,),
    (frequencies,),
    (horizon,),
    (languages,),
  )
  def test_configs(self, experiment):
    experiment.get_config()
    with self.assertRaisesRegex(errors.UserError, "'no'"):
      experiment.get_config('no')

  @pytest.mark.slow
  def test_facts(self):
    summary = self._run(facts)
    for name in (
      'memories_only',
      'fast_level',
      'slow_level',
      'fast_and_slow_level',
      'whole_chain_after_the_restart',
    ):
      self.assertBetween(summary[f'{name}_after_64'], 0, 1)

  @pytest.mark.slow
  def test_closed_book(self):
    summary = self._run(closed_book)
    for kind in ('told', 'changed', 'never_said'):
      shares = [
        summary[f'fast_and_slow_level_{kind}_{reaction}_after_64']
        for reaction in ('right', 'outdated', 'made_up', 'none')
      ]
      self.assertAlmostEqual(sum(shares), 1)

  def test_two_levels_are_the_same_in_both_experiments_on_facts(self):
    ours, theirs = facts.get_config(), frequencies.get_config()
    model, inner = frequencies.make_learner(theirs, 2, theirs.trained_at, 1.0)
    config = reading.make_config(
      ours.learner, ours.stream.vocab_size, facts.LEVELS
    )
    self.assertEqual(model.config, config)
    self.assertEqual(inner, ours.inner)
    for name in ('stream', 'learner', 'train_tellings', 'train_gap'):
      self.assertEqual(getattr(ours, name), getattr(theirs, name))

  def test_every_fact_is_told_as_often_as_the_config_says(self):
    config = facts.get_config().stream
    tokens = facts.Stream(config, np.random.default_rng(0)).plant()
    self.assertLen(tokens, config.plant_tokens)
    _, counts = np.unique(tokens.reshape(-1, 4), axis=0, return_counts=True)
    np.testing.assert_array_equal(counts, [config.tellings] * config.num_facts)

  @pytest.mark.slow
  def test_horizon(self):
    summary = self._run(horizon)
    self.assertIn('all_levels_gain_after_64', summary)
    self.assertIn('whole_chain_gain_after_the_restart', summary)
    self.assertGreater(summary['loss_before'], 0)

  @pytest.mark.slow
  def test_frequencies(self):
    summary = self._run(frequencies)
    self.assertIn(summary['best_levels'], (0, 2))
    self.assertBetween(summary['levels_2_slowest_32_rate_1_after_64'], 0, 1)

  @pytest.mark.slow
  def test_languages(self):
    pytest.importorskip('sacrebleu')
    summary = self._run(languages)
    self.assertBetween(summary['alone_1_levels'], 0, 100)

  @pytest.mark.slow
  def test_classes(self):
    pytest.importorskip('sklearn')
    summary = self._run(classes)
    for name in ('in_context', 'levels', 'ewc', 'replay', 'joint'):
      self.assertBetween(summary[f'{name}_final'], 0, 1)
      self.assertIn(f'{name}_forward', summary)
    mean = summary['nearest_class_mean_tf_idf_final']
    self.assertGreater(mean, 0.25)  # better than a guess among four
