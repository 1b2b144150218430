"""The contract of every model, over a small zoo."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import layers
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from tests import compiling

_BATCH, _LENGTH, _VOCAB = 2, 19, 16
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
  models.LevelConfig('slow', mlp_dim=4, chunk_size=64),
)
_ZOO = {
  'transformer': _TRANSFORMER,
  'hope_attention': dataclasses.replace(_TRANSFORMER, levels=_CHAIN),
  'hope': dataclasses.replace(
    _TRANSFORMER,
    levels=_CHAIN,
    mixer=layers.SelfModifyingTitansConfig(
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


class LanguageModelTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    shape = (_BATCH, _LENGTH)
    self.tokens = rng.integers(_VOCAB, size=shape).astype(np.int32)
    self.reset = rng.uniform(size=shape) < 0.1
    self.all = np.ones(shape, bool)

  def parts(self, name):
    model = models.make_model(_ZOO[name])
    return model, compiling.jit(model.init_params)(jax.random.key(0))

  @parameterized.parameters(*_ZOO)
  def test_stream_contract(self, name):
    model, params = self.parts(name)
    start = compiling.jit_static('batch_size')(model.init_state)(
      params, batch_size=_BATCH
    )
    traces = []

    @compiling.jit
    def forward(state, tokens, reset, mask):
      traces.append(tokens.shape)
      return model.forward(params, state, tokens, reset=reset, mask=mask)

    whole, last = forward(start, self.tokens, self.reset, self.all)
    with self.subTest('shapes and types'):
      self.assertEqual(whole.shape, (_BATCH, _LENGTH, _VOCAB))
      self.assertEqual(whole.dtype, jnp.float32)
      self.assertEqual(
        jax.tree.map(lambda x: (x.shape, x.dtype), last),
        jax.tree.map(lambda x: (x.shape, x.dtype), start),
      )

    with self.subTest('a token changes what comes after it, and nothing else'):
      none = np.zeros_like(self.reset)
      before, _ = forward(start, self.tokens, none, self.all)
      for t in (2, 9):
        tokens = self.tokens.copy()
        tokens[:, t] = (tokens[:, t] + 1) % _VOCAB
        after, _ = forward(start, tokens, none, self.all)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        differs = np.abs(after - before).max(axis=(0, 2))
        self.assertTrue(np.all(differs[t:] > 0))

    with self.subTest('a document is alone'):
      reset = np.zeros_like(self.reset)
      reset[:, 10] = True
      tokens = self.tokens.copy()
      tokens[:, :10] = tokens[:, :10][:, ::-1]
      out, _ = forward(start, self.tokens, reset, self.all)
      again, _ = forward(start, tokens, reset, self.all)
      np.testing.assert_array_equal(out[:, 10:], again[:, 10:])

    with self.subTest('calls of any length, each row cut on its own'):
      rng = np.random.default_rng(1)
      for num_calls in (2, 5):
        call = np.sort(rng.integers(num_calls, size=(_BATCH, _LENGTH)), axis=1)
        state, total = start, 0.0
        for i in range(num_calls):
          out, state = forward(state, self.tokens, self.reset, call == i)
          total += np.where((call == i)[..., None], out, 0.0)
        np.testing.assert_allclose(total, whole, rtol=1e-4, atol=1e-4)

    with self.subTest('token by token, with one compilation'):
      traces.clear()
      state, pieces = start, []
      for t in range(_LENGTH):
        one = slice(t, t + 1)
        out, state = forward(
          state, self.tokens[:, one], self.reset[:, one], self.all[:, one]
        )
        pieces.append(out)
      np.testing.assert_allclose(
        np.concatenate(pieces, axis=1), whole, rtol=1e-4, atol=1e-4
      )
      self.assertLen(traces, 1)

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
    query = placed['blocks']['mixer']['out']
    self.assertEqual(query.sharding.shard_shape(query.shape)[1], 1)

  def test_recomputing_layers_changes_nothing(self):
    model, params = self.parts('hope_attention')
    again = models.make_model(
      dataclasses.replace(_ZOO['hope_attention'], remat='layer')
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

  def test_level_labels(self):
    labels = models.level_labels(_ZOO['hope'])
    model = models.make_model(_ZOO['hope'])
    self.assertEqual(
      jax.tree.structure(labels),
      jax.tree.structure(parameters.abstract(model.table)),
    )
    chain = labels['blocks']['levels']
    self.assertEqual(set(jax.tree.leaves(chain['slow'])), {'slow'})
    # A level without a chunk size takes every step.
    self.assertEqual(set(jax.tree.leaves(chain['fast'])), {'base'})
    others = {**labels, 'blocks': {**labels['blocks'], 'levels': {}}}
    self.assertEqual(set(jax.tree.leaves(others)), {'base'})

  def test_the_trunk_takes_inputs_of_any_kind(self):
    model, params = self.parts('transformer')
    trunk = models.make_trunk(_TRANSFORMER)
    self.assertEqual(set(trunk.table), {'blocks', 'norm'})
    x = np.random.default_rng(2).normal(size=(_BATCH, 7, 8)).astype(np.float32)
    marks = layers.Marks(self.reset[:, :7])
    own = {name: params[name] for name in trunk.table}
    run = compiling.jit(trunk.apply)
    out, state = run(own, None, x, marks)
    self.assertEqual(out.shape, x.shape)
    embedded = params['embedding'][self.tokens[:, :7]] * 8**0.5
    out, state = run(params, None, embedded, marks)
    logits, last = compiling.jit(model.forward)(
      params, None, self.tokens[:, :7], reset=self.reset[:, :7]
    )
    np.testing.assert_allclose(
      out @ params['embedding'].T, logits, rtol=1e-5, atol=1e-5
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last
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

  @parameterized.parameters(
    ({'dtype': 'int8'}, "model.dtype='int8' must be 'float32'"),
    ({'remat': 'all'}, "model.remat='all' must be 'none'"),
    ({'levels': _CHAIN + _CHAIN[:1]}, "'fast', 'slow', 'fast'.* unique"),
  )
  def test_bad_settings_name_the_value(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(_TRANSFORMER, **changes)


if __name__ == '__main__':
  absltest.main()
