"""Models around the trunk whose inputs or outputs are no tokens.

Each is a `Model`: its `forward` takes and gives what `make_model`'s does, but
for the inputs or outputs that its docstring names.
"""

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.models import language_model


def make_regressor(
  config: language_model.ModelConfig, num_inputs: int
) -> language_model.Model:
  """Makes a model of numbers: inputs [b, t, x] in, [b, t, 1] out.

  Args:
    config: Its trunk.
    num_inputs: Numbers of an input, x.

  Returns:
    A `Model`.
  """
  dtype = jnp.dtype(config.dtype)
  trunk = language_model.make_trunk(config)
  table = {
    'read_in': parameters.Param(
      (num_inputs, config.embed_dim),
      (None, 'embed'),
      parameters.fan_in(num_inputs),
      decay=True,
    ),
    'read_out': _matrix(config.embed_dim, 1),
    **trunk.table,
  }

  def forward(params, state, inputs, *, reset=None, mask=None, write=True):
    x = jnp.einsum(
      'btx,xe->bte', inputs.astype(dtype), params['read_in'].astype(dtype)
    )
    x, state = trunk.apply(params, state, x, base.TokenInfo(reset, mask, write))
    return jnp.einsum('bte,ey->bty', x, params['read_out'].astype(dtype)), state

  return _make(config, table, trunk, forward)


def make_compressor(
  config: language_model.ModelConfig,
) -> language_model.Model:
  """Makes a model that says a row from its output at the last token alone.

  That output and the sine and cosine code of a position go through an MLP of
  two layers, whose output is the logits of the token at that position.

  Args:
    config: Its trunk and vocabulary.

  Returns:
    A `Model` whose calls are whole rows.

  References:
    Poli et al., arXiv:2403.17844, 2024, appendix B (the decoder of the
      compression task).
  """
  dtype = jnp.dtype(config.dtype)
  width = config.embed_dim
  trunk = language_model.make_trunk(config)
  table = {
    'embedding': parameters.Param(
      (config.vocab_size, width),
      ('vocab', 'embed'),
      parameters.fan_in(width),
      decay=False,
    ),
    'hidden': _matrix(width, width),
    'read_out': _matrix(width, config.vocab_size),
    **trunk.table,
  }

  def forward(params, state, tokens, *, reset=None, mask=None, write=True):
    x = params['embedding'][tokens].astype(dtype) * width**0.5
    x, state = trunk.apply(params, state, x, base.TokenInfo(reset, mask, write))
    code = _position_code(tokens.shape[1], width).astype(dtype)
    x = x[:, -1:] + code
    x = jnp.einsum('bte,ef->btf', x, params['hidden'].astype(dtype))
    x = jnp.einsum(
      'btf,fv->btv', jax.nn.gelu(x), params['read_out'].astype(dtype)
    )
    return x.astype(jnp.promote_types(dtype, jnp.float32)), state

  return _make(config, table, trunk, forward)


def _matrix(num_inputs: int, num_outputs: int) -> parameters.Param:
  return parameters.Param(
    (num_inputs, num_outputs),
    ('embed', None),
    parameters.fan_in(num_inputs),
    decay=True,
  )


def _position_code(num_positions: int, width: int) -> jax.Array:
  """Sines and cosines of wavelengths from 2 pi to 20,000 pi, [t, e]."""
  half = (width + 1) // 2
  frequency = 10_000.0 ** (-jnp.arange(half) / half)
  angle = jnp.arange(num_positions)[:, None] * frequency
  code = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
  return code[:, :width]


def _make(config, table, trunk, forward) -> language_model.Model:
  return language_model.Model(
    config=config,
    table=table,
    init_params=lambda key: parameters.init(key, table),
    init_state=trunk.init_state,
    forward=forward,
  )
