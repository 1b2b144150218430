r"""Projections around a memory: keys, values, queries, rates and output.

The keys, values and queries of a token are projected from the layer's input,
convolved over 4 tokens and passed through a feature map. Atlas' features are
polynomials,

.. math::
   \phi(x) = normalize(\sum_{i=1}^3 a_i (\sqrt{d} x / |x|)^i), \quad a_i = 1/i!
   \text{ initially}

with a_i learned per head. The paper takes all monomials up to a degree, which
widens the keys. Here powers of single entries are summed, so that memories keep
their size.

The rates of a token (inner learning rate, retention, momentum) are sigmoids of
a number per token plus a learned bias per head.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, section 8.3 (local
    convolutions, normalised keys and queries).
  Behrouz et al., Atlas, arXiv:2505.23735, 2025, section 3.1 (polynomials).
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import memory
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import convolution
from nested_learning.layers import norm

ROLES = ('k', 'v', 'q')
_CONV_WIDTH = 4  # tokens
_DEGREE = 3  # of Atlas' polynomials

# Initial inner_lr, as a logit. The memories of the other roles move slowly at
# first, so that a key means the same when it is written and when it is read.
_INNER_LR_BIAS = {'main': -1.0, 'others': -4.0}
# Initial fraction forgotten per token, of the first and of the last head. The
# first heads of the other roles return to their initial memory within a row of
# training, so that their drift is bounded: a value written after a thousand
# tokens is made like one written after a hundred.
_FORGOTTEN = {'main': (0.02, 0.001), 'others': (0.2, 0.001)}

# Features of keys and queries, functions of the convolved projection.
FEATURES = {
  'l2': lambda x, _: norm.l2_normalize(jax.nn.silu(x)),
  'elu': lambda x, _: jax.nn.elu(x) + 1.0,  # Katharopoulos et al., eq. 7
  'polynomial': lambda x, powers: _polynomial(jax.nn.silu(x), powers),
}


class Projected(NamedTuple):
  """Projections of tokens.

  Attributes:
    tokens: 'k', 'v' and 'q', each [b, h, t, d] in float32 at least.
    rates: Per rate, the number [b, h, t, 1] whose sigmoid it is, before bias.
  """

  tokens: dict[str, jax.Array]
  rates: dict[str, jax.Array]

  def write_inputs(self) -> memory.WriteInputs:
    """Returns the engine's inputs, with the rates still to be set."""
    return memory.WriteInputs(
      key=self.tokens['k'],
      value=self.tokens['v'],
      query=self.tokens['q'],
      inner_lr=None,
      retention=None,
      extra=self.rates,
    )


