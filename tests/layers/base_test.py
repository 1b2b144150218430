"""What every mixer's config offers to the models around it."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp

from nested_learning import layers

_MEMORY = layers.MemoryMixerConfig(
  num_heads=2, head_dim=4, chunk_size=8, chunk_size_others=6
)
_STATIC = dataclasses.replace(_MEMORY, adaptive=())
_FULL = layers.AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
_WINDOW = dataclasses.replace(_FULL, window=5)


class MixerConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    # config, holds_any_length, granularity
    (_FULL, False, 1),
    (_WINDOW, True, 1),
    (_MEMORY, True, 24),
    (_STATIC, True, 8),
    (layers.MemoryAsLayerConfig(_STATIC, _FULL), False, 8),
    (layers.MemoryAsGateConfig(_STATIC, _WINDOW), True, 8),
    (layers.MemoryAsContextConfig(_STATIC, _FULL), True, 8),
    (layers.TntConfig(_STATIC, (layers.LocalConfig(2, 12),)), True, 24),
  )
  def test_protocol(self, config, holds_any_length, granularity):
    self.assertEqual(config.holds_any_length, holds_any_length)
    self.assertEqual(config.granularity, granularity)
    layer = config.make(embed_dim=8, max_length=16, dtype=jnp.float32)
    self.assertIsInstance(layer, layers.Layer)


if __name__ == '__main__':
  absltest.main()
