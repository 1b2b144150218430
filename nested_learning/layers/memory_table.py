"""The parameters of a layer around memories."""

from collections.abc import Mapping, Sequence
from typing import Any

from nested_learning import parameters
from nested_learning.layers import memory_features
from nested_learning.layers import memory_out


def make(
  config: Any,
  embed_dim: int,
  memories: Mapping[str, parameters.Table],
  bias: Mapping[str, parameters.Table],
  rates: Sequence[str],
) -> dict[str, Any]:
  """The layer's parameters.

  Args:
    config: A `MemoryMixerConfig`.
    embed_dim: Width e of inputs and outputs.
    memories: Initial memories by name, parameters where they are learned.
    bias: Of the rates of each memory, see `memory_rates.table`.
    rates: Those that are projected from the layer's input.

  Returns:
    A table.
  """
  heads, dim = config.num_heads, config.head_dim
  table = {
    **memory_features.table(
      num_heads=heads,
      head_dim=dim,
      embed_dim=embed_dim,
      features=config.features,
    ),
    'bias': dict(bias),
    **memory_out.table(num_heads=heads, head_dim=dim, embed_dim=embed_dim),
  }
  if config.initial == 'learned':
    table['memory'] = dict(memories)
  if config.output == 'norm':
    per_head = lambda value: parameters.Param(
      (heads, dim), ('heads', None), parameters.constant(value), decay=False
    )
    table['output_norm'] = {
      name: {'scale': per_head(1.0), 'bias': per_head(0.0)} for name in memories
    }
  if rates:
    table['rates'] = parameters.Param(
      (embed_dim, len(rates), heads),
      ('embed', None, 'heads'),
      parameters.fan_in(embed_dim, 0.1),
      decay=True,
    )
  return table
