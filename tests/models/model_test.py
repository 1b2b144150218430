"""Tests of models: their heads, and levels that are added to them."""

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import parameters
from tests import compiling
from tests.training import tiny

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


class HeadsTest(parameterized.TestCase):
  def test_regression_is_causal_and_carries_its_state(self):
    model = models.make_model(tiny.MODEL, head=models.RegressionHead(3))
    params = jax.jit(model.init_params)(jax.random.key(0))
    inputs = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(np.float32)
    whole, _ = model.forward(params, None, inputs)
    self.assertEqual(whole.shape, (2, 6, 1))
    first, state = model.forward(params, None, inputs[:, :4])
    second, _ = model.forward(params, state, inputs[:, 4:])
    np.testing.assert_allclose(first, whole[:, :4], atol=1e-5)
    np.testing.assert_allclose(second, whole[:, 4:], atol=1e-5)
    changed, _ = model.forward(params, None, inputs * [[[2]], [[1]]])
    self.assertTrue((changed[0] != whole[0]).all())
    np.testing.assert_array_equal(changed[1], whole[1])

  def test_compression_reads_a_row_through_its_last_output(self):
    model = models.make_model(tiny.MODEL, head=models.CompressionHead())
    params = jax.jit(model.init_params)(jax.random.key(0))
    forward = jax.jit(model.forward)
    tokens = np.arange(8)[None] % 5
    logits, _ = forward(params, None, tokens)
    self.assertEqual(logits.shape, (1, 8, tiny.MODEL.vocab_size))
    other = tokens.copy()
    other[0, 2] = 9
    changed, _ = forward(params, None, other)
    self.assertTrue((np.abs(changed - logits).max(axis=-1) > 1e-6).all())

  @parameterized.product(
    family=('transformer', 'hope', 'titans_mac'),
    head=(models.LanguageHead(), models.CompressionHead()),
  )
  def test_a_jit_may_close_over_numpy_parameters(self, family, head):
    config = models.zoo.make_config(f'{family}_tiny', num_layers=2)
    model = models.make_model(config, head=head)
    params = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), parameters.abstract(model.table)
    )
    read = lambda tokens: model.forward(params, None, tokens)[0]
    logits = jax.eval_shape(read, np.arange(8)[None])
    self.assertEqual(logits.shape, (1, 8, config.vocab_size))

  def test_labels_and_counts_follow_the_table(self):
    for model in (
      models.make_model(tiny.MODEL, head=models.RegressionHead(3)),
      models.make_model(tiny.MODEL, head=models.CompressionHead()),
    ):
      labels = models.level_labels(tiny.MODEL, model.table)
      params = jax.eval_shape(model.init_params, jax.random.key(0))
      self.assertEqual(jax.tree.structure(labels), jax.tree.structure(params))
      self.assertEqual(set(jax.tree.leaves(labels)), {'base', 'slow'})
      self.assertEqual(
        parameters.count(model.table),
        sum(x.size for x in jax.tree.leaves(params)),
      )


class AddLevelTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('sequential', {}),
    ('slowest_first', {'chain': models.ChainConfig(order='slowest_first')}),
    ('independent', {'chain': models.ChainConfig('independent')}),
    ('pattern', {'mixer': (layers.AttentionConfig(2, 2, head_dim=4),)}),
  )
  def test_keeps_the_logits(self, changes):
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

  def test_learns_from_trained_features(self):
    config, params = models.add_level(*make(), name='slower', train_every=16)
    learner = models.make_model(
      config, levels.make_inner((4, 4, 4), learning_rate=0.1)
    )
    state = compiling.jit(lambda p: learner.forward(p, None, _TOKENS)[1])(
      params
    )
    health = levels.measure_health(state)
    self.assertEqual(levels.health_warnings(health), [])
    self.assertGreater(health['slower'].drift[0], 1e-4)
    self.assertGreater(
      health['slower'].gradient_norm[0], 0.01 * health['slow'].gradient_norm[0]
    )

  def test_refuses_levels_that_are_not_slower(self):
    config, params = make()
    for settings, message in (
      ({'name': 'fast'}, "two levels are named 'fast'"),
      ({'name': 'base'}, "name='base' must be"),
      (
        {'name': 'slower', 'train_every': 6},
        "'slow' .* is listed before 'slower'",
      ),
      ({'name': 'slower'}, 'which is faster'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        models.add_level(config, params, **settings)
