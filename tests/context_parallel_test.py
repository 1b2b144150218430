"""Layers on devices that share a row equal the same layers on one device."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import compilation
from nested_learning import layers
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.layers import convolution
from nested_learning.layers import norm
from tests import compiling

_ROWS, _LENGTH, _EMBED = 4, 32, 6
_SIZES = {
  'embed_dim': _EMBED,
  'max_length': _LENGTH + 3,
  'dtype': jnp.float64,
}
_MESHES = {
  'context': sharding.MeshConfig(data=1, context=4),
  'all': sharding.MeshConfig(data=2, context=2, model=2),
}


def make_mesh(name):
  config = _MESHES[name]
  size = config.data * config.fsdp * config.context * config.model
  return sharding.make_mesh(config, devices=jax.devices()[:size])


def make_attention(**settings):
  config = layers.AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=4, **settings
  )
  return config.make(**_SIZES)


class ContextParallelTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(_ROWS, _LENGTH, _EMBED))
    self.reset = rng.uniform(size=self.x.shape[:2]) < 0.1
    self.mask = rng.uniform(size=self.x.shape[:2]) < 0.8
    self.cotangent = rng.normal(size=self.x.shape)

  def marks(self, name):
    """Returns no marks, resets, or resets and a mask."""
    return layers.TokenInfo(
      None if name == 'none' else self.reset,
      self.mask if name == 'mask' else None,
    )

  def run_layer(self, layer, marks, mesh=None):
    """Returns outputs, gradients and state, and on a mesh its analysis."""
    params = parameters.init(jax.random.key(1), layer.table, jnp.float64)

    def loss(params, x, reset, mask):
      marks = layers.TokenInfo(reset, mask)
      if mesh is not None:
        x = sharding.keep_rows(x)
      out, state = layer.apply(params, None, x, marks)
      if marks.mask is not None:  # what padding gets is undefined
        out = jnp.where(marks.mask[..., None], out, 0.0)
      return jnp.sum(out * self.cotangent), (out, state)

    run = compiling.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    if mesh is None:
      (_, (out, state)), gradients = run(
        params, self.x, marks.reset, marks.mask
      )
      return out, gradients, state
    with jax.set_mesh(mesh):
      params = jax.device_put(
        params, sharding.param_shardings(layer.table, mesh)
      )
      compiled = run.lower(params, self.x, marks.reset, marks.mask).compile()
      (_, (out, state)), gradients = compiled(
        params, self.x, marks.reset, marks.mask
      )
    found = compilation.analyze(compiled.as_text(), mesh.shape)
    return out, gradients, state, found

  def check(self, layer, mesh, marks, same_state=True):
    expected = self.run_layer(layer, marks)
    *actual, found = self.run_layer(layer, marks, make_mesh(mesh))
    close = functools.partial(np.testing.assert_allclose, atol=1e-10)
    count = len(expected) if same_state else 2
    jax.tree.map(close, list(expected[:count]), actual[:count])
    return found

  @parameterized.parameters(
    # mesh, marks, persistent tokens
    ('context', 'none', 0),
    ('context', 'mask', 0),
    ('context', 'reset', 3),
    ('all', 'reset', 0),
  )
  def test_attention(self, mesh, marks, persistent):
    layer = make_attention(num_persistent=persistent)
    found = self.check(layer, mesh, self.marks(marks))
    rings = [c for c in found.collectives if c.kind == 'collective-permute']
    self.assertIn(('context',), [c.axes for c in rings])

  @parameterized.parameters(
    {'score_scale': 0.9, 'num_persistent': 2},
    {'bias': 'all', 'qk_norm': norm.NormConfig(), 'mesh': 'all'},
    {'score_cap': 0.5},  # not in parts
    {'window': 5, 'score_scale': 0.9, 'score_cap': 0.5},
    {'window': 5, 'num_sinks': 2},  # not in parts
  )
  def test_settings_of_attention(self, mesh='context', **settings):
    layer = make_attention(**settings)
    same_state = 'window' not in settings
    self.check(layer, mesh, self.marks('reset'), same_state=same_state)

  @parameterized.parameters(
    # mesh, marks, window; a device has 8 or 16 tokens
    ('context', 'none', 3),
    ('context', 'reset', 8),
    ('context', 'reset', 21),
    ('all', 'mask', 21),
  )
  def test_window(self, mesh, marks, window):
    layer = make_attention(window=window, num_persistent=2)
    # The ring of the last keys begins elsewhere, and means the same.
    found = self.check(layer, mesh, self.marks(marks), same_state=False)
    if marks != 'mask':
      self.assertIn(('collective-permute', 'context'), found.sent_bytes)

  @parameterized.parameters(
    ('context', 'none', 4), ('context', 'reset', 13), ('all', 'reset', 4)
  )
  def test_convolution(self, mesh, marks, width):
    def apply(params, state, x, marks):
      return convolution.apply(params, state, x, reset=marks.reset)

    table = convolution.table(width, _EMBED, None)
    layer = layers.Layer(table, None, apply)
    found = self.check(layer, mesh, self.marks(marks))
    self.assertIn(('collective-permute', 'context'), found.sent_bytes)

  @parameterized.parameters(
    # mesh, marks, adaptive roles
    ('context', 'reset', ()),
    ('context', 'none', ('k', 'inner_lr')),
    ('all', 'reset', ()),
    ('all', 'mask', ()),
  )
  def test_memory(self, mesh, marks, adaptive):
    config = layers.MemoryMixerConfig(
      num_heads=2,
      head_dim=3,
      kind='matrix',
      adaptive=adaptive,
      momentum=True,
      chunk_size=4,
      chunk_size_others=8,
    )
    layer = config.make(**_SIZES)
    found = self.check(layer, mesh, self.marks(marks))
    if marks != 'mask':
      self.assertEmpty(found.in_memory_loops)
      self.check_hands_over(found, turns=_ROWS + 3 if mesh == 'context' else 3)

  def check_hands_over(self, found, turns):
    """Checks that states alone are sent, once per turn and direction."""
    sent = [
      c for c in found.collectives if c.kind == 'collective-permute' and c.loops
    ]
    self.assertNotEmpty(sent)
    self.assertEqual({(c.axes, c.times) for c in sent}, {(('context',), turns)})

  @parameterized.parameters('context', 'all')
  def test_tnt(self, mesh):
    memory = layers.MemoryMixerConfig(
      num_heads=2,
      head_dim=3,
      kind='matrix',
      adaptive=(),
      target='value',
      erase='none',
      chunk_size=8,
    )
    config = layers.TntConfig(memory, (layers.LocalConfig(2, 4),))
    layer = config.make(**_SIZES)
    found = self.check(layer, mesh, self.marks('reset'))
    self.assertEmpty(found.in_memory_loops)
    # Only the global memory waits for the device before.
    self.check_hands_over(found, turns=_ROWS + 3 if mesh == 'context' else 3)

  def test_memory_as_context(self):
    memory = layers.MemoryMixerConfig(
      num_heads=2,
      head_dim=3,
      kind='matrix',
      adaptive=(),
      target='value',
      chunk_size=4,
    )
    config = layers.MemoryAsContextConfig(
      memory, layers.AttentionConfig(2, 1, 4, num_persistent=1)
    )
    layer = config.make(**_SIZES)
    self.check(layer, 'context', self.marks('reset'), same_state=False)
