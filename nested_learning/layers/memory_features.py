r"""Keys, values and queries of a memory mixer, from the inputs of its layer.

A role's tokens are projected, convolved over 4 tokens and passed through a
feature map. The one of Atlas is a polynomial,

.. math::
   \phi(x) = normalize(\sum_{i=1}^3 a_i (\sqrt{d} x / |x|)^i), \quad a_i = 1/i!
   \text{ at first}

whose a_i are learned per head. In print its features are all monomials up to a
degree, which makes keys that much wider. Here powers are of each entry alone,
up to the third, and summed, so that memories are as large as elsewhere.

References:
  Behrouz et al., Atlas, arXiv:2505.23735, 2025, section 3.1 (polynomials).
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, section 8.3 (local
  convolutions, normalised keys and queries).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import convolution
from nested_learning.layers import norm

ROLES = ('k', 'v', 'q')
_CONV_WIDTH = 4
_DEGREE = 3

# What keys and queries are made of, from what was convolved.
FEATURES = {
  'l2': lambda x, _: norm.l2_normalize(jax.nn.silu(x)),
  'elu': lambda x, _: jax.nn.elu(x) + 1.0,  # Katharopoulos et al., eq. 7
  'polynomial': lambda x, powers: _polynomial(jax.nn.silu(x), powers),
}


def table(
  *, num_heads: int, head_dim: int, embed_dim: int, features: str = 'l2'
) -> parameters.Table:
  """The projections of all roles and their convolution.

  Args:
    num_heads: Heads h.
    head_dim: Width d of a head.
    embed_dim: Width e of the inputs.
    features: Of keys and queries, one of `FEATURES`.

  Returns:
    A table with the entries 'in' and 'conv', and 'powers' for a polynomial.
  """
  table = {
    'in': parameters.Param(
      (embed_dim, num_heads, len(ROLES), head_dim),
      ('embed', 'heads', None, None),
      parameters.fan_in(embed_dim),
      decay=True,
    ),
    'conv': convolution.table(
      _CONV_WIDTH, len(ROLES) * num_heads * head_dim, None
    ),
  }
  if features == 'polynomial':
    first = lambda: [1.0 / math.factorial(i + 1) for i in range(_DEGREE)]
    table['powers'] = parameters.Param(
      (num_heads, _DEGREE),
      ('heads', None),
      parameters.values(first),
      decay=False,
    )
  return table


def init_state(params: Any, batch_size: int, dtype: Any) -> jax.Array:
  """The convolution's state at a stream's start, [b, 3, channels]."""
  channels = params['conv']['kernel'].shape[-1]
  return convolution.init_state(_CONV_WIDTH, channels, batch_size, dtype)


def apply(
  params: Any,
  state: jax.Array | None,
  inputs: jax.Array,
  marks: base.TokenInfo,
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
  wide = jnp.promote_types(dtype, jnp.float32)

  @base.recomputed
  def make(conv, powers, x):
    x, after = convolution.apply(
      conv,
      state,
      x.reshape(*shape[:2], -1),
      reset=marks.reset,
      mask=marks.mask,
    )
    x = x.reshape(shape).astype(wide)
    k, v, q = (role[..., 0, :] for role in jnp.split(x, len(ROLES), axis=3))
    v = jax.nn.silu(v)
    made = {
      'k': FEATURES[features](k, powers),
      'v': norm.l2_normalize(v) if normalize_values else v,
      'q': FEATURES[features](q, powers),
    }
    # Heads are moved last: elementwise work is slow over long strides.
    return {r: jnp.einsum('bthd->bhtd', x) for r, x in made.items()}, after

  return make(params['conv'], params.get('powers'), x)


def _polynomial(x: jax.Array, powers: jax.Array) -> jax.Array:
  """The features [b, t, h, d] of Atlas, for coefficients [h, degree]."""
  x = math.sqrt(x.shape[-1]) * norm.l2_normalize(x)
  terms = [powers[:, i, None] * x ** (i + 1) for i in range(powers.shape[1])]
  return norm.l2_normalize(sum(terms))
