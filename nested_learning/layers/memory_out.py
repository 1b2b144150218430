"""From what a memory's heads read to the output of its layer."""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import norm


def table(*, num_heads: int, head_dim: int, embed_dim: int) -> parameters.Table:
  """The norm of a head's reads, their gate and the output projection."""
  return {
    'norm': norm.scale_param(head_dim, None),
    'gate': projection(num_heads, head_dim, embed_dim),
    'out': parameters.Param(
      (num_heads, head_dim, embed_dim),
      ('heads', None, 'embed'),
      parameters.fan_in(num_heads * head_dim),
      decay=True,
    ),
  }


def projection(
  num_heads: int, head_dim: int, embed_dim: int
) -> parameters.Param:
  """From the layer's input to a vector per head, [e, h, d]."""
  return parameters.Param(
    (embed_dim, num_heads, head_dim),
    ('embed', 'heads', None),
    parameters.fan_in(embed_dim),
    decay=True,
  )


def apply(params: Any, read: jax.Array, inputs: jax.Array) -> jax.Array:
  """Normalises, gates and projects what was read.

  Args:
    params: With the entries of `table`.
    read: [b, h, t, d], float32 or wider.
    inputs: [b, t, e], of the layer; their dtype is that of the projections.

  Returns:
    [b, t, e].
  """
  gate, out = (params[name].astype(inputs.dtype) for name in ('gate', 'out'))
  gate = jnp.einsum('bte,ehd->bthd', inputs, gate)
  return _project(params['norm'], read, gate, out)


@base.recomputed
def _project(scale, read, gate, out):
  read = norm.rms_norm(scale, jnp.einsum('bhtd->bthd', read))
  return jnp.einsum(
    'bthd,hde->bte', read.astype(gate.dtype) * jax.nn.silu(gate), out
  )
