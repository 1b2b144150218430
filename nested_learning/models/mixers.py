"""Every layer that mixes tokens, by its config."""

import math
from typing import Any

from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import hybrids
from nested_learning.layers import memory_as_context
from nested_learning.layers import memory_mixer
from nested_learning.layers import tnt

MixerConfig = (
  attention.AttentionConfig
  | memory_mixer.MemoryMixerConfig
  | hybrids.MemoryAsLayerConfig
  | hybrids.MemoryAsGateConfig
  | memory_as_context.MemoryAsContextConfig
  | tnt.TntConfig
)


def make_mixer(
  config: MixerConfig, *, embed_dim: int, max_length: int, dtype: Any
) -> base.Layer:
  """Makes the layer of a config.

  Args:
    config: Its settings.
    embed_dim: Width e of inputs and outputs.
    max_length: Tokens that a stream may have, where `holds_any_length` is
      False.
    dtype: Type of the projections.

  Returns:
    A `Layer`.
  """
  sizes = {'embed_dim': embed_dim, 'dtype': dtype}
  match config:
    case attention.AttentionConfig():
      return attention.make_attention(config, max_length=max_length, **sizes)
    case memory_mixer.MemoryMixerConfig():
      return memory_mixer.make_memory_mixer(config, **sizes)
    case hybrids.MemoryAsLayerConfig():
      return hybrids.make_memory_as_layer(
        config, max_length=max_length, **sizes
      )
    case hybrids.MemoryAsGateConfig():
      return hybrids.make_memory_as_gate(config, max_length=max_length, **sizes)
    case memory_as_context.MemoryAsContextConfig():
      return memory_as_context.make_memory_as_context(config, **sizes)
    case tnt.TntConfig():
      return tnt.make_tnt(config, **sizes)
  raise ValueError(f'unknown mixer {config!r}.')


def holds_any_length(config: MixerConfig) -> bool:
  """Whether the mixer's state has a size that no stream outgrows."""
  match config:
    case attention.AttentionConfig():
      return config.window is not None
    case hybrids.MemoryAsLayerConfig() | hybrids.MemoryAsGateConfig():
      return config.attention.window is not None
  return True


def tokens_at_once(config: MixerConfig) -> int:
  """Tokens that stay together where devices share a row: chunks and shards.

  Args:
    config: A mixer's settings.

  Returns:
    What the number of tokens of a device has to be a multiple of.
  """
  match config:
    case memory_mixer.MemoryMixerConfig():
      others = config.chunk_size_others if config.adaptive else 1
      return math.lcm(config.chunk_size, others)
    case hybrids.MemoryAsLayerConfig() | hybrids.MemoryAsGateConfig():
      return tokens_at_once(config.memory)
    case memory_as_context.MemoryAsContextConfig():
      return config.memory.chunk_size
    case tnt.TntConfig():
      shards = [local.shard_size for local in config.locals]
      return math.lcm(config.memory.chunk_size, *shards)
  return 1
