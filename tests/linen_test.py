"""Layers and models as Linen modules, alone and inside Flax models."""

from absl.testing import parameterized
from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import layers
from nested_learning import linen
from nested_learning import models
from tests import compiling

_MIXER = layers.MemoryMixerConfig(
  num_heads=2, head_dim=4, chunk_size=8, chunk_size_others=4
)
_LAYER = _MIXER.make(embed_dim=8, dtype=jnp.float32)
_MODEL = models.make_model(
  models.ModelConfig(
    vocab_size=13,
    num_layers=2,
    embed_dim=8,
    mixer=layers.AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4),
    levels=(models.LevelConfig('fast', mlp_dim=8),),
    max_length=16,
  )
)
_TOKENS = jnp.arange(2 * 12).reshape(2, 12) * 7 % 13


class Recaller(nn.Module):
  """An ordinary Linen model with one Hope layer inside."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(13, 8)(tokens)
    x = x + linen.Bridge(_LAYER, name='titans')(nn.LayerNorm()(x))
    return nn.Dense(13)(x)


def next_token_loss(logits, tokens):
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[:, :-1], tokens[:, 1:]
  )
  return jnp.mean(losses)


class LinenTest(parameterized.TestCase):
  def test_a_model_equals_its_functions_and_streams(self):
    module = linen.Bridge(_MODEL)
    variables = compiling.jit(module.init)(jax.random.key(0), _TOKENS)
    self.assertEqual(set(variables), {'params'})
    self.assertEqual(
      jax.tree.map(jnp.shape, variables['params']),
      jax.tree.map(jnp.shape, _MODEL.init_params(jax.random.key(0))),
    )
    whole, _ = compiling.jit(_MODEL.forward)(variables['params'], None, _TOKENS)
    np.testing.assert_array_equal(
      compiling.jit(module.apply)(variables, _TOKENS), whole
    )

    step = compiling.jit(lambda v, x: module.apply(v, x, mutable=['memory']))
    pieces, carried = [], {}
    for i in range(0, 12, 4):
      logits, carried = step({**variables, **carried}, _TOKENS[:, i : i + 4])
      pieces.append(logits)
    np.testing.assert_allclose(
      jnp.concatenate(pieces, axis=1), whole, atol=1e-5
    )
    # A memory that is given and not mutable is read, and stays.
    again = compiling.jit(module.apply)(
      {**variables, **carried}, _TOKENS[:, :4]
    )
    self.assertGreater(jnp.max(jnp.abs(again - pieces[0])), 1e-3)

  def test_a_jit_may_close_over_numpy_variables(self):
    module = linen.Bridge(_MODEL)
    shapes = jax.eval_shape(module.init, jax.random.key(0), _TOKENS)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    logits = jax.eval_shape(lambda x: module.apply(variables, x), _TOKENS)
    self.assertEqual(logits.shape, (2, 12, 13))

  def test_marks_reach_the_source(self):
    module = linen.Bridge(_MODEL)
    variables = compiling.jit(module.init)(jax.random.key(0), _TOKENS)
    reset = jnp.zeros(_TOKENS.shape, bool).at[:, 5].set(True)
    logits = compiling.jit(module.apply)(variables, _TOKENS, reset=reset)
    alone = compiling.jit(module.apply)(variables, _TOKENS[:, 5:])
    np.testing.assert_allclose(logits[:, 5:], alone, atol=1e-5)

  def test_hope_layer_trains_inside_a_linen_model(self):
    model = Recaller()
    init = compiling.jit(model.init)
    state = train_state.TrainState.create(
      apply_fn=model.apply,
      params=init(jax.random.key(0), _TOKENS)['params'],
      tx=optax.adam(1e-2),
    )

    @compiling.jit
    def step(state):
      def loss(params):
        logits = state.apply_fn({'params': params}, _TOKENS)
        return next_token_loss(logits, _TOKENS)

      value, grads = jax.value_and_grad(loss)(state.params)
      return state.apply_gradients(grads=grads), value, grads

    losses = []
    for _ in range(15):
      state, loss, grads = step(state)
      losses.append(float(loss))
    self.assertLess(losses[-1], 0.7 * losses[0])
    for leaf in jax.tree.leaves(grads['titans']['memory']):
      self.assertGreater(jnp.max(jnp.abs(leaf)), 0.0)

    # The same weights, as a stream: the layer keeps its state by its name.
    variables = {'params': state.params}
    whole = compiling.jit(model.apply)(variables, _TOKENS)
    stream = compiling.jit(lambda v, x: model.apply(v, x, mutable=['memory']))
    first, carried = stream(variables, _TOKENS[:, :5])
    self.assertEqual(set(carried['memory']), {'titans'})
    second, _ = stream({**variables, **carried}, _TOKENS[:, 5:])
    np.testing.assert_allclose(
      jnp.concatenate([first, second], axis=1), whole, atol=1e-4
    )

  def test_hope_layer_trains_inside_an_nnx_model(self):
    class Model(nnx.Module):
      def __init__(self, rngs):
        self.embed = nnx.Embed(13, 8, rngs=rngs)
        self.titans = nnx.bridge.ToNNX(linen.Bridge(_LAYER), rngs=rngs)
        self.head = nnx.Linear(8, 13, rngs=rngs)

      def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.titans(x))

    graphs = []

    @compiling.jit  # Linen draws its parameters while it runs
    def init():
      model = Model(nnx.Rngs(0))
      nnx.bridge.lazy_init(model.titans, jnp.zeros((2, 12, 8)))
      optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
      graph, state = nnx.split((model, optimizer))
      graphs.append(graph)
      return state

    state = init()
    (graph,) = graphs
    before = nnx.state(nnx.merge(graph, state)[0].titans, nnx.Param)

    @compiling.jit
    def step(state):
      model, optimizer = nnx.merge(graph, state)
      loss, grads = nnx.value_and_grad(
        lambda model: next_token_loss(model(_TOKENS), _TOKENS)
      )(model)
      optimizer.update(model, grads)
      return loss, nnx.state((model, optimizer))

    losses = []
    for _ in range(10):
      loss, state = step(state)
      losses.append(float(loss))
    self.assertLess(losses[-1], 0.9 * losses[0])
    model, _ = nnx.merge(graph, state)
    after = nnx.state(model.titans, nnx.Param)
    for a, b in zip(
      jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ):
      self.assertGreater(jnp.max(jnp.abs(a - b)), 0.0)

  def test_logical_axes_are_metadata(self):
    module = linen.Bridge(_MODEL, partitioned=True)
    variables = jax.eval_shape(module.init, jax.random.key(0), _TOKENS)
    axes = nn.get_partition_spec(variables)['params']
    self.assertEqual(axes['embedding'], jax.P('vocab', 'embed'))
    self.assertEqual(
      axes['blocks']['mixer']['query'],
      jax.P('layers', 'embed', 'heads', None),
    )
