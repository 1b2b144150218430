"""Inputs and outputs of models for tasks that do not predict the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.models import heads


@dataclasses.dataclass(frozen=True)
class RegressionHead:
  """Reads vectors [b, t, num_inputs] and predicts numbers [b, t, 1]."""

  num_inputs: int

  predicts_tokens = False

  def make(self, config, trunk):
    """See `heads.Head.make`."""
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
    """See `heads.Head.make`."""
    dtype = jnp.dtype(config.dtype)
    width = config.embed_dim
    table = {
      'embedding': heads.embedding_table(config)['embedding'],
      'hidden': _matrix(width, width),
      'read_out': _matrix(width, config.vocab_size),
      **trunk.table,
    }

    def forward(params, state, tokens, *, reset=None, mask=None, write=True):
      x = config.embedding.look_up(params, tokens, dtype)
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
