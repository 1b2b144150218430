"""The zoo: every family of model at every named size.

    config = zoo.make_config('hope_170m')

Widths, depths and heads of 170M to 760M are those of Miras, arXiv:2504.13173,
and of 1.3B those of Atlas, arXiv:2505.23735, whose tables Nested Learning
follows where it says nothing. No paper gives the width of the MLPs: here it is
what makes Hope as large as its name; the other families get the same blocks and
the same levels around another mixer.
"""

import dataclasses
import difflib

from nested_learning.layers import attention
from nested_learning.layers import titans
from nested_learning.levels import cms
from nested_learning.models import language_model

FAMILIES = ('hope', 'hope_attention', 'transformer')


@dataclasses.dataclass(frozen=True)
class Size:
  """Width and depth of a model, whatever its mixer."""

  num_layers: int
  embed_dim: int  # the heads together are as wide
  num_heads: int
  mlp_dim: int  # of all levels of a block together
  vocab_size: int = 32_000
  max_length: int = 4096  # tokens


SIZES = {
  'tiny': Size(2, 32, 2, 48, vocab_size=257, max_length=256),
  'small': Size(3, 128, 4, 384, vocab_size=257, max_length=1024),
  '170m': Size(12, 768, 16, 3840),
  '340m': Size(24, 1024, 16, 2304),
  '760m': Size(24, 1536, 16, 3600),
  '1p3b': Size(18, 2048, 8, 7104),
}

# Tokens between updates of the three levels of a CMS, fastest first, at half a
# million tokens per step; the fastest level takes every step.
_PERIODS = (('fast', None), ('middle', 2**21), ('slow', 2**23))


def names() -> list[str]:
  """Every name that `make_config` knows."""
  return [f'{family}_{size}' for family in FAMILIES for size in SIZES]


def make_config(name: str, **changes) -> language_model.ModelConfig:
  """The config of a named model.

  Args:
    name: Family and size, for instance 'hope_170m' or 'transformer_tiny'.
    **changes: Fields of the config to set otherwise, for instance
      dtype='bfloat16'.

  Returns:
    A `ModelConfig`. Hope and Hope-Attention have three levels, Transformer++
    one MLP as wide as these together.

  Raises:
    ValueError: The zoo has no such model.
  """
  if name not in names():
    nearest = difflib.get_close_matches(name, names(), n=3, cutoff=0)
    raise ValueError(
      f'no model {name!r} in the zoo; the nearest are {", ".join(nearest)}.'
    )
  family, size_name = name.rsplit('_', 1)
  size = SIZES[size_name]
  head_dim = size.embed_dim // size.num_heads
  if family == 'hope':
    mixer = titans.SelfModifyingTitansConfig(size.num_heads, head_dim)
  else:
    num_kv_heads = max(size.num_heads // 4, 1)
    mixer = attention.AttentionConfig(size.num_heads, num_kv_heads, head_dim)
  if family == 'transformer':
    levels = (cms.LevelConfig('mlp', size.mlp_dim),)
  else:
    levels = tuple(
      cms.LevelConfig(level, size.mlp_dim // len(_PERIODS), period)
      for level, period in _PERIODS
    )
  config = language_model.ModelConfig(
    vocab_size=size.vocab_size,
    num_layers=size.num_layers,
    embed_dim=size.embed_dim,
    mixer=mixer,
    levels=levels,
    max_length=size.max_length,
  )
  return dataclasses.replace(config, **changes)
