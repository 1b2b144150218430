"""The memories of a mixer that make the tokens of another: k, v, q and rates.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 79-85.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from nested_learning import memory
from nested_learning.layers import memory_rates
from nested_learning.layers import norm

# 'k' beside the scalars, which read as it does.
_STACKED = ('v', 'q', 'k')


def sizes(adaptive: tuple[str, ...]) -> dict[str, dict[str, int]]:
  """How many roles the network of 'main' has, and that of the 'others'.

  Args:
    adaptive: The roles that are memories.

  Returns:
    Arguments of `MemoryMixerConfig.network`, by name of the network.
  """
  sizes = {'main': {'num_vectors': 1, 'num_scalars': 0}}
  if adaptive:
    sizes['others'] = {
      'num_vectors': len(set(_STACKED) & set(adaptive)),
      'num_scalars': len(set(memory_rates.ROLES) & set(adaptive)),
    }
  return sizes


def to_feed(
  made: Mapping[str, jax.Array], raw: dict[str, jax.Array]
) -> memory.Feed:
  """A feed of k, v and q without rates, whose raw numbers are its `extra`."""
  return memory.Feed(
    key=made['k'],
    value=made['v'],
    query=made['q'],
    inner_lr=None,
    retention=None,
    extra=raw,
  )


def make_project(
  config: Any, network: memory.Network, bias: dict[str, jax.Array]
) -> Callable[[Any, Any], memory.Feed]:
  """How the memories of the other roles make a feed, read from their anchor.

  Args:
    config: A `MemoryMixerConfig`.
    network: Of the memories.
    bias: Of their rates, see `memory_rates.table`.

  Returns:
    `project(weights, (made, raw))`, from what the projections give for k, v and
    q, and for the rates that are no memory.
  """
  vectors = [role for role in _STACKED if role in config.adaptive]
  scalars = [role for role in memory_rates.ROLES if role in config.adaptive]

  def project(weights, inputs):
    made, raw = dict(inputs[0]), dict(inputs[1])
    for role in dict.fromkeys([*vectors, 'k'] if scalars else vectors):
      i = vectors.index(role) if role in vectors else 0
      outputs = network.read(
        weights,
        made[role],
        (i, i + (role in vectors)),
        (0, len(scalars) if role == 'k' else 0),
      )
      if role in vectors:
        made[role] = outputs.vectors[:, :, 0]
      for j, scalar in enumerate(scalars if role == 'k' else ()):
        raw[scalar] = outputs.scalars[:, :, j]
    for role in vectors:
      made[role] = norm.l2_normalize(made[role])
    return memory_rates.set_rates(config, bias, to_feed(made, raw))

  return project
