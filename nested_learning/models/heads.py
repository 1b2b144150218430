"""Inputs and outputs of a model, around its trunk."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning import sharding
from nested_learning.layers import base
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
      return read_tokens(config, trunk, params, state, tokens, lambda x: info)

    return table, forward


def embedding_table(config: trunk_lib.ModelConfig) -> parameters.Table:
  """Returns the parameters of a model's embedding."""
  return config.embedding.table(
    vocab_size=config.vocab_size,
    embed_dim=config.embed_dim,
    max_length=config.max_length,
  )


def read_tokens(
  config: trunk_lib.ModelConfig,
  trunk: base.Layer,
  params: Any,
  state: Any,
  tokens: jax.Array,
  make_info: Callable[[jax.Array], base.TokenInfo],
) -> tuple[jax.Array, Any]:
  """Returns logits [b, t, v], or x below, and the state.

  Args:
    config: The model.
    trunk: Its trunk.
    params: Parameters of the model.
    state: State of the trunk.
    tokens: int [b, t].
    make_info: Returns a `base.TokenInfo` from the tokens' embeddings.
  """
  own, embedding = gather(config, params), config.embedding
  x = embedding.look_up(own, tokens, jnp.dtype(config.dtype))
  info = make_info(x)
  x = embedding.add_positions(own, x, state, info)
  x, state = trunk.apply(params, state, x, info)
  return x if info.part is base.Part.BELOW else embedding.logits(own, x), state


def gather(config: trunk_lib.ModelConfig, params: Any) -> Any:
  """Returns the parameters of the embedding, whole along 'fsdp'."""
  table = embedding_table(config)
  return sharding.gather({name: params[name] for name in table}, table)
