"""Inputs and outputs of a model, around its trunk."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from nested_learning import levels
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.layers import base
from nested_learning.layers import local_losses
from nested_learning.layers import norm
from nested_learning.models import trunk as trunk_lib


class Head(Protocol):
  """Inputs and outputs of a model.

  Attributes:
    predicts_tokens: Whether outputs are logits [b, t, v] of the next token.
  """

  predicts_tokens: ClassVar[bool]

  def make(
    self, config: trunk_lib.ModelConfig, trunk: base.Layer
  ) -> tuple[parameters.Table, Callable[..., tuple[jax.Array, Any]]]:
    """Makes the model's table of parameters and its `forward`.

    Args:
      config: The model.
      trunk: Its trunk, whose parameters are part of the table.

    Returns:
      The table, and `forward(params, state, inputs, *, reset=None, mask=None,
      write=True)`, see `models.make_model`.
    """


@dataclasses.dataclass(frozen=True)
class LanguageHead:
  """Reads tokens and predicts the next one, see `EmbeddingConfig`."""

  predicts_tokens = True

  def make(self, config, trunk):
    """See `Head.make`."""
    table = {**embedding_table(config), **trunk.table}

    def forward(params, state, tokens, *, reset=None, mask=None, write=True):
      info = base.TokenInfo(reset, mask, write)
      return _read_tokens(config, trunk, params, state, tokens, lambda x: info)

    return table, forward

  def make_split(
    self, config: trunk_lib.ModelConfig, trunk: base.Layer, num_below: int
  ) -> levels.Split:
    """Splits `forward` where the blocks that learn begin.

    Args:
      config: The model.
      trunk: Its trunk.
      num_below: Number of blocks below, or of groups; at least 1.

    Returns:
      A `levels.Split` for parameters of `stacks.split_blocks`.
    """

    def below(params, state, tokens, *, reset=None):
      info = base.TokenInfo(reset, part='below')
      return _read_tokens(config, trunk, params, state, tokens, lambda x: info)

    def above(params, state, x, *, reset=None, mask=None, write=True):
      info = base.TokenInfo(reset, mask, write, part='above')
      x, state = trunk.apply(params, state, x, info)
      return config.embedding.logits(_gather(config, params), x), state

    return levels.Split(num_below, config.max_length, below, above)

  def make_local_sums(
    self,
    config: trunk_lib.ModelConfig,
    trunk: base.Layer,
    local_levels: Mapping[str, local_losses.LocalLevel],
  ) -> Callable[..., tuple[jax.Array, Any, levels.Sums]]:
    """Makes the sums of local gradients of levels.

    The target of a level's output is the embedding of the next token, as the
    trunk would read it, scaled to entries of size 1.

    Args:
      config: The model.
      trunk: Its trunk.
      local_levels: Levels that learn by a local objective, by name.

    Returns:
      `local_sums`, see `levels.ReaderSpec`, for parameters of
      `stacks.split_blocks`.
    """

    def local_sums(params, state, tokens, counts, *, reset=None):
      def make_info(x):
        # The last token has no target here; its count is 0.
        target = norm.rms_norm(1.0, jnp.roll(x, -1, axis=1))
        local_loss = local_losses.LocalLoss(local_levels, target, counts)
        return base.TokenInfo(reset, local_loss=local_loss)

      logits, both = _read_tokens(
        config, trunk, params, state, tokens, make_info
      )
      sums = levels.Sums(*({'blocks': x} for x in both.gradients))
      return logits, both.state, sums

    return local_sums


def embedding_table(config: trunk_lib.ModelConfig) -> parameters.Table:
  """Returns the parameters of a model's embedding."""
  return config.embedding.table(
    vocab_size=config.vocab_size,
    embed_dim=config.embed_dim,
    max_length=config.max_length,
  )


def _read_tokens(config, trunk, params, state, tokens, make_info):
  """Returns logits [b, t, v], or x below, and the state."""
  own, embedding = _gather(config, params), config.embedding
  x = embedding.look_up(own, tokens, jnp.dtype(config.dtype))
  info = make_info(x)
  x = embedding.add_positions(own, x, state, info)
  x, state = trunk.apply(params, state, x, info)
  return x if info.part == 'below' else embedding.logits(own, x), state


def _gather(config, params):
  """Returns the parameters of the embedding, whole along 'fsdp'."""
  table = embedding_table(config)
  return sharding.gather({name: params[name] for name in table}, table)
