r"""A memory beside attention, whose output is zero until it is trained.

.. math:: y_t = A(x)_t + W_{out} (norm(M_t(q_t)) \odot silu(W_g x_t))

Attention and memory read the same normalised input, and their outputs are
added. :math:`W_{out}` of the memory starts at zero, so that a pretrained model
with such layers has, bit for bit, the logits that it had. Reads and gate are
alive, and so is the gradient of :math:`W_{out}`; after its first step,
projections, rates and the initial memory have one as well, through the writes.
With a gate of zero beside an output of zero no gradient would ever flow.

Titans' gate (`layers/hybrids.py`) multiplies attention by the memory, and has
no start that leaves attention as it was.
"""

import dataclasses
from typing import Any

from nested_learning import parameters
from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import memory_mixer
from nested_learning.layers import tnt

MemoryConfig = memory_mixer.MemoryMixerConfig | tnt.TntConfig


@dataclasses.dataclass(frozen=True)
class MemoryBesideConfig:
  """Attention, and a memory whose output is added to it."""

  memory: MemoryConfig
  attention: attention.AttentionConfig

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return self.attention.holds_any_length

  @property
  def granularity(self) -> int:
    """Tokens of a chunk; see `base.MixerConfig`."""
    return self.memory.granularity

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    sizes = {'embed_dim': embed_dim, 'dtype': dtype, 'max_length': max_length}
    return _make_memory_beside(
      self.attention.make(**sizes), self.memory.make(**sizes)
    )


def _make_memory_beside(attend: base.Layer, memory: base.Layer) -> base.Layer:
  parts = {'attention': attend, 'memory': memory}
  silent = dataclasses.replace(
    memory.table['out'], init=parameters.constant(0.0)
  )
  table = {
    'attention': attend.table,
    'memory': {**memory.table, 'out': silent},
  }

  def init_state(params, batch_size):
    return {
      name: part.init_state(params[name], batch_size)
      for name, part in parts.items()
    }

  def apply(params, state, inputs, info):
    outputs, states = {}, {}
    for name, part in parts.items():
      start = None if state is None else state[name]
      outputs[name], states[name] = part.apply(
        params[name], start, inputs, info
      )
    return outputs['attention'] + outputs['memory'], states

  return base.make_layer(table, init_state, apply)
