"""The contract of mixers' configs and of their layers."""

import dataclasses

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp

from nested_learning import layers
from nested_learning import parameters

_MEMORY = layers.MemoryMixerConfig(
  num_heads=2, head_dim=4, chunk_size=8, chunk_size_others=6
)
_STATIC = dataclasses.replace(_MEMORY, adaptive=())
_FULL = layers.AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
_WINDOW = dataclasses.replace(_FULL, window=5)
# Configs, whether they hold any length, and their granularity.
_CONFIGS = {
  'attention': (_FULL, False, 1),
  'convolved': (layers.ConvolvedAttentionConfig(_FULL), False, 1),
  'window': (_WINDOW, True, 1),
  'memory': (_MEMORY, True, 24),
  'static': (_STATIC, True, 8),
  'as_layer': (layers.MemoryAsLayerConfig(_STATIC, _FULL), False, 8),
  'as_gate': (layers.MemoryAsGateConfig(_STATIC, _WINDOW), True, 8),
  'as_context': (layers.MemoryAsContextConfig(_STATIC, _FULL), True, 8),
  'tnt': (layers.TntConfig(_STATIC, (layers.LocalConfig(2, 12),)), True, 24),
}


class MixerConfigTest(parameterized.TestCase):
  @parameterized.parameters(*_CONFIGS)
  def test_protocol(self, name):
    config, holds_any_length, granularity = _CONFIGS[name]
    self.assertEqual(config.holds_any_length, holds_any_length)
    self.assertEqual(config.granularity, granularity)

  @parameterized.parameters(*_CONFIGS)
  def test_no_tokens_leave_the_state(self, name):
    config, *_ = _CONFIGS[name]
    layer = config.make(embed_dim=8, max_length=16, dtype=jnp.float32)
    params = parameters.init(jax.random.key(0), layer.table)
    state = layer.init_state(params, 2)
    none = jnp.zeros((2, 0, 8))
    empty = jnp.zeros((2, 0), bool)
    for start in (None, state):
      for info in (layers.TokenInfo(), layers.TokenInfo(empty, empty)):
        out, after = layer.apply(params, start, none, info)
        self.assertEqual(out.shape, (2, 0, 8))
        chex.assert_trees_all_equal(after, state)
