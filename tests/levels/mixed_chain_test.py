"""Tests of chains whose levels learn by rules and losses of their own."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_learning import compilation
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from tests import compiling

_ROWS, _LENGTH, _VOCAB = 2, 16, 11
_NAMES = ('fast', 'middle', 'slow')
_KINDS = optimizers.configs
_SGD = _KINDS.Sgd()
# Stateful rules in the middle, and energies that are summed over two segments.
_MIXED = {
  'update_every': (4, 4, 8),
  'learning_rate': (0.3, 0.02, 0.3),
  'optimizer': (
    _SGD,
    _KINDS.M3(slow_every=2),
    _KINDS.Dgd(target='printed', erase=0.5),
  ),
}


def make(dtype='float32', **settings):
  """Makes a learner of one block."""
  config = models.ModelConfig(
    vocab_size=_VOCAB,
    num_layers=1,
    embed_dim=8,
    mixer=layers.AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4),
    levels=tuple(
      models.LevelConfig(name, mlp_dim=6)
      for name in _NAMES[: len(settings['update_every'])]
    ),
    max_length=_LENGTH,
    dtype=dtype,
  )
  return models.make_model(config, levels.make_inner(**settings))


def init(learner):
  """Makes the parameters of a learner."""
  params = compiling.jit(learner.init_params)(jax.random.key(0))
  dtype = learner.config.dtype
  # Larger than initial values, so that losses and steps are not negligible.
  return jax.tree.map(lambda x: jnp.asarray(1.5 * x, dtype), params)


def draw():
  rng = np.random.default_rng(0)
  tokens = rng.integers(_VOCAB, size=(_ROWS, _LENGTH)).astype(np.int32)
  return tokens, rng.uniform(size=tokens.shape) < 0.15


class MixedChainTest(parameterized.TestCase):
  def test_any_split_gives_the_same(self):
    learner = make(**_MIXED)
    params = init(learner)
    tokens, reset = draw()
    read = compiling.jit(
      lambda s, r, m: learner.forward(params, s, tokens, reset=r, mask=m)
    )
    start = learner.init_state(params, _ROWS)
    whole, after = read(start, reset, np.ones_like(reset))
    # Calls are masks of one shape, each row split at its own places.
    rng = np.random.default_rng(1)
    call = np.sort(rng.integers(4, size=tokens.shape), axis=1)
    state, total = start, 0.0
    for i in range(4):
      logits, state = read(state, reset, call == i)
      total += np.where((call == i)[..., None], logits, 0.0)
    np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state, after)
    for level, number in zip(after.levels.values(), (4, 4, 2), strict=True):
      np.testing.assert_array_equal(level.num_updates, [number] * _ROWS)
      self.assertGreater(level.drift.min(), 1e-3)

  def test_each_level_has_the_gradient_of_its_own_loss(self):
    objectives = ('in_segment', 'next_token', 'dot')
    tokens, reset = (x[:, :4] for x in draw())
    settings = {'update_every': (4, 4, 4), 'clip_norm': (None, 1.0, 0.1)}

    def learn(objective):
      learner = make(objective=objective, **settings)
      params = init(learner)
      read = lambda p: learner.forward(p, None, tokens, reset=reset)
      logits, state = compiling.jit(read)(params)
      return logits, state.levels

    logits, mixed = learn(objectives)
    for name, objective in zip(_NAMES, objectives, strict=True):
      expected, alike = learn(objective)
      np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        mixed[name],
        alike[name],
      )

  def test_levels_share_passes_through_the_model(self):
    tokens = jax.ShapeDtypeStruct((1, 8), np.int32)

    def flops(objective, optimizer=_SGD):
      learner = make(
        update_every=(8, 8), objective=objective, optimizer=optimizer
      )
      params = jax.eval_shape(learner.init_params, jax.random.key(0))
      read = lambda p, t: learner.forward(p, None, t)
      return compilation.matmul_flops(read, params, tokens)

    plain, local = flops('next_token'), flops('dot')
    self.assertGreater(plain, local)
    self.assertEqual(flops(('dot', 'l2')), local)
    self.assertGreater(flops(('next_token', 'in_segment')), 1.3 * plain)
    # Energies are sums of squares.
    self.assertEqual(flops('next_token', _KINDS.Dgd()), plain)

  @pytest.mark.slow
  def test_meta_gradient_of_local_losses(self):
    self.check_meta_gradient(
      update_every=(4, 8),
      optimizer=(_KINDS.Sgd(momentum=0.9), _KINDS.Dgd(target='printed')),
      objective='dot',
    )

  @pytest.mark.slow
  def test_meta_gradient_of_the_next_token_loss(self):
    dgd = _KINDS.Dgd
    self.check_meta_gradient(
      update_every=(4, 4, 8),
      optimizer=(_SGD, dgd(target='corrected'), dgd(target='printed')),
    )

  def check_meta_gradient(self, **settings):
    """Compares with finite differences in float64."""
    self.enterContext(jax.enable_x64(True))
    learner = make('float64', learning_rate=0.2, **settings)
    params = init(learner)
    tokens, reset = draw()
    targets = np.roll(tokens, -1, axis=1)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

    def loss(step):
      moved = jax.tree.map(lambda x, d: x + step * d, params, direction)
      losses, state = learner.losses(
        moved, None, tokens, targets, cross_entropy, reset=reset
      )
      return jnp.mean(losses), state

    value_and_grad = compiling.jit(jax.value_and_grad(loss, has_aux=True))
    (_, state), slope = value_and_grad(0.0)
    self.assertFalse(any(x.frozen.any() for x in state.levels.values()))
    step = 1e-5
    (ahead, _), _ = value_and_grad(step)
    (behind, _), _ = value_and_grad(-step)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)

  @parameterized.parameters(*_KINDS.OptimizerConfig.__args__)
  @pytest.mark.slow
  def test_every_kind_of_optimizer_learns(self, kind):
    learner = make(update_every=(4, 8), learning_rate=0.01, optimizer=kind())
    params = init(learner)
    tokens, reset = draw()

    def loss(params):
      losses, state = learner.losses(
        params,
        None,
        tokens,
        np.roll(tokens, -1, axis=1),
        optax.softmax_cross_entropy_with_integer_labels,
        reset=reset,
      )
      return jnp.mean(losses), state

    value_and_grad = compiling.jit(jax.value_and_grad(loss, has_aux=True))
    (_, state), grads = value_and_grad(params)
    for level in state.levels.values():
      self.assertFalse(level.frozen.any())
      self.assertGreater(level.drift.min(), 1e-5)
    for leaf in jax.tree.leaves(grads):
      self.assertTrue(np.all(np.isfinite(leaf)))
