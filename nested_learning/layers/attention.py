"""Softmax attention with rotary positions; its keys and values are its state.

References:
  Su et al., RoFormer, arXiv:2104.09864, 2021, eq. 34 (rotary positions).
  Ainslie et al., GQA, arXiv:2305.13245, 2023 (grouped keys and values).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import layer


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Causal softmax attention."""

  num_heads: int  # query heads
  num_kv_heads: int  # heads of keys and values; divides num_heads
  head_dim: int  # even, for the rotary pairs
  rope_theta: float = 10_000.0  # longest rotary wavelength / 2 pi, in tokens

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'{self.num_heads=} is not a multiple of {self.num_kv_heads=}.'
      )
    if self.head_dim % 2:
      raise ValueError(f'{self.head_dim=} must be even for rotary positions.')


class AttentionState(NamedTuple):
  """What attention carries; s is the longest stream that the model allows.

  Attributes:
    key: [b, s, kv heads, d], rotated.
    value: [b, s, kv heads, d].
    document: int32 [b, s], which document a slot belongs to; -1 is empty.
    position: int32 [b], tokens read so far.
    current: int32 [b], the document that is being read.
  """

  key: jax.Array
  value: jax.Array
  document: jax.Array
  position: jax.Array
  current: jax.Array


def make_attention(
  config: AttentionConfig, *, embed_dim: int, max_length: int, dtype: Any
) -> layer.Layer:
  """Makes the attention layer.

  Args:
    config: Its settings.
    embed_dim: Width e of inputs and outputs.
    max_length: Tokens that a stream may have; the size of the state.
    dtype: Type of the arithmetic; softmax is in float32.

  Returns:
    A `Layer`.
  """
  c = config
  table = {
    'query': _projection(embed_dim, c.num_heads, c.head_dim),
    'key': _projection(embed_dim, c.num_kv_heads, c.head_dim),
    'value': _projection(embed_dim, c.num_kv_heads, c.head_dim),
    'out': parameters.Param(
      (c.num_heads, c.head_dim, embed_dim),
      ('heads', None, 'embed'),
      parameters.fan_in(c.num_heads * c.head_dim),
    ),
  }

  def init_state(params, batch_size):
    del params
    shape = (batch_size, max_length, c.num_kv_heads, c.head_dim)
    return AttentionState(
      key=jnp.zeros(shape, dtype),
      value=jnp.zeros(shape, dtype),
      document=jnp.full((batch_size, max_length), -1, jnp.int32),
      position=jnp.zeros((batch_size,), jnp.int32),
      current=jnp.zeros((batch_size,), jnp.int32),
    )

  def apply(params, state, inputs, marks):
    batch_size, num_tokens = inputs.shape[:2]
    start = init_state(params, batch_size) if state is None else state
    read = (
      jnp.ones(inputs.shape[:2], bool) if marks.mask is None else marks.mask
    )
    position = start.position[:, None] + jnp.cumsum(read, axis=1) - 1
    document = jnp.broadcast_to(start.current[:, None], position.shape)
    if marks.reset is not None:
      document = document + jnp.cumsum(marks.reset & read, axis=1)

    project = lambda w: jnp.einsum('bte,ehd->bthd', inputs, w.astype(dtype))
    query = rotate(project(params['query']), position, c.rope_theta)
    key = rotate(project(params['key']), position, c.rope_theta)
    value = project(params['value'])

    rows = jnp.arange(batch_size)[:, None]
    slots = jnp.where(read, position, max_length)  # padding falls off the end
    put = lambda into, x: into.at[rows, slots].set(x, mode='drop')
    state_out = AttentionState(
      key=put(start.key, key),
      value=put(start.value, value),
      document=put(start.document, document),
      position=start.position + jnp.sum(read, axis=1),
      current=document[:, -1],
    )
    if state is None:  # nothing before these tokens: attend among them alone
      visible = (position[:, :, None] >= position[:, None, :]) & (
        document[:, :, None] == document[:, None, :]
      )
      visible &= read[:, None, :]
      causal = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
      keys, values, visible = key, value, visible & causal
    else:
      slot_position = jnp.arange(max_length)[None, None, :]
      visible = (slot_position <= position[:, :, None]) & (
        document[:, :, None] == state_out.document[:, None, :]
      )
      keys, values = state_out.key, state_out.value
    outputs = jax.nn.dot_product_attention(
      query, keys, values, mask=visible[:, None]
    )
    out = jnp.einsum('bthd,hde->bte', outputs, params['out'].astype(dtype))
    return out, state_out

  return layer.Layer(table, init_state, apply)


def rotate(x: jax.Array, position: jax.Array, theta: float) -> jax.Array:
  """Rotary position embedding.

  Args:
    x: [b, t, h, d]; the first and second half of d are the pairs.
    position: int [b, t].
    theta: Base of the wavelengths.

  Returns:
    An array like x.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half) / half)
  angle = position[..., None, None] * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = x[..., :half], x[..., half:]
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _projection(embed_dim: int, num_heads: int, head_dim: int):
  return parameters.Param(
    (embed_dim, num_heads, head_dim),
    ('embed', 'heads', None),
    parameters.fan_in(embed_dim),
  )
