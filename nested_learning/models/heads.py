"""Inputs and outputs of a model, around its trunk."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning import sharding
from nested_learning.layers import base
from nested_learning.layers import cms
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
  """Reads tokens and predicts the next one, by one tied embedding."""

  predicts_tokens = True

  def make(self, config, trunk):
    """See `Head.make`."""
    table = {'embedding': _embedding(config), **trunk.table}

    def forward(params, state, tokens, *, reset=None, mask=None, write=True):
      info = base.TokenInfo(reset, mask, write)
      return _read_tokens(config, trunk, params, state, tokens, lambda x: info)

    return table, forward

  def make_local_gradients(
    self,
    config: trunk_lib.ModelConfig,
    trunk: base.Layer,
    objective: str,
    names: tuple[str, ...],
  ) -> Callable[..., tuple[jax.Array, Any, Any]]:
    """Makes the gradients of a local objective of levels.

    The target of a level's output is the embedding of the next token, as the
    trunk would read it, scaled to entries of size 1.

    Args:
      config: The model.
      trunk: Its trunk.
      objective: 'l2' or 'dot', see `layers.cms.apply_with_gradients`.
      names: Levels that learn.

    Returns:
      `local_gradients`, see `levels.ReaderSpec`, for parameters of
      `stacks.split_blocks`.
    """

    def local_gradients(params, state, tokens, counts, *, reset=None):
      def make_info(x):
        # The last token has no target here; its count is 0.
        target = norm.rms_norm(1.0, jnp.roll(x, -1, axis=1))
        local_loss = cms.LocalLoss(objective, names, target, counts)
        return base.TokenInfo(reset, local_loss=local_loss)

      logits, both = _read_tokens(
        config, trunk, params, state, tokens, make_info
      )
      return logits, both.state, {'blocks': both.gradients}

    return local_gradients


@dataclasses.dataclass(frozen=True)
class RegressionHead:
  """Reads vectors [b, t, num_inputs] and predicts numbers [b, t, 1]."""

  num_inputs: int

  predicts_tokens = False

  def make(self, config, trunk):
    """See `Head.make`."""
    dtype = jnp.dtype(config.dtype)
    table = {
      'read_in': parameters.Param(
        (self.num_inputs, config.embed_dim),
        (None, 'embed'),
        parameters.fan_in(self.num_inputs),
        decay=True,
      ),
      'read_out': _matrix(config.embed_dim, 1),
      **trunk.table,
    }

    def forward(params, state, inputs, *, reset=None, mask=None, write=True):
      x = jnp.einsum(
        'btx,xe->bte', inputs.astype(dtype), params['read_in'].astype(dtype)
      )
      x, state = trunk.apply(
        params, state, x, base.TokenInfo(reset, mask, write)
      )
      y = jnp.einsum('bte,ey->bty', x, params['read_out'].astype(dtype))
      return y, state

    return table, forward


@dataclasses.dataclass(frozen=True)
class CompressionHead:
  """Predicts all tokens of a row from the trunk's output at its last token.

  That output plus a sinusoidal code of each position passes through an MLP of
  two layers, whose output is the logits of the token at the position. Every
  call is one whole row.

  References:
    Poli et al., arXiv:2403.17844, 2024, appendix B (the decoder of the
      compression task).
  """

  predicts_tokens = False

  def make(self, config, trunk):
    """See `Head.make`."""
    dtype = jnp.dtype(config.dtype)
    width = config.embed_dim
    table = {
      'embedding': _embedding(config),
      'hidden': _matrix(width, width),
      'read_out': _matrix(width, config.vocab_size),
      **trunk.table,
    }

    def forward(params, state, tokens, *, reset=None, mask=None, write=True):
      x = _look_up(params['embedding'], tokens, dtype)
      x, state = trunk.apply(
        params, state, x, base.TokenInfo(reset, mask, write)
      )
      code = _position_code(tokens.shape[1], width).astype(dtype)
      x = x[:, -1:] + code  # [b, t, e]
      x = jnp.einsum('bte,ef->btf', x, params['hidden'].astype(dtype))
      x = jnp.einsum(
        'btf,fv->btv', jax.nn.gelu(x), params['read_out'].astype(dtype)
      )
      # The loss sums exponentials: logits are float32 at least.
      return x.astype(jnp.promote_types(dtype, jnp.float32)), state

    return table, forward


def _embedding(config):
  return parameters.Param(
    (config.vocab_size, config.embed_dim),
    ('vocab', 'embed'),
    parameters.fan_in(config.embed_dim),
    decay=False,
  )


def _look_up(embedding, tokens, dtype):
  """Returns the vectors [b, t, e] of tokens, with entries of size one."""
  # NumPy parameters, as a checkpoint gives them, take no traced index.
  vectors = jnp.asarray(embedding)[tokens].astype(dtype)
  return vectors * embedding.shape[-1] ** 0.5


def _read_tokens(config, trunk, params, state, tokens, make_info):
  """Returns logits [b, t, v] and the state; `make_info(x)` is `TokenInfo`."""
  dtype = jnp.dtype(config.dtype)
  embedding = sharding.gather(params['embedding'], _embedding(config))
  x = _look_up(embedding, tokens, dtype)
  x, state = trunk.apply(params, state, x, make_info(x))
  # The loss sums exponentials: logits are float32 at least.
  logits = jnp.einsum(
    'bte,ve->btv',
    x,
    embedding.astype(dtype),
    preferred_element_type=jnp.promote_types(dtype, jnp.float32),
  )
  return logits, state


def _matrix(num_inputs: int, num_outputs: int) -> parameters.Param:
  return parameters.Param(
    (num_inputs, num_outputs),
    ('embed', None),
    parameters.fan_in(num_inputs),
    decay=True,
  )


def _position_code(num_positions: int, width: int) -> jax.Array:
  """Returns sines and cosines of wavelengths 2 pi to 20,000 pi, [t, e]."""
  half = (width + 1) // 2
  frequency = 10_000.0 ** (-jnp.arange(half) / half)
  angle = jnp.arange(num_positions)[:, None] * frequency
  code = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
  return code[:, :width]
