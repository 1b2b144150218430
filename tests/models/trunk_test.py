"""Tests of the trunk beside the contract of the zoo."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.layers import cms
from nested_learning.layers import norm
from tests import compiling

_BATCH, _LENGTH, _VOCAB = 2, 16, 16
_ATTENTION = layers.AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=4)
_TRANSFORMER = models.ModelConfig(
  vocab_size=_VOCAB,
  num_layers=2,
  embed_dim=8,
  mixer=_ATTENTION,
  levels=(models.LevelConfig('mlp', mlp_dim=8),),
  max_length=24,
)
_CHAIN = (
  models.LevelConfig('fast', mlp_dim=8),
  models.LevelConfig('slow', mlp_dim=4, train_every=64),
)
_ZOO = {
  'transformer': _TRANSFORMER,
  'pattern': dataclasses.replace(
    _TRANSFORMER,
    levels=_CHAIN,
    num_layers=4,
    mixer=(_ATTENTION, dataclasses.replace(_ATTENTION, window=4)),
  ),
  'hope': dataclasses.replace(
    _TRANSFORMER,
    levels=_CHAIN,
    mixer=layers.MemoryMixerConfig(
      num_heads=4, head_dim=4, chunk_size=8, chunk_size_others=4
    ),
  ),
}


def loss(model, params, tokens, reset):
  logits, _ = model.forward(params, None, tokens, reset=reset)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], tokens[:, 1:]
  )
  return jnp.mean(losses)


class TrunkTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    shape = (_BATCH, _LENGTH)
    self.tokens = rng.integers(_VOCAB, size=shape).astype(np.int32)
    self.reset = rng.uniform(size=shape) < 0.1

  def parts(self, name):
    model = models.make_model(_ZOO[name])
    return model, compiling.jit(model.init_params)(jax.random.key(0))

  @parameterized.parameters(*_ZOO)
  def test_sharded_equals_unsharded(self, name):
    model, params = self.parts(name)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, model=4))
    param_shardings = sharding.param_shardings(model.table, mesh)
    traces = []

    def value_and_grad(params, tokens, reset):
      traces.append(1)
      return jax.value_and_grad(
        lambda params: loss(model, params, tokens, reset)
      )(params)

    expected = compiling.jit(value_and_grad)(params, self.tokens, self.reset)
    traces.clear()
    placed = jax.device_put(params, param_shardings)
    batch = jax.device_put(
      (self.tokens, self.reset), sharding.batch_sharding(mesh)
    )
    step = compiling.jit(
      value_and_grad,
      out_shardings=(sharding.replicated(mesh), param_shardings),
    )
    value, grads = step(placed, *batch)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
      known = expected[1]
      for key in path:
        known = known[key.key]
      scale = np.abs(known).max()
      self.assertGreater(scale, 0.0, parameters.path_name(path))
      np.testing.assert_allclose(
        grad, known, rtol=1e-5, atol=1e-5 * scale + 1e-8
      )
    step(placed, *batch)
    self.assertLen(traces, 1)
    blocks = placed['blocks']
    out = blocks.get('0', blocks)['mixer']['out']
    self.assertEqual(out.sharding.shard_shape(out.shape)[1], 1)

  def test_remat_changes_no_value(self):
    model, params = self.parts('pattern')
    again = models.make_model(
      dataclasses.replace(_ZOO['pattern'], remat='layer')
    )
    grads = [
      compiling.jit(
        jax.grad(lambda p, m=m: loss(m, p, self.tokens, self.reset))
      )(params)
      for m in (model, again)
    ]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
      *grads,
    )

  def test_bfloat16_is_near_float32(self):
    model, params = self.parts('transformer')
    low = models.make_model(dataclasses.replace(_TRANSFORMER, dtype='bfloat16'))
    run = lambda model: compiling.jit(model.forward)(params, None, self.tokens)[
      0
    ]
    expected, actual = run(model), run(low)
    self.assertEqual(actual.dtype, jnp.float32)
    error = np.sqrt(np.mean((actual - expected) ** 2))
    self.assertLess(error, 2e-2 * np.abs(expected).max())
    self.assertGreater(error, 0.0)

  def test_a_pattern_repeats_its_blocks(self):
    config = _ZOO['pattern']
    model, params = self.parts('pattern')
    marks = layers.TokenInfo(self.reset)
    out, _ = compiling.jit(model.forward)(
      params, None, self.tokens, reset=self.reset
    )

    @compiling.jit_static('mixer_config')
    def run_block(block, x, mixer_config):
      mixer = mixer_config.make(embed_dim=8, max_length=24, dtype=jnp.float32)
      normed = norm.rms_norm(block['norm'], x)
      mixed, _ = mixer.apply(block['mixer'], None, normed, marks)
      return cms.apply(config.levels, block['levels'], x + mixed)

    x = params['embedding'][self.tokens] * 8**0.5
    for i in range(config.num_layers):
      place, group = i % 2, i // 2
      stacked = params['blocks'][str(place)]
      block = jax.tree.map(lambda p, group=group: p[group], stacked)
      x = run_block(block, x, mixer_config=config.mixer[place])
    logits = norm.rms_norm(params['norm'], x) @ params['embedding'].T
    np.testing.assert_allclose(out, logits, rtol=1e-4, atol=1e-4)

  @parameterized.parameters('hope', 'pattern')
  def test_level_labels(self, name):
    labels = models.level_labels(_ZOO[name])
    model = models.make_model(_ZOO[name])
    self.assertEqual(
      jax.tree.structure(labels),
      jax.tree.structure(parameters.abstract(model.table)),
    )
    slow = 0
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
      # A level without `train_every` takes every step.
      is_slow = '/levels/slow/' in parameters.path_name(path)
      self.assertEqual(label, 'slow' if is_slow else 'base')
      slow += is_slow
    self.assertEqual(slow, 4 * len(_ZOO[name].pattern))

  def test_max_stream_length(self):
    window = dataclasses.replace(_ATTENTION, window=4)
    memory = _ZOO['hope'].mixer
    static = dataclasses.replace(memory, adaptive=())
    for mixer, limit in (
      (_ATTENTION, 24),
      (window, None),
      (memory, None),
      ((memory, window), None),
      ((memory, _ATTENTION), 24),
      (layers.MemoryAsGateConfig(memory, window), None),
      (layers.MemoryAsGateConfig(memory, _ATTENTION), 24),
      (layers.MemoryAsLayerConfig(memory, _ATTENTION), 24),
      (layers.MemoryAsContextConfig(static, _ATTENTION), None),
    ):
      config = dataclasses.replace(_TRANSFORMER, mixer=mixer)
      self.assertEqual(models.max_stream_length(config), limit, mixer)
      model = models.make_model(config)
      params = parameters.abstract(model.table)
      state = jax.eval_shape(lambda p, m=model: m.init_state(p, 1), params)
      shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
      self.assertEqual(
        any(24 in shape for shape in shapes), limit is not None, mixer
      )

  def test_parameter_count_of_a_transformer(self):
    # embedding, final norm, and per layer: four projections, three MLP
    # matrices, two norms.
    per_layer = 4 * 8 * 16 + 3 * 8 * 8 + 2 * 8
    table = models.make_model(_TRANSFORMER).table
    self.assertEqual(parameters.count(table), _VOCAB * 8 + 8 + 2 * per_layer)

  @parameterized.parameters(*_ZOO)
  def test_too_many_tokens(self, name):
    model = models.make_model(_ZOO[name])
    params = parameters.abstract(model.table)
    tokens = jax.ShapeDtypeStruct((1, 25), jnp.int32)
    with self.assertRaisesRegex(ValueError, '25 tokens.*max_length=24; raise'):
      jax.eval_shape(lambda p, t: model.forward(p, None, t), params, tokens)

  @parameterized.parameters(*_ZOO, 'learning')
  def test_a_call_without_tokens_leaves_the_state(self, name):
    inner = levels.make_inner((4,)) if name == 'learning' else None
    config = _ZOO.get(name, _TRANSFORMER)
    model = models.make_model(config, inner)
    params = parameters.abstract(model.table)
    tokens = jax.ShapeDtypeStruct((2, 0), jnp.int32)
    state = jax.eval_shape(lambda p: model.init_state(p, 2), params)
    for start in (None, state):
      logits, after = jax.eval_shape(model.forward, params, start, tokens)
      self.assertEqual(logits.shape, (2, 0, _VOCAB))
      self.assertEqual(after, state)

  @parameterized.parameters(
    ({'vocab_size': 0}, 'vocab_size=0 must be at least 1'),
    ({'num_layers': 0}, 'num_layers=0 must be at least 1'),
    ({'embed_dim': -8}, 'embed_dim=-8 must be at least 1'),
    ({'max_length': 0}, 'max_length=0 must be at least 1'),
    ({'dtype': 'int8'}, "dtype='int8' must be one of 'float32'"),
    ({'remat': 'all'}, "remat='all' must be one of 'none'"),
    ({'mixer': (_ATTENTION,) * 3}, 'num_layers=2 is not a multiple of the 3'),
    ({'mixer': ()}, 'has no mixer'),
    ({'levels': _CHAIN + _CHAIN[:1]}, "two levels are named 'fast'"),
  )
  def test_bad_settings_name_the_value(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(_TRANSFORMER, **changes)


class BackwardPassTest(absltest.TestCase):
  """Counts the residuals of a block's backward pass."""

  def test_keeps_little_of_a_token(self):
    """Hope keeps 24 times the width of a token; 67 without recomputation."""
    wide, heads = 64, 4
    dim = wide // heads
    mixer = layers.MemoryMixerConfig(
      heads, dim, chunk_size=dim, chunk_size_others=dim
    )
    levels = (models.LevelConfig('mlp', mlp_dim=2 * wide),)

    def kept(num_layers, length):
      config = models.ModelConfig(
        _VOCAB, num_layers, wide, mixer, levels, max_length=length
      )
      model = models.make_model(config)
      forward = lambda params, tokens: model.forward(params, None, tokens)[0]
      backward = jax.eval_shape(
        lambda params, tokens: jax.vjp(lambda p: forward(p, tokens), params)[1],
        parameters.abstract(model.table),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
      )
      return sum(leaf.size for leaf in jax.tree.leaves(backward))

    of_block = lambda length: kept(3, length) - kept(2, length)
    per_token = (of_block(256) - of_block(128)) / 128
    self.assertLess(per_token / wide, 25)
