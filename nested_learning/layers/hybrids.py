r"""Attention and a memory in one layer: Titans' MAL and MAG.

With attention A in a window and memory M, both layers of their own:

.. math::
   \text{memory as a layer (MAL):}\quad y &= A(norm(M(x))) \\
   \text{memory as a gate (MAG):}\quad y &= norm(A(x)) \odot silu(norm(M(x)))

The papers' persistent tokens are the attention's, see `AttentionConfig`; what
they would have written into the memory is learned as its initial memory. Titans
leaves the gate open ("normalised with learnable vectors, followed by a
non-linearity"); and the norm between the layers of MAL is ours.

References:
  Behrouz et al., Titans, arXiv:2501.00663, 2024, eqs. 26-31.
"""

import dataclasses
from typing import Any

import jax

from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import memory_mixer
from nested_learning.layers import norm


@dataclasses.dataclass(frozen=True)
class MemoryAsLayerConfig:
  """A memory, and attention to what it makes of the tokens."""

  memory: memory_mixer.MemoryMixerConfig
  attention: attention.AttentionConfig

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return self.attention.holds_any_length

  @property
  def granularity(self) -> int:
    """Tokens of a chunk; see `base.MixerConfig`."""
    return self.memory.granularity

  def make(self, *, embed_dim: int, max_length: int, dtype: Any) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    return make_memory_as_layer(
      self, embed_dim=embed_dim, max_length=max_length, dtype=dtype
    )


@dataclasses.dataclass(frozen=True)
class MemoryAsGateConfig:
  """Attention and a memory side by side, each gating the other."""

  memory: memory_mixer.MemoryMixerConfig
  attention: attention.AttentionConfig

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return self.attention.holds_any_length

  @property
  def granularity(self) -> int:
    """Tokens of a chunk; see `base.MixerConfig`."""
    return self.memory.granularity

  def make(self, *, embed_dim: int, max_length: int, dtype: Any) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    return make_memory_as_gate(
      self, embed_dim=embed_dim, max_length=max_length, dtype=dtype
    )


def make_memory_as_layer(
  config: MemoryAsLayerConfig, *, embed_dim: int, max_length: int, dtype: Any
) -> base.Layer:
  """Makes Titans' MAL.

  Args:
    config: Memory and attention.
    embed_dim: Width e of inputs and outputs.
    max_length: See `attention.make_attention`.
    dtype: Type of the projections.

  Returns:
    A `Layer`; its state has one entry per part.
  """
  parts = _make_parts(config, embed_dim, max_length, dtype)
  table = {**_tables(parts), 'norm': norm.scale_param(embed_dim)}

  def apply(params, state, inputs, marks):
    run = _runner(parts, params, state, marks)
    remembered, memory_state = run('titans', inputs)
    normed = norm.rms_norm(params['norm'], remembered)
    out, attention_state = run('attention', normed)
    return out, {'titans': memory_state, 'attention': attention_state}

  return base.make_layer(table, _init_state(parts), apply)


def make_memory_as_gate(
  config: MemoryAsGateConfig, *, embed_dim: int, max_length: int, dtype: Any
) -> base.Layer:
  """Makes Titans' MAG; arguments and result are those of MAL.

  Args:
    config: Memory and attention.
    embed_dim: Width e of inputs and outputs.
    max_length: See `attention.make_attention`.
    dtype: Type of the projections.

  Returns:
    A `Layer`; its state has one entry per part.
  """
  parts = _make_parts(config, embed_dim, max_length, dtype)
  table = {
    **_tables(parts),
    'norm': {name: norm.scale_param(embed_dim) for name in parts},
  }

  def apply(params, state, inputs, marks):
    run = _runner(parts, params, state, marks)
    attended, attention_state = run('attention', inputs)
    remembered, memory_state = run('titans', inputs)
    normed = norm.rms_norm(params['norm']['attention'], attended)
    out = gate(params['norm']['titans'], normed, remembered)
    return out, {'titans': memory_state, 'attention': attention_state}

  return base.make_layer(table, _init_state(parts), apply)


def gate(scale: jax.Array, x: jax.Array, by: jax.Array) -> jax.Array:
  """x * silu(norm(by)), the gate of MAG and MAC.

  Args:
    scale: [e], of the norm.
    x: [b, t, e].
    by: [b, t, e].

  Returns:
    [b, t, e].
  """
  return x * jax.nn.silu(norm.rms_norm(scale, by))


def _make_parts(config, embed_dim, max_length, dtype):
  return {
    'titans': memory_mixer.make_memory_mixer(
      config.memory, embed_dim=embed_dim, dtype=dtype
    ),
    'attention': attention.make_attention(
      config.attention, embed_dim=embed_dim, max_length=max_length, dtype=dtype
    ),
  }


def _tables(parts):
  return {name: part.table for name, part in parts.items()}


def _init_state(parts):
  return lambda params, batch_size: {
    name: part.init_state(params[name], batch_size)
    for name, part in parts.items()
  }


def _runner(parts, params, state, marks):
  def run(name, inputs):
    start = None if state is None else state[name]
    return parts[name].apply(params[name], start, inputs, marks)

  return run
