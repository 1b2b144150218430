"""Titans' hybrids against loops written from their definitions."""

import dataclasses

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import parameters
from nested_learning.memory import extensions
from tests import compiling
from tests.layers import sliding_window_test

_EMBED, _LENGTH, _SIZE = 6, 11, 4
_SIZES = {'embed_dim': _EMBED, 'dtype': jnp.float64}
_MEMORY = layers.MemoryMixerConfig(
  num_heads=2,
  head_dim=4,
  adaptive=(),
  chunk_size=_SIZE,
  erase='none',
  momentum=True,
)
_ATTENTION = layers.AttentionConfig(2, 1, head_dim=4, num_persistent=3)
_WINDOW = dataclasses.replace(_ATTENTION, window=5)


def rms(scale, x):
  return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def gated(x, by):
  return x * by / (1 + np.exp(-by))


class _Case(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(2, _LENGTH, _EMBED))
    self.reset = np.zeros((2, _LENGTH), bool)
    self.reset[0, 6] = self.reset[1, 8] = True

  def random(self, layer):
    """Draws parameters of a layer, none of them at a special value."""
    params = parameters.init(jax.random.key(0), layer.table, jnp.float64)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda w: w + 0.3 * rng.normal(size=w.shape), params)


def read(layer, params, x, reset):
  """Returns the outputs of a layer for whole rows."""
  run = lambda params, x, reset: layer.apply(
    params, None, x, layers.TokenInfo(reset)
  )
  return np.asarray(compiling.jit(run)(params, x, reset)[0])


class HybridsTest(_Case):
  def parts(self, params):
    """Returns functions of whole rows: the memory, and attention by hand."""
    memory = _MEMORY.make(**_SIZES)
    remember = lambda x: read(memory, params['titans'], x, self.reset)
    attend = lambda x: np.stack(
      [
        sliding_window_test.attend_by_hand(
          params['attention'], x[row], self.reset[row], _WINDOW.window
        )
        for row in range(2)
      ]
    )
    return remember, attend

  def test_memory_as_a_layer(self):
    layer = layers.MemoryAsLayerConfig(_MEMORY, _WINDOW).make(**_SIZES)
    params = self.random(layer)
    out = read(layer, params, self.x, self.reset)
    remember, attend = self.parts(params)
    expected = attend(rms(params['norm'], remember(self.x)))
    np.testing.assert_allclose(out, expected, atol=1e-9)

  def test_memory_as_a_gate(self):
    layer = layers.MemoryAsGateConfig(_MEMORY, _WINDOW).make(**_SIZES)
    params = self.random(layer)
    out = read(layer, params, self.x, self.reset)
    remember, attend = self.parts(params)
    expected = gated(
      rms(params['norm']['attention'], attend(self.x)),
      rms(params['norm']['titans'], remember(self.x)),
    )
    np.testing.assert_allclose(out, expected, atol=1e-9)


class MemoryAsContextTest(_Case):
  def setUp(self):
    super().setUp()
    self.layer = layers.MemoryAsContextConfig(_MEMORY, _ATTENTION).make(
      **_SIZES
    )
    self.params = self.random(self.layer)

  def by_hand(self):
    """Computes MAC token by token, from a copy of each segment's memory."""
    memory = _MEMORY.make(**_SIZES)

    @compiling.jit_static('write')
    def step(state, token, write):
      info = layers.TokenInfo(write=write)
      out, state = memory.apply(
        self.params['titans'], state, token[None, None], info
      )
      return out[0, 0], state

    fresh = memory.init_state(self.params['titans'], 1)
    rows = zip(self.x, self.reset, strict=True)
    return np.stack([self.row_by_hand(step, fresh, *row) for row in rows])

  def row_by_hand(self, step, fresh, x, reset):
    scales = self.params['norm']
    writes, conv, found, context, outputs = fresh, fresh.conv, None, [], []
    for t, token in enumerate(x):
      if reset[t]:  # the chunk's border stays where it was
        offset = writes.main.offset
        writes = fresh._replace(main=fresh.main._replace(offset=offset))
        conv = fresh.conv
      if t % _SIZE == 0 or reset[t]:
        found, context = writes.main, []
      reads = fresh._replace(conv=conv, main=found)
      h, after = step(reads, token, write=False)
      conv = after.conv
      context += [rms(scales['read'], h), token]
      y = sliding_window_test.attend_by_hand(
        self.params['attention'],
        np.stack(context),
        np.zeros(len(context), bool),
        len(context),
      )[-1]
      y = rms(scales['attention'], y)
      m, writes = step(writes, y, write=True)
      outputs.append(gated(y, rms(scales['titans'], m)))
    return np.stack(outputs)

  def test_equals_the_definition(self):
    expected = self.by_hand()
    for num_tokens in (_LENGTH, 2 * _SIZE):  # the second are whole segments
      out = read(
        self.layer,
        self.params,
        self.x[:, :num_tokens],
        self.reset[:, :num_tokens],
      )
      np.testing.assert_allclose(out, expected[:, :num_tokens], atol=1e-9)

  def test_without_writing_the_memory_stays(self):

    @compiling.jit_static('write')
    def run(state, write):
      info = layers.TokenInfo(write=write)
      return self.layer.apply(self.params, state, self.x, info)

    _, state = run(self.layer.init_state(self.params, 2), write=True)
    _, after = run(state, write=False)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
      after.titans.main.memory,
      state.titans.main.memory,
    )

  def test_gradient_through_reads_and_writes(self):
    x = self.x[:, :8]
    weights = np.random.default_rng(3).normal(size=x.shape)

    def loss(params):
      out, _ = self.layer.apply(params, None, x, layers.TokenInfo())
      return jnp.sum(out * weights)

    run = compiling.jit(jax.value_and_grad(loss))
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda w: rng.normal(size=w.shape), self.params)
    _, grads = run(self.params)
    expected = sum(
      jax.tree.leaves(
        jax.tree.map(lambda g, d: float(jnp.sum(g * d)), grads, direction)
      )
    )
    step = 1e-6
    moved = lambda step: run(
      jax.tree.map(lambda w, d: w + step * d, self.params, direction)
    )[0]
    slope = (moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-6)

  @parameterized.parameters(
    ({'attention': _WINDOW}, 'attention.window=5 has no place in MAC'),
    (
      {
        'memory': dataclasses.replace(
          _MEMORY, learns='every_map', extension=extensions.Omega(2)
        )
      },
      'extension=Omega.* has no place in MAC',
    ),
    (
      {'memory': dataclasses.replace(_MEMORY, adaptive=('k',))},
      'adaptive=.* has no place in MAC',
    ),
  )
  def test_bad_settings_name_the_value(self, changes, message):
    config = layers.MemoryAsContextConfig(_MEMORY, _ATTENTION)
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(config, **changes)
