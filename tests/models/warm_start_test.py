"""A slower level for a trained model: nothing changes until it learns."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from tests import compiling

_TOKENS = np.random.default_rng(0).integers(11, size=(1, 8)).astype(np.int32)


def make(num_layers=1, **changes):
  mixer = layers.AttentionConfig(2, 2, head_dim=4)
  settings = {
    'vocab_size': 11,
    'num_layers': num_layers,
    'embed_dim': 8,
    'mixer': mixer,
    'levels': (
      models.LevelConfig('fast', 6, 4),
      models.LevelConfig('slow', 5, 8),
    ),
    'max_length': 16,
    **changes,
  }
  config = models.ModelConfig(**settings)
  params = compiling.jit(models.make_model(config).init_params)(
    jax.random.key(0)
  )
  return config, params


def read(config, params):
  forward = models.make_model(config).forward
  return compiling.jit(lambda p: forward(p, None, _TOKENS)[0])(params)


class WarmStartTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('sequential', {}),
    ('slowest_first', {'chain': models.ChainConfig(order='slowest_first')}),
    ('independent', {'chain': models.ChainConfig('independent')}),
    ('pattern', {'mixer': (layers.AttentionConfig(2, 2, head_dim=4),)}),
  )
  def test_says_what_it_said(self, changes):
    config, params = make(**changes)
    expected = read(config, params)
    config, params = models.add_level(
      config, params, name='slower', train_every=16
    )
    np.testing.assert_array_equal(read(config, params), expected)
    self.assertEqual(config.levels[2].mlp_dim, 5)
    model = models.make_model(config)
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    self.assertEqual(
      jax.tree.map(np.shape, shapes), jax.tree.map(np.shape, params)
    )

  def test_learns_from_features_that_are_trained(self):
    config, params = models.add_level(*make(), name='slower', train_every=16)
    learner = models.make_model(config, levels.InnerConfig((4, 4, 4), (0.1,)))
    state = compiling.jit(lambda p: learner.forward(p, None, _TOKENS)[1])(
      params
    )
    health = levels.measure_health(state)
    self.assertEqual(levels.health_warnings(health), [])
    self.assertGreater(health['slower'].drift[0], 1e-4)
    self.assertGreater(
      health['slower'].gradient_norm[0], 0.01 * health['slow'].gradient_norm[0]
    )

  def test_refuses_what_is_no_slower_level(self):
    config, params = make()
    for settings, message in (
      ({'name': 'fast'}, "'fast': the name is taken"),
      (
        {'name': 'slower', 'train_every': 6},
        "'slow' .* is listed before 'slower'",
      ),
      ({'name': 'slower'}, 'which is faster'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        models.add_level(config, params, **settings)


if __name__ == '__main__':
  absltest.main()