def table(
  *,
  num_heads: int,
  head_dim: int,
  embed_dim: int,
  features: str,
  rates: Sequence[str],
) -> dict[str, Any]:
  """Returns the parameters of all projections.

  Args:
    num_heads: Heads h.
    head_dim: Width d of a head.
    embed_dim: Width e of the layer's inputs and outputs.
    features: Features of keys and queries, a key of `FEATURES`.
    rates: Names of the rates that are projected.

  Returns:
    A table.
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
    'norm': norm.scale_param(head_dim, None),
    'gate': parameters.Param(
      (embed_dim, num_heads, head_dim),
      ('embed', 'heads', None),
      parameters.fan_in(embed_dim),
      decay=True,
    ),
    'out': parameters.Param(
      (num_heads, head_dim, embed_dim),
      ('heads', None, 'embed'),
      parameters.fan_in(num_heads * head_dim),
      decay=True,
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
  if rates:
    table['rates'] = parameters.Param(
      (embed_dim, len(rates), num_heads),
      ('embed', None, 'heads'),
      # Small, so that all tokens begin near the rates that the biases set.
      parameters.fan_in(embed_dim, 0.1),
      decay=True,
    )
  return table


def init_state(params: Any, batch_size: int, dtype: Any) -> jax.Array:
  """Returns the convolution's state at a stream's start, [b, 3, channels]."""
  channels = params['conv']['kernel'].shape[-1]
  return convolution.init_state(_CONV_WIDTH, channels, batch_size, dtype)


def project(
  params: Any,
  state: jax.Array | None,
  inputs: jax.Array,
  info: base.TokenInfo,
  *,
  features: str,
  normalize_values: bool,
  rates: Sequence[str],
  dtype: Any,
) -> tuple[Projected, jax.Array]:
  """Projects the layer's inputs to keys, values, queries and rates.

  Args:
    params: Parameters of `table`.
    state: State of the convolution, or None for a stream's start.
    inputs: [b, t, e].
    info: Borders and padding among the tokens.
    features: Features of keys and queries, a key of `FEATURES`.
    normalize_values: Whether values are L2-normalised.
    rates: Names of the rates, as in `table`.
    dtype: Type of the projections.

  Returns:
    The projections, and the state of the convolution after the tokens.
  """
  # The channels of a head lie together, so that no head changes its device.
  x = jnp.einsum('bte,ehsd->bthsd', inputs, params['in'].astype(dtype))
  shape = x.shape
  # Memories are float32 at least: bfloat16 would lose small writes.
  wide = jnp.promote_types(dtype, jnp.float32)

  @base.recomputed
  def make(conv, powers, x):
    x, after = convolution.apply(
      conv, state, x.reshape(*shape[:2], -1), reset=info.reset, mask=info.mask
    )
    x = x.reshape(shape).astype(wide)
    k, v, q = (role[..., 0, :] for role in jnp.split(x, len(ROLES), axis=3))
    v = jax.nn.silu(v)
    tokens = {
      'k': FEATURES[features](k, powers),
      'v': norm.l2_normalize(v) if normalize_values else v,
      'q': FEATURES[features](q, powers),
    }
    # Heads are moved last: elementwise work is slow over long strides.
    return {r: jnp.einsum('bthd->bhtd', x) for r, x in tokens.items()}, after

  tokens, state = make(params['conv'], params.get('powers'), x)
  raw = {}
  if rates:
    x = jnp.einsum('bte,erh->rbht', inputs, params['rates'].astype(dtype))
    raw = dict(zip(rates, x.astype(wide)[..., None], strict=True))
  return Projected(tokens, raw), state


def rate_table(
  rates: Mapping[str, str], *, num_heads: int, group: str
) -> parameters.Table:
  """Returns the biases [h] of the rates of one group of memories.

  Args:
    rates: Kind of each rate that every token makes, by name.
    num_heads: Heads h.
    group: 'main' or 'others'; they start at different rates.

  Returns:
    A table with one parameter per rate.
  """
  forgotten = lambda: jnp.geomspace(*_FORGOTTEN[group], num_heads)
  inits = {
    'inner_lr': parameters.constant(_INNER_LR_BIAS[group]),
    # The logit of the fraction kept, 1 - forgotten.
    'retention': parameters.values(
      lambda: jnp.log1p(-forgotten()) - jnp.log(forgotten())
    ),
    'fraction': parameters.constant(0.0),
  }
  return {
    rate: parameters.Param(
      (num_heads,),
      ('heads',),
      inits[kind],
      decay=False,
    )
    for rate, kind in rates.items()
  }


def set_rates(
  writes: memory.WriteInputs,
  bias: Mapping[str, jax.Array],
  *,
  kinds: Mapping[str, str],
  max_inner_lr: float,
  retention: str,
) -> memory.WriteInputs:
  """Sets the rates at which one group of memories is written.

  Args:
    writes: Inputs of the engine; `extra` has each rate before its bias,
      [b, h, t, 1].
    bias: Biases of the rates that every token makes, each [(b,) h, 1, 1].
    kinds: Kind of each rate, see `MemoryMixerConfig.rates`.
    max_inner_lr: Upper bound of inner learning rates.
    retention: 'token', made like the other rates; 'head', RetNet's constant per
      head; or 'none', which keeps everything.

  Returns:
    The inputs with rates. An inner learning rate without a bias is 1.
  """
  rates = {
    name: jax.nn.sigmoid(writes.extra[name] + b) for name, b in bias.items()
  }
  for name in rates:
    if kinds[name] == 'inner_lr':
      rates[name] *= max_inner_lr
  one = jnp.ones((*writes.key.shape[:-1], 1), writes.key.dtype)
  constants = {'inner_lr': one, 'retention': one}
  if retention == 'head':  # Sun et al., RetNet, arXiv:2307.08621, 2023, eq. 8
    kept = 1.0 - 2.0 ** (-5.0 - jnp.arange(writes.key.shape[1]))
    constants['retention'] = one * kept[:, None, None].astype(one.dtype)
  fields = {n: x for n, x in rates.items() if n in writes._fields}
  extra = dict(writes.extra) | {
    n: x for n, x in rates.items() if n not in fields
  }
  return writes._replace(**(constants | fields), extra=extra)


def output(params: Any, read: jax.Array, inputs: jax.Array) -> jax.Array:
  """Normalises the reads of each head, gates them and projects them.

  Args:
    params: Parameters of `table`.
    read: [b, h, t, d], float32 or wider.
    inputs: [b, t, e], inputs of the layer, in the dtype of the projections.

  Returns:
    [b, t, e].
  """
  gate, out = (params[name].astype(inputs.dtype) for name in ('gate', 'out'))
  gate = jnp.einsum('bte,ehd->bthd', inputs, gate)
  return _gated_projection(params['norm'], read, gate, out)


@base.recomputed
def _gated_projection(scale, read, gate, out):
  read = norm.rms_norm(scale, jnp.einsum('bhtd->bthd', read))
  return jnp.einsum(
    'bthd,hde->bte', read.astype(gate.dtype) * jax.nn.silu(gate), out
  )


def _polynomial(x: jax.Array, powers: jax.Array) -> jax.Array:
  """Computes Atlas' features of x [b, t, h, d] for coefficients [h, degree]."""
  x = math.sqrt(x.shape[-1]) * norm.l2_normalize(x)
  terms = [powers[:, i, None] * x ** (i + 1) for i in range(powers.shape[1])]
  return norm.l2_normalize(sum(terms))
