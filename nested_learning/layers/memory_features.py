"""Keys, values and queries of a memory mixer, from the inputs of its layer.

A role's tokens are projected, convolved over 4 tokens and passed through a
feature map.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, section 8.3 (local
  convolutions, normalised keys and queries).
"""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import convolution
from nested_learning.layers import layer
from nested_learning.layers import norm

ROLES = ('k', 'v', 'q')
_CONV_WIDTH = 4

# What keys and queries are made of, from what was convolved.
FEATURES = {
  'l2': lambda x: norm.l2_normalize(jax.nn.silu(x)),
  'elu': lambda x: jax.nn.elu(x) + 1.0,  # Katharopoulos et al., eq. 7
}


def table(*, num_heads: int, head_dim: int, embed_dim: int) -> parameters.Table:
  """The projections of all roles and their convolution.

  Args:
    num_heads: Heads h.
    head_dim: Width d of a head.
    embed_dim: Width e of the inputs.

  Returns:
    A table with the entries 'in' and 'conv'.
  """
  return {
    'in': parameters.Param(
      (embed_dim, num_heads, len(ROLES), head_dim),
      ('embed', 'heads', None, None),
      parameters.fan_in(embed_dim),
    ),
    'conv': convolution.table(
      _CONV_WIDTH, len(ROLES) * num_heads * head_dim, None
    ),
  }


def init_state(params: Any, batch_size: int, dtype: Any) -> jax.Array:
  """The convolution's state at a stream's start, [b, 3, channels]."""
  channels = params['conv']['kernel'].shape[-1]
  return convolution.init_state(_CONV_WIDTH, channels, batch_size, dtype)


def apply(
  params: Any,
  state: jax.Array | None,
  inputs: jax.Array,
  marks: layer.Marks,
  *,
  features: str,
  normalize_values: bool,
  dtype: Any,
) -> tuple[dict[str, jax.Array], jax.Array]:
  """Makes the tokens of every role.

  Args:
    params: With the entries of `table`.
    state: Of the convolution, or None at a stream's start.
    inputs: [b, t, e].
    marks: Of the tokens.
    features: Of keys and queries, one of `FEATURES`.
    normalize_values: Whether values are L2-normalised.
    dtype: Type of the projection.

  Returns:
    k, v and q, each [b, h, t, d] in float32 at least, and the convolution's
    state after the tokens.
  """
  # Channels of a head lie together, so that heads stay where they are kept.
  x = jnp.einsum('bte,ehsd->bthsd', inputs, params['in'].astype(dtype))
  shape = x.shape
  x, state = convolution.apply(
    params['conv'],
    state,
    x.reshape(*shape[:2], -1),
    reset=marks.reset,
    mask=marks.mask,
  )
  wide = jnp.promote_types(dtype, jnp.float32)
  k, v, q = jnp.einsum('bthsd->sbhtd', x.reshape(shape).astype(wide))
  make = FEATURES[features]
  v = jax.nn.silu(v)
  made = {
    'k': make(k),
    'v': norm.l2_normalize(v) if normalize_values else v,
    'q': make(q),
  }
  return made, state
