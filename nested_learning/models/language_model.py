"""The language model around any mixer: one forward for every use.

    logits, state = model.forward(params, state, tokens)

trains, evaluates and generates. Feeding a stream whole, in pieces cut anywhere
or token by token gives the same logits.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import attention
from nested_learning.layers import layer
from nested_learning.layers import norm
from nested_learning.layers import titans
from nested_learning.levels import cms


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder of equal blocks: a mixer across tokens, then the levels."""

  vocab_size: int
  num_layers: int
  embed_dim: int
  mixer: attention.AttentionConfig | titans.SelfModifyingTitansConfig
  levels: tuple[cms.LevelConfig, ...]  # the CMS chain, fastest first
  max_length: int = 4096  # tokens of a row in training and of attention's state
  dtype: str = 'float32'  # of projections and MLPs; or 'bfloat16'
  remat: str = 'none'  # 'layer' recomputes each block in the backward pass

  def __post_init__(self):
    names = [level.name for level in self.levels]
    if len(set(names)) != len(names) or 'base' in names:
      raise ValueError(
        f"level names {names} must be unique and not 'base', which labels the "
        'parameters outside the chain.'
      )
    if self.dtype not in ('float32', 'bfloat16', 'float64'):
      raise ValueError(
        f"model.dtype={self.dtype!r} must be 'float32' or 'bfloat16'."
      )
    if self.remat not in ('none', 'layer'):
      raise ValueError(f"model.remat={self.remat!r} must be 'none' or 'layer'.")


class Model(NamedTuple):
  """A model as pure functions.

  Attributes:
    config: What it was made from.
    table: Its parameters, see `nested_learning.parameters`.
    init_params: `init_params(key) -> params`.
    init_state: `init_state(params, batch_size) -> state` at a stream's start.
    forward: see `make_model`.
  """

  config: ModelConfig
  table: parameters.Table
  init_params: Callable[[jax.Array], Any]
  init_state: Callable[[Any, int], Any]
  forward: Callable[..., tuple[jax.Array, Any]]


def make_model(config: ModelConfig) -> Model:
  """Makes the model of a config.

  Its `forward(params, state, tokens, *, reset=None, mask=None, write=True)`
  takes tokens int [b, t] and a state (None for a stream's start) and returns
  logits [b, t, v] in float32 and the state after the tokens. `reset` bool
  [b, t] marks first tokens of documents, `mask` bool [b, t] is False for
  padding, `write=False` reads memories without writing them.

  Args:
    config: Sizes, mixer and levels.

  Returns:
    A `Model`.
  """
  dtype = jnp.dtype(config.dtype)
  trunk = make_trunk(config)
  table = {
    'embedding': parameters.Param(
      (config.vocab_size, config.embed_dim),
      ('vocab', 'embed'),
      parameters.fan_in(config.embed_dim),
    ),
    **trunk.table,
  }

  def forward(params, state, tokens, *, reset=None, mask=None, write=True):
    scale = config.embed_dim**0.5
    x = params['embedding'][tokens].astype(dtype) * scale
    marks = layer.Marks(reset, mask, write)
    x, state = trunk.apply(params, state, x, marks)
    logits = jnp.einsum(
      'bte,ve->btv',
      x,
      params['embedding'].astype(dtype),
      preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )
    return logits, state

  return Model(
    config=config,
    table=table,
    init_params=lambda key: parameters.init(key, table),
    init_state=trunk.init_state,
    forward=forward,
  )


def make_trunk(config: ModelConfig) -> layer.Layer:
  """Makes what is between embedding and logits, for inputs of any kind.

  Args:
    config: Sizes, mixer and levels; the trunk has no use for vocab_size.

  Returns:
    A `Layer` with the parameters 'blocks' and 'norm': x [b, t, e] through every
    block and the final norm. It may be given a model's parameters, among which
    it finds its own.
  """
  mixer = _make_mixer(config, jnp.dtype(config.dtype))
  block_table = {
    'norm': norm.scale_param(config.embed_dim),
    'mixer': mixer.table,
    'levels': cms.table(config.levels, embed_dim=config.embed_dim),
  }
  table = {
    'blocks': parameters.stack(block_table, config.num_layers),
    'norm': norm.scale_param(config.embed_dim),
  }

  def init_state(params, batch_size):
    return jax.vmap(lambda p: mixer.init_state(p, batch_size))(
      params['blocks']['mixer']
    )

  def apply(params, state, x, marks):
    if x.shape[1] > config.max_length:
      raise ValueError(
        f'{x.shape[1]} tokens in a call, but model.max_length='
        f'{config.max_length}; raise it or feed the stream in pieces.'
      )

    def block(x, layer_params_and_state):
      params, state = layer_params_and_state
      normed = norm.rms_norm(params['norm'], x)
      mixed, state = mixer.apply(params['mixer'], state, normed, marks)
      return cms.apply(config.levels, params['levels'], x + mixed), state

    if config.remat == 'layer':
      block = jax.checkpoint(block)
    x, state = jax.lax.scan(block, x, (params['blocks'], state))
    return norm.rms_norm(params['norm'], x), state

  return layer.Layer(table, init_state, apply)


def level_labels(config: ModelConfig) -> Any:
  """The level of each parameter: its name, or 'base' outside the chain.

  A level without a chunk size takes every step and is labelled 'base' as well.
  """
  labels = {
    level.name: 'base' if level.chunk_size is None else level.name
    for level in config.levels
  }

  def label(path, _):
    names = parameters.path_name(path).split('/')
    return labels[names[2]] if names[1:2] == ['levels'] else 'base'

  table = make_model(config).table
  return jax.tree_util.tree_map_with_path(
    label, table, is_leaf=lambda x: isinstance(x, parameters.Param)
  )


def _make_mixer(config: ModelConfig, dtype: Any) -> layer.Layer:
  match config.mixer:
    case attention.AttentionConfig():
      return attention.make_attention(
        config.mixer,
        embed_dim=config.embed_dim,
        max_length=config.max_length,
        dtype=dtype,
      )
    case titans.SelfModifyingTitansConfig():
      return titans.make_self_modifying_titans(
        config.mixer, embed_dim=config.embed_dim, dtype=dtype
      )
  raise ValueError(f'unknown mixer {config.mixer!r}.')
