r"""The Continuum Memory System: a chain of MLPs that learn at different clocks.

.. math:: y = MLP^{(K)}( ... MLP^{(2)}( MLP^{(1)}(x)))

Each level is a pre-norm residual SwiGLU MLP, fastest first. A Transformer's MLP
is the chain of one level. On what clock a level's parameters change is not this
file's matter: see `nested_learning.levels.multi_timescale` for training.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 70-71, 73, 97.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import norm


@dataclasses.dataclass(frozen=True)
class LevelConfig:
  """One level of the chain."""

  name: str  # unique within a model; labels its parameters
  mlp_dim: int  # hidden width of its MLP
  chunk_size: int | None = None  # tokens between updates; None is every step

  def __post_init__(self):
    if self.mlp_dim < 1:
      raise ValueError(f'level {self.name!r}: {self.mlp_dim=} must be >= 1.')
    if self.chunk_size is not None and self.chunk_size < 1:
      raise ValueError(
        f'level {self.name!r}: {self.chunk_size=} must be >= 1, or None for an '
        'update at every step.'
      )


def table(levels: Sequence[LevelConfig], *, embed_dim: int) -> parameters.Table:
  """The parameters of a chain, one entry per level."""
  return {level.name: _level_table(level, embed_dim) for level in levels}


def apply(
  levels: Sequence[LevelConfig], params: Any, x: jax.Array
) -> jax.Array:
  """Passes x [b, t, e] through the chain, fastest level first.

  Args:
    levels: The chain.
    params: Parameters of `table`.
    x: [b, t, e], its dtype is that of the arithmetic.

  Returns:
    [b, t, e].
  """
  for level in levels:
    x = x + _mlp(params[level.name], x)
  return x


def _mlp(params: Any, x: jax.Array) -> jax.Array:
  weights = jax.tree.map(lambda w: w.astype(x.dtype), params)
  normed = norm.rms_norm(params['norm'], x)
  gate = jnp.einsum('bte,ef->btf', normed, weights['gate'])
  up = jnp.einsum('bte,ef->btf', normed, weights['up'])
  return jnp.einsum('btf,fe->bte', jax.nn.silu(gate) * up, weights['down'])


def _level_table(level: LevelConfig, embed_dim: int) -> parameters.Table:
  wide = lambda: parameters.Param(
    (embed_dim, level.mlp_dim), ('embed', 'mlp'), parameters.fan_in(embed_dim)
  )
  return {
    'norm': norm.scale_param(embed_dim),
    'gate': wide(),
    'up': wide(),
    'down': parameters.Param(
      (level.mlp_dim, embed_dim),
      ('mlp', 'embed'),
      parameters.fan_in(level.mlp_dim),
    ),
  }
