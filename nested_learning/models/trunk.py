"""The trunk of a model: blocks of a mixer and a chain of levels."""

from collections.abc import Sequence
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import cms
from nested_learning.layers import convolved
from nested_learning.layers import hybrids
from nested_learning.layers import local_losses
from nested_learning.layers import memory_beside
from nested_learning.layers import memory_mixer
from nested_learning.layers import norm as norm_lib
from nested_learning.layers import tnt
from nested_learning.models import embedding as embedding_lib
from nested_learning.models import placement as placement_lib
from nested_learning.models import stacks

MixerConfig = (
  attention.AttentionConfig
  | convolved.ConvolvedAttentionConfig
  | memory_mixer.MemoryMixerConfig
  | hybrids.MemoryAsLayerConfig
  | hybrids.MemoryAsGateConfig
  | hybrids.MemoryAsContextConfig
  | memory_beside.MemoryBesideConfig
  | tnt.TntConfig
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder of blocks: a mixer across tokens, then a chain of levels.

  All blocks have the same mixer, or repeat a tuple of mixers: with (memory,
  attention) every second block has attention.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  mixer: MixerConfig | tuple[MixerConfig, ...]  # or the pattern of the blocks
  levels: tuple[cms.LevelConfig, ...]  # chain of a block, fastest first
  max_length: int = 4096  # tokens of a call, and of full attention's state
  chain: cms.ChainConfig = cms.ChainConfig()  # how the levels are connected
  norm: norm_lib.NormConfig = norm_lib.NormConfig()  # of mixers and outputs
  embedding: embedding_lib.EmbeddingConfig = embedding_lib.EmbeddingConfig()
  # What some layers have and others do not, for pretrained models.
  placement: placement_lib.PlacementConfig = placement_lib.PlacementConfig()
  # Type of the projections and MLPs.
  dtype: Literal['float32', 'bfloat16', 'float64'] = 'float32'
  remat: Literal['none', 'layer'] = 'none'  # 'layer' recomputes each block

  def __post_init__(self):
    errors.check_choices(self)
    for name in ('vocab_size', 'num_layers', 'embed_dim', 'max_length'):
      errors.check_field(self, name, getattr(self, name) >= 1, 'at least 1')
    cms.check(self.levels, self.chain)
    length = max_stream_length(self)  # of blocks, which are checked with it
    if self.embedding.positions == 'learned' and length is None:
      raise errors.UserError(
        "embedding.positions='learned' needs attention with window=None, which "
        'counts the tokens of a document; set it to none.'
      )

  @property
  def blocks(self) -> tuple[placement_lib.Block, ...]:
    """Mixer and levels of the blocks that repeat; one if all are equal."""
    return placement_lib.find_blocks(
      self.placement, self.mixer, self.levels, self.num_layers
    )

  @property
  def pattern(self) -> tuple[MixerConfig, ...]:
    """The mixers that the blocks repeat; one if all blocks are equal."""
    return tuple(block.mixer for block in self.blocks)

  @property
  def is_grouped(self) -> bool:
    """Whether parameters of blocks are named by their place in a pattern."""
    return isinstance(self.mixer, tuple) or len(self.blocks) > 1


def make_trunk(config: ModelConfig) -> base.Layer:
  """Makes the trunk: all blocks and the final norm.

  Args:
    config: Sizes, mixer and levels; vocab_size is not used.

  Returns:
    A `Layer` [b, t, e] -> [b, t, e] with the parameters 'blocks' and 'norm'. It
    takes all parameters of a model, also those of `stacks.split_blocks`. With a
    local loss in the `TokenInfo`, its state is a
    `layers.local_losses.StateAndGradients`.
  """
  blocks = [_make_block(config, block) for block in config.blocks]
  group = _make_group(blocks) if config.is_grouped else blocks[0]
  num_groups = config.num_layers // len(config.pattern)
  table = {
    'blocks': parameters.stack(group.table, num_groups),
    'norm': config.norm.param(config.embed_dim),
  }

  def init_state(params, batch_size):
    return stacks.init_state(group, params['blocks'], batch_size)

  def apply(params, state, x, info):
    if x.shape[1] > config.max_length:
      raise errors.UserError(
        f'{x.shape[1]} tokens in a call, but model.max_length='
        f'{config.max_length}; raise it or feed the stream in pieces.'
      )
    x, state = stacks.apply(group, params['blocks'], state, x, info)
    if info.part is base.Part.BELOW:
      return x, state
    return config.norm.apply(params['norm'], x), state

  return base.Layer(table, init_state, apply)


def max_stream_length(config: ModelConfig) -> int | None:
  """Returns the most tokens of a stream, or None if there is no limit."""
  if all(mixer.holds_any_length for mixer in config.pattern):
    return None
  return config.max_length


def _make_block(config: ModelConfig, parts: placement_lib.Block) -> base.Layer:
  """Makes a block: a mixer and a chain, both residual."""
  mixer = parts.mixer.make(
    embed_dim=config.embed_dim,
    max_length=config.max_length,
    dtype=jnp.dtype(config.dtype),
  )
  table = {
    **config.norm.table(config.embed_dim),
    'mixer': mixer.table,
    'levels': cms.table(parts.levels, embed_dim=config.embed_dim),
    **cms.mix_table(parts.levels, config.chain),
  }

  init_state = lambda params, size: mixer.init_state(params['mixer'], size)

  def apply(params, state, x, info):
    def block(params, state, x):
      # Gathers the block's weights over 'fsdp'; rows stay where they are.
      params, x = sharding.gather(params, table), sharding.keep_rows(x)
      normed = config.norm.apply(params['norm'], x)
      with jax.named_scope('mixer'):  # in profiles
        mixed, state = mixer.apply(params['mixer'], state, normed, info)
      mixed = config.norm.apply_after(params, mixed)
      chain = {'chain': config.chain, 'mix': params.get('mix')}
      inputs = parts.levels, params['levels'], x + mixed
      if info.local_loss is None:
        return cms.apply(*inputs, **chain), state
      x, gradients = local_losses.apply_with_gradients(
        *inputs, info.local_loss, **chain
      )
      gradients = local_losses.Gradients(*({'levels': x} for x in gradients))
      return x, local_losses.StateAndGradients(state, gradients)

    if config.remat == 'layer':  # keeps only the block's input [b, t, e]
      block = jax.checkpoint(block)
    return block(params, state, x)

  return base.Layer(table, init_state, apply)


def _make_group(blocks: Sequence[base.Layer]) -> base.Layer:
  """Joins blocks into one layer; parameters are named by their index."""
  named = {str(i): block for i, block in enumerate(blocks)}

  def init_state(params, batch_size):
    return {
      name: block.init_state(params[name], batch_size)
      for name, block in named.items()
    }

  def apply(params, state, x, info):
    states = {}
    for name, block in named.items():
      start = None if state is None else state[name]
      x, states[name] = block.apply(params[name], start, x, info)
    if info.local_loss is not None:
      gradient, energy = (
        {name: both.gradients[i] for name, both in states.items()}
        for i in range(2)
      )
      states = local_losses.StateAndGradients(
        {name: both.state for name, both in states.items()},
        local_losses.Gradients(gradient, energy),
      )
    return x, states

  table = {name: block.table for name, block in named.items()}
  return base.Layer(table, init_state, apply)
