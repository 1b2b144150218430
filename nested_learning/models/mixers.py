"""Every layer that mixes tokens, by its config."""

from typing import Any

from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import hybrids
from nested_learning.layers import memory_mixer
from nested_learning.layers import tnt

MixerConfig = (
  attention.AttentionConfig
  | memory_mixer.MemoryMixerConfig
  | hybrids.MemoryAsLayerConfig
  | hybrids.MemoryAsGateConfig
  | hybrids.MemoryAsContextConfig
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
  return config.make(embed_dim=embed_dim, max_length=max_length, dtype=dtype)


def holds_any_length(config: MixerConfig) -> bool:
  """Whether the mixer's state has a size that no stream outgrows."""
  return config.holds_any_length


def tokens_at_once(config: MixerConfig) -> int:
  """Tokens that stay together where devices share a row: chunks and shards.

  Args:
    config: A mixer's settings.

  Returns:
    What the number of tokens of a device has to be a multiple of.
  """
  return config.granularity
