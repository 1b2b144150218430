"""Tests of losses whose blocks at rest read all tokens of a call at once."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import evaluation
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from tests import compiling

_VOCAB, _LENGTH = 11, 16
_CONFIG = models.ModelConfig(
  vocab_size=_VOCAB,
  num_layers=2,
  embed_dim=8,
  mixer=layers.AttentionConfig(
    num_heads=2, num_kv_heads=2, head_dim=4, window=8
  ),
  levels=(
    models.LevelConfig('fast', mlp_dim=6),
    models.LevelConfig('slow', mlp_dim=6),
  ),
  max_length=2 * _LENGTH,
  dtype='float64',
)
_NESTED = dataclasses.replace(_CONFIG, chain=models.ChainConfig('nested'))
_DGD = optimizers.configs.Dgd(target='printed', erase=0.5)


class SplitTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  def _learner(self, config, **changes):
    inner = levels.make_inner(
      (4, 8), learning_rate=0.3, depth=0.5, clip_norm=None, **changes
    )
    learner = models.make_model(config, inner)
    params = compiling.jit(learner.init_params)(jax.random.key(0))
    return learner, jax.tree.map(lambda x: jnp.asarray(1.5 * x, float), params)

  @parameterized.named_parameters(
    ('nested', _NESTED, {}),
    ('low_rank', _CONFIG, {'learns': 'low_rank', 'rank': 2}),
    ('delta_gradient_descent', _CONFIG, {'optimizer': _DGD}),
  )
  def test_losses_are_those_of_segments(self, config, changes):
    self._compare(config, changes, lambda f: f)

  def test_gradients_are_those_of_segments(self):
    make = functools.partial(jax.value_and_grad, has_aux=True)
    self._compare(_CONFIG, {}, make)

  def _compare(self, config, changes, make):
    with compiling.quickly():
      learner, params = self._learner(config, **changes)
      rng = np.random.default_rng(0)
      tokens = rng.integers(_VOCAB, size=(2, 2 * _LENGTH))
      targets = np.roll(tokens, -1, axis=1)
      reset = rng.uniform(size=tokens.shape) < 0.1

      def at_once(params):
        state, found = None, []
        for part in (slice(_LENGTH), slice(_LENGTH, None)):
          losses, state = learner.losses(
            params,
            state,
            tokens[:, part],
            targets[:, part],
            evaluation.cross_entropy,
            reset=reset[:, part],
          )
          found.append(losses)
        return _weigh(jnp.concatenate(found, axis=1), state)

      def by_segment(params):
        logits, state = learner.reader.read_segments(
          params, None, tokens, reset=reset
        )
        return _weigh(evaluation.cross_entropy(logits, targets), state)

      found, expected = (
        compiling.jit(make(f))(params) for f in (at_once, by_segment)
      )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        np.asarray(a, float), np.asarray(b, float), rtol=1e-9, atol=1e-10
      ),
      found,
      expected,
    )

  def test_blocks_below_read_a_call_at_once(self):
    learner, params = self._learner(_CONFIG)
    tokens = np.zeros((2, _LENGTH), np.int32)

    def losses(params):
      return learner.losses(
        params, None, tokens, tokens, evaluation.cross_entropy
      )[0]

    def logits(params):
      return learner.reader.read_segments(params, None, tokens)[0]

    whole = f'f64[2,{_LENGTH},{_CONFIG.embed_dim}]'  # activations of a call
    self.assertIn(whole, str(jax.make_jaxpr(losses)(params)))
    self.assertNotIn(whole, str(jax.make_jaxpr(logits)(params)))

  def test_longer_calls_than_the_model_takes_are_read_by_segments(self):
    learner, params = self._learner(_CONFIG)
    tokens = np.zeros((1, 4 * _LENGTH), np.int32)
    losses, _ = compiling.jit(
      lambda params: learner.losses(
        params, None, tokens, tokens, evaluation.cross_entropy
      )
    )(params)
    self.assertEqual(losses.shape, tokens.shape)


def _weigh(losses, state):
  """Returns a scalar of the losses, and all that is compared."""
  weights = jnp.cos(jnp.arange(losses.size)).reshape(losses.shape)
  return jnp.sum(weights * losses), (losses, state)


if __name__ == '__main__':
  absltest.main()
