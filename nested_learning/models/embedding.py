"""Embeddings: vectors of tokens and positions, and logits."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import parameters
from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import dot_product


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
  """How tokens become vectors, and the trunk's output logits."""

  scale: float | None = None  # of a token's vector; None is sqrt(embed_dim)
  head: Literal['tied', 'own'] = 'tied'  # matrix that logits are read with
  logit_cap: float | None = None  # bound of logits; None is no bound
  # 'learned' adds a vector per place in the document, up to max_length.
  positions: Literal['none', 'learned'] = 'none'

  def __post_init__(self):
    errors.check_choices(self)
    for name in ('scale', 'logit_cap'):
      value = getattr(self, name)
      fine = value is None or 0 < value < math.inf
      errors.check_field(self, name, fine, 'a finite number above 0, or None')

  def table(
    self, *, vocab_size: int, embed_dim: int, max_length: int
  ) -> parameters.Table:
    """Returns its parameters: [v, e], and [max_length, e] for positions."""
    embedding = parameters.Param(
      (vocab_size, embed_dim),
      ('vocab', 'embed'),
      parameters.fan_in(embed_dim),
      decay=False,
    )
    table = {'embedding': embedding}
    if self.head == 'own':
      table['head'] = embedding
    if self.positions == 'learned':
      table['positions'] = dataclasses.replace(
        embedding, shape=(max_length, embed_dim), axes=(None, 'embed')
      )
    return table

  def look_up(self, params: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
    """Returns the vectors [b, t, e] of tokens, without positions."""
    # NumPy parameters, as a checkpoint gives them, take no traced index.
    embedding = jnp.asarray(params['embedding'])
    vectors = embedding[tokens].astype(dtype)
    scale = embedding.shape[-1] ** 0.5 if self.scale is None else self.scale
    return vectors if scale == 1 else vectors * scale

  def add_positions(
    self, params: Any, x: jax.Array, state: Any, info: base.TokenInfo
  ) -> jax.Array:
    """Adds learned positions to x [b, t, e]; `state` is the trunk's."""
    if self.positions == 'none':
      return x
    place = attention.places(state, x.shape[:2], info)
    return x + jnp.asarray(params['positions'])[place].astype(x.dtype)

  def logits(self, params: Any, x: jax.Array) -> jax.Array:
    """Returns logits [b, t, v] of the trunk's output x [b, t, e]."""
    matrix = params['embedding' if self.head == 'tied' else 'head']
    # The loss sums exponentials: logits are float32 at least.
    logits = jnp.einsum(
      'bte,ve->btv',
      x,
      matrix.astype(x.dtype),
      preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return dot_product.cap(logits, self.logit_cap)
