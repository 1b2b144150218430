"""Tests of the config of levels that learn inside a sequence."""

import copy
import dataclasses
import json
import pickle

from absl.testing import parameterized
import jax
import numpy as np

from experiments.continual import facts
from nested_learning import configs
from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from tests import compiling

_OLD = ('update_every', 'learning_rates', 'optimizer', 'clip_norm', 'objective')
_DGD = optimizers.configs.Dgd(target='printed', erase=0.5)


# A config with the levels in its field `inner`.
Config = facts.FactsConfig


class InnerConfigTest(parameterized.TestCase):
  def test_makes_levels_that_are_alike_or_not(self):
    level = levels.InnerLevelConfig
    self.assertEqual(
      levels.make_inner((64, None), objective='dot', depth=0.5),
      levels.InnerConfig(
        (level(64, objective='dot'), level(None, objective='dot')), depth=0.5
      ),
    )
    inner = levels.make_inner(
      (64, 128),
      learning_rate=(0.1, 0.2),
      optimizer=(optimizers.configs.Sgd(), _DGD),
    )
    self.assertEqual(inner.update_every, (64, 128))
    self.assertEqual(inner.levels[1], level(128, 0.2, _DGD))
    self.assertFalse(levels.InnerConfig().is_on)
    self.assertFalse(levels.make_inner((None,)).is_on)

  def test_the_output_alone_learns(self):
    config = models.zoo.make_config('hope_attention_tiny', vocab_size=11)
    tokens = np.arange(16).reshape(1, 16) % 11
    state, params = {}, None
    for learns in ('every_map', 'output'):
      inner = levels.make_inner((8, 8, 16), learns=learns, learning_rate=0.1)
      model = models.make_model(config, inner)
      params = params or compiling.jit(model.init_params)(jax.random.key(0))
      forward = compiling.jit(model.forward)
      state[learns] = forward(params, None, tokens)[1]
    size = lambda x: sum(leaf.size for leaf in jax.tree.leaves(x))
    for name, level in state['output'].levels.items():
      self.assertGreater(level.drift[0], 0)
      whole = size(state['every_map'].levels[name].params)
      self.assertLess(size(level.params), 0.34 * whole)

  def test_warns_of_clocks_that_never_strike(self):
    inner = levels.make_inner((8, 32, None))
    self.assertEmpty(levels.clock_warnings(inner, 32))
    (warning,) = levels.clock_warnings(inner, 31, field='evaluation.inner')
    self.assertRegex(
      warning, r'^evaluation.inner.levels.1.update_every=32 .* 31 tokens.*never'
    )

  def test_one_flag_turns_learning_on(self):
    off = Config(inner=levels.InnerConfig())
    changed = configs.override(off, ['inner.levels=64,128'])
    self.assertEqual(changed.inner, levels.make_inner((64, 128)))
    changed = configs.override(
      changed,
      [
        'inner.levels.all.learning_rate=0.1',
        'inner.levels.1.optimizer=dgd',
        'inner.levels.1.optimizer.target=printed',
        'inner.levels.1.optimizer.erase=0.5',
      ],
    )
    expected = levels.make_inner(
      (64, 128),
      learning_rate=0.1,
      optimizer=(optimizers.configs.Sgd(), _DGD),
    )
    self.assertEqual(changed.inner, expected)
    self.assertEqual(configs.from_json(configs.to_json(changed)), changed)
    changed = configs.override(changed, ['inner.levels=()'])
    self.assertFalse(changed.inner.is_on)

  @parameterized.parameters(*_OLD)
  def test_old_names_are_answered_with_the_new_ones(self, name):
    new = {'learning_rates': 'learning_rate'}.get(name, name)
    message = rf'inner\.{name} is now called inner\.levels\.0\.{new}'
    with self.assertRaisesRegex(errors.UserError, message):
      levels.InnerConfig(**{name: 1})
    with self.assertRaisesRegex(errors.UserError, message):
      configs.override(Config(), [f'inner.{name}=1'])
    data = json.loads(configs.to_json(Config()))
    data['inner'][name] = 1
    with self.assertRaisesRegex(errors.UserError, message):
      configs.from_json(json.dumps(data))

  def test_can_be_copied(self):
    inner = levels.make_inner((64, 128))
    for copied in (copy.deepcopy(inner), pickle.loads(pickle.dumps(inner))):
      self.assertEqual(copied, inner)
    changed = dataclasses.replace(inner, depth=0.5)
    self.assertEqual(changed, levels.make_inner((64, 128), depth=0.5))

  def test_refuses_what_is_no_level(self):
    with self.assertRaisesRegex(
      errors.UserError, r'levels=\(64, 128\) must be'
    ):
      levels.InnerConfig((64, 128))
