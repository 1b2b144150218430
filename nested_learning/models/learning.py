"""Parts of a language model for levels that learn in a stream."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import levels
from nested_learning.layers import base
from nested_learning.layers import local_losses
from nested_learning.layers import norm
from nested_learning.models import heads
from nested_learning.models import trunk as trunk_lib


def make_split(
  config: trunk_lib.ModelConfig,
  head: heads.Head,
  trunk: base.Layer,
  num_below: int,
) -> levels.Split | None:
  """Splits a model's `forward` where the blocks that learn begin.

  Args:
    config: The model.
    head: Its head.
    trunk: Its trunk.
    num_below: Number of blocks below, or of groups.

  Returns:
    A `levels.Split` for parameters of `stacks.split_blocks`; None where no
    block is below, or the head is not that of a language model.
  """
  if not num_below or not isinstance(head, heads.LanguageHead):
    return None

  def below(params, state, tokens, *, reset=None):
    info = base.TokenInfo(reset, part=base.Part.BELOW)
    return heads.read_tokens(
      config, trunk, params, state, tokens, lambda x: info
    )

  def above(params, state, x, *, reset=None, mask=None, write=True):
    info = base.TokenInfo(reset, mask, write, part=base.Part.ABOVE)
    x, state = trunk.apply(params, state, x, info)
    return config.embedding.logits(heads.gather(config, params), x), state

  return levels.Split(num_below, config.max_length, below, above)


def make_local_sums(
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

    logits, both = heads.read_tokens(
      config, trunk, params, state, tokens, make_info
    )
    sums = levels.Sums(*({'blocks': x} for x in both.gradients))
    return logits, both.state, sums

  return local_sums
