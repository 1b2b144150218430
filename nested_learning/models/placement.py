"""Layers of a model that differ: memories beside attention, levels by layer."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

from nested_learning import errors
from nested_learning.layers import attention
from nested_learning.layers import cms
from nested_learning.layers import memory_beside


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
  """Memories and levels of single layers; by default, all layers are alike.

  `add_memory` and `stack_levels` set it for pretrained models.
  """

  # A memory beside the attention of `memory_layers`, or None.
  memory: memory_beside.MemoryConfig | None = None
  memory_layers: tuple[int, ...] = ()  # numbers of layers, from 0
  # Levels of a layer: 'all' is the whole chain; 'cycle' is one of K, layer j
  # has level j mod K; 'last_quarter' is the first of two levels in the last
  # quarter, and the second below it. A tuple has the names of the levels of
  # each layer, and repeats.
  levels: (
    Literal['all', 'cycle', 'last_quarter'] | tuple[tuple[str, ...], ...]
  ) = 'all'

  def __post_init__(self):
    fine = (self.memory is None) == (not self.memory_layers)
    errors.check_field(
      self, 'memory_layers', fine, 'some layers with a memory, or () without'
    )
    words = 'all', 'cycle', 'last_quarter'
    fine = self.levels in words or (
      isinstance(self.levels, tuple) and self.levels and all(self.levels)
    )
    errors.check_field(
      self, 'levels', fine, f'{", ".join(words)}, or names for each layer'
    )


class Block(NamedTuple):
  """The mixer and the levels of a block.

  Attributes:
    mixer: A config of a mixer.
    levels: The chain, fastest first.
  """

  mixer: Any
  levels: tuple[cms.LevelConfig, ...]


@functools.lru_cache(maxsize=64)
def find_blocks(
  placement: PlacementConfig,
  mixer: Any,
  levels: tuple[cms.LevelConfig, ...],
  num_layers: int,
) -> tuple[Block, ...]:
  """Finds the shortest pattern of blocks that all layers repeat.

  Args:
    placement: What some layers have.
    mixer: Mixer of all layers, or a tuple of those that they repeat.
    levels: All levels of the model, fastest first.
    num_layers: Number of layers, a multiple of the number of mixers.

  Returns:
    The blocks; their number divides that of layers, and is a multiple of that
    of the mixers.

  Raises:
    errors.UserError: The mixers are none or do not repeat, a layer or a level
      does not exist, a level is in no layer, or a memory is beside another
      mixer than attention.
  """
  mixers = mixer if isinstance(mixer, tuple) else (mixer,)
  if not mixers:
    raise errors.UserError('mixer=() has no mixer; name at least one.')
  if num_layers % len(mixers):
    raise errors.UserError(
      f'num_layers={num_layers} is not a multiple of the {len(mixers)} mixers '
      'of the pattern; repeat all of it.'
    )
  if placement == PlacementConfig():
    return tuple(Block(one, levels) for one in mixers)
  layers = [
    Block(_mixer(placement, mixers[i % len(mixers)], i), own)
    for i, own in enumerate(_levels(placement, levels, num_layers))
  ]
  beyond = [i for i in placement.memory_layers if not 0 <= i < num_layers]
  if beyond:
    raise errors.UserError(
      f'placement.memory_layers={placement.memory_layers} names layer '
      f'{beyond[0]}, and the model has layers 0 to {num_layers - 1}.'
    )
  for period in range(len(mixers), num_layers, len(mixers)):
    if layers[:period] * (num_layers // period) == layers:
      return tuple(layers[:period])
  return tuple(layers)


def _mixer(placement: PlacementConfig, mixer: Any, layer: int) -> Any:
  if layer not in placement.memory_layers:
    return mixer
  if not isinstance(mixer, attention.AttentionConfig):
    raise errors.UserError(
      f'placement.memory_layers has layer {layer}, whose mixer is '
      f'{type(mixer).__name__}; a memory stands beside AttentionConfig alone.'
    )
  return memory_beside.MemoryBesideConfig(placement.memory, mixer)


def _levels(
  placement: PlacementConfig,
  levels: tuple[cms.LevelConfig, ...],
  num_layers: int,
) -> list[tuple[cms.LevelConfig, ...]]:
  """Returns the levels of every layer."""
  names = [level.name for level in levels]
  table = placement.levels
  if table == 'all':
    return [levels] * num_layers
  if table == 'cycle':
    table = tuple((name,) for name in names)
  elif table == 'last_quarter':
    if len(names) != 2:
      raise errors.UserError(
        f"placement.levels='last_quarter' is for two levels, and the model has "
        f'{", ".join(names)}; name the levels of each layer instead.'
      )
    num_fast = -(-num_layers // 4)
    slow = ((names[1],),) * (num_layers - num_fast)
    table = (*slow, *((names[0],),) * num_fast)
  used = {name for entry in table[:num_layers] for name in entry}
  if used != set(names):
    wrong = sorted(used ^ set(names))[0]
    raise errors.UserError(
      f'placement.levels and model.levels ({", ".join(names)}) must name the '
      f'same levels, and {wrong!r} is in one of them alone.'
    )
  chains = [tuple(x for x in levels if x.name in entry) for entry in table]
  return [chains[i % len(chains)] for i in range(num_layers)]
