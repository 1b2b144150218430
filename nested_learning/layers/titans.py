r"""Self-modifying Titans: keys, values, rates and retention that learn.

Per head, with x^k, x^v, x^q static projections of the layer's input:

.. math::
   k_t, v_t &= M_k(x^k_t), M_v(x^v_t) \\
   inner\_lr_t, retention_t &= M_{lr}(x^k_t), M_r(x^k_t) \\
   y_t &= M_{main}(q_t)

and every memory M, main included, is written at k_t towards its own output for
v_t. Each memory starts from a learned initial memory; it is a matrix or a
two-layer residual MLP, see `nested_learning.memory.networks`. A role that is no
memory is its projection alone.

What the equations leave open is settled thus: each projection is convolved over
4 tokens; k, q, v, what their memories read and the targets are L2-normalised;
inner_lr is a bounded sigmoid and retention a sigmoid, both with a learned bias
per head outside the memories, one for main and one for the others; the read is
normalised per head, gated and projected. The paper has one x for all roles;
with a projection each, a role whose memory never changes is an ordinary one.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 83-91.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import memory
from nested_learning import parameters
from nested_learning.layers import convolution
from nested_learning.layers import layer
from nested_learning.layers import norm

_VECTORS = ('k', 'v', 'q')
# Of the memories that make them: 'k' beside the scalars, which read as it does.
_STACKED = ('v', 'q', 'k')
_SCALARS = ('inner_lr', 'retention')
ROLES = (*_VECTORS, *_SCALARS)
_CONV_WIDTH = 4
# Where inner_lr starts, as a logit: the other memories move slowly at first, so
# that a key means the same when it is written and when it is read.
_INNER_LR_BIAS = {'main': -1.0, 'others': -4.0}


@dataclasses.dataclass(frozen=True)
class SelfModifyingTitansConfig:
  """Self-modifying Titans; a role that is no memory is a static projection."""

  num_heads: int
  head_dim: int
  kind: str = 'mlp'  # of every memory: 'mlp' | 'matrix'
  hidden_dim: int = 0  # of the MLP memories; 0 is head_dim
  activation: str = 'gelu'  # of the MLP memories; the paper does not say
  adaptive: tuple[str, ...] = ('k', 'v', 'inner_lr', 'retention')  # or 'q' too
  chunk_size: int = 64  # tokens between anchors of the main memory
  chunk_size_others: int = 64  # the same of all other memories
  objective: str = 'l2'  # or 'dot'
  erase: str = 'every_map'  # maps with the delta rule; or 'input', 'none'
  retain_to: str = 'initial'  # or 'zero'
  read: str = 'token'  # or 'chunk', as the paper prints
  momentum: bool = False  # Titans' trace, its rate a static projection
  max_inner_lr: float = 0.5  # bound of the inner learning rate
  max_norm: float = 8.0  # bound on a map's departure from its initial memory
  engine: str = 'chunk'  # 'token' is the definition: slow, for comparison

  def __post_init__(self):
    unknown = set(self.adaptive) - set(ROLES)
    if unknown:
      raise ValueError(
        f'adaptive={self.adaptive} names {sorted(unknown)}; known roles are '
        f'{", ".join(ROLES)}.'
      )
    for name, table in (
      ('objective', memory.OBJECTIVES),
      ('activation', memory.ACTIVATIONS),
      ('kind', ('mlp', 'matrix')),
      ('engine', ('chunk', 'token')),
    ):
      if getattr(self, name) not in table:
        raise ValueError(
          f'{name}={getattr(self, name)!r} must be one of {", ".join(table)}.'
        )
    for name in ('main', 'others'):
      self.rule(name)  # raises on what the engine does not know

  def rule(self, name: str) -> memory.Rule:
    """The engine's rule for the 'main' memory or the 'others'."""
    is_main = name == 'main'
    return memory.Rule(
      chunk_size=self.chunk_size if is_main else self.chunk_size_others,
      momentum=self.momentum,
      objective=memory.OBJECTIVES[self.objective],
      erase=self.erase,
      retain_to=self.retain_to,
      read=self.read if is_main else 'none',
      normalize_target=norm.l2_normalize,
      max_norm=self.max_norm,
    )

  def network(self, *, num_vectors: int, num_scalars: int) -> memory.Network:
    """The network of memories with these roles."""
    if self.kind == 'matrix':
      return memory.make_matrix(
        num_heads=self.num_heads,
        dim=self.head_dim,
        num_vectors=num_vectors,
        num_scalars=num_scalars,
      )
    return memory.make_mlp(
      num_heads=self.num_heads,
      dim=self.head_dim,
      num_vectors=num_vectors,
      num_scalars=num_scalars,
      hidden_dim=self.hidden_dim or self.head_dim,
      activation=memory.ACTIVATIONS[self.activation],
    )


class TitansState(NamedTuple):
  """What the layer carries.

  Attributes:
    conv: The last inputs of the convolution, [b, 3, channels].
    others: State of the k, v, inner_lr and retention memories; None without.
    main: State of the main memory.
  """

  conv: jax.Array
  others: memory.State | None
  main: memory.State


def make_self_modifying_titans(
  config: SelfModifyingTitansConfig, *, embed_dim: int, dtype: Any
) -> layer.Layer:
  """Makes the layer.

  Args:
    config: Its settings.
    embed_dim: Width e of inputs and outputs.
    dtype: Type of the projections; memories are float32 at least.

  Returns:
    A `Layer`.
  """
  c = config
  heads, dim = c.num_heads, c.head_dim
  vectors = [r for r in _STACKED if r in c.adaptive]
  scalars = [r for r in _SCALARS if r in c.adaptive]
  rates = [r for r in _SCALARS if r not in c.adaptive]
  rates += ['momentum'] if c.momentum else []
  networks = {'main': c.network(num_vectors=1, num_scalars=0)}
  if vectors or scalars:
    networks['others'] = c.network(
      num_vectors=len(vectors), num_scalars=len(scalars)
    )
  wide = jnp.promote_types(dtype, jnp.float32)
  channels = len(_VECTORS) * heads * dim

  def bias_table(name):
    param = lambda init: parameters.Param((heads,), ('heads',), init)
    forgotten = lambda: jnp.geomspace(0.02, 0.001, heads)
    biases = {
      'inner_lr': param(parameters.constant(_INNER_LR_BIAS[name])),
      'retention': param(parameters.values(lambda: _logits(forgotten()))),
    }
    if c.momentum:
      biases['momentum'] = param(parameters.constant(0.0))
    return biases

  table = {
    'in': parameters.Param(
      (embed_dim, len(_VECTORS), heads, dim),
      ('embed', None, 'heads', None),
      parameters.fan_in(embed_dim),
    ),
    'conv': convolution.table(_CONV_WIDTH, channels, None),
    'bias': {name: bias_table(name) for name in networks},
    'memory': {name: net.table for name, net in networks.items()},
    'norm': norm.scale_param(dim, None),
    'gate': parameters.Param(
      (embed_dim, heads, dim),
      ('embed', 'heads', None),
      parameters.fan_in(embed_dim),
    ),
    'out': parameters.Param(
      (heads, dim, embed_dim),
      ('heads', None, 'embed'),
      parameters.fan_in(heads * dim),
    ),
  }
  if rates:  # those that are no memory
    table['rates'] = parameters.Param(
      (embed_dim, len(rates), heads),
      ('embed', None, 'heads'),
      parameters.fan_in(embed_dim, 0.1),
    )

  def init_state(params, batch_size):
    start = {
      name: memory.init_state(initial, batch_size, momentum=c.momentum)
      for name, initial in params['memory'].items()
    }
    conv = convolution.init_state(_CONV_WIDTH, channels, batch_size, dtype)
    return TitansState(conv, start.get('others'), start['main'])

  def project(weights, inputs):
    """The tokens' feed, made by the memories' own anchor; NL eq. 79-84."""
    made, raw = dict(inputs[0]), dict(inputs[1])
    for role in dict.fromkeys([*vectors, 'k'] if scalars else vectors):
      i = vectors.index(role) if role in vectors else 0
      outputs = networks['others'].read(
        weights,
        made[role],
        (i, i + (role in vectors)),
        (0, len(scalars) if role == 'k' else 0),
      )
      if role in vectors:
        made[role] = outputs.vectors[:, :, 0]
      for j, scalar in enumerate(scalars if role == 'k' else ()):
        raw[scalar] = outputs.scalars[:, :, j]
    return memory.Feed(
      key=norm.l2_normalize(made['k']),
      value=norm.l2_normalize(made['v']),
      query=norm.l2_normalize(made['q']),
      inner_lr=None,
      retention=None,
      extra=raw,
    )

  def set_rates(params, name, feed):
    """The feed with the rates at which one group of memories writes."""
    raw = feed.extra

    def rate(role):
      bias = params['bias'][name][role]
      return jax.nn.sigmoid(raw[role] + bias[:, None, None])

    return feed._replace(
      inner_lr=c.max_inner_lr * rate('inner_lr'),
      retention=rate('retention'),
      momentum=rate('momentum') if c.momentum else None,
    )

  def run(name, params, state, inputs, marks, project):
    first = jax.tree.leaves(inputs)[0]
    initial = params['memory'][name]
    engine = memory.chunk_scan
    if c.engine == 'token' or (state is not None and first.shape[2] == 1):
      engine = memory.token_loop
      if state is None:
        state = memory.init_state(initial, first.shape[0], momentum=c.momentum)
    return engine(
      networks[name],
      c.rule(name),
      initial,
      state,
      inputs,
      project=project,
      reset=marks.reset,
      mask=marks.mask,
      write=marks.write,
    )

  def apply(params, state, inputs, marks):
    start = TitansState(None, None, None) if state is None else state
    weights = lambda name: params[name].astype(dtype)
    x = jnp.einsum('bte,eshd->btshd', inputs, weights('in'))
    x, conv = convolution.apply(
      params['conv'],
      start.conv,
      x.reshape(*x.shape[:2], channels),
      reset=marks.reset,
      mask=marks.mask,
    )
    x = jax.nn.silu(x).reshape(*x.shape[:2], len(_VECTORS), heads, dim)
    x = norm.l2_normalize(jnp.einsum('btshd->sbhtd', x.astype(wide)))
    raw = {}
    if rates:
      raw = jnp.einsum('bte,erh->rbht', inputs, weights('rates')).astype(wide)
      raw = dict(zip(rates, raw[..., None], strict=True))
    feed_inputs = dict(zip(_VECTORS, x, strict=True)), raw

    others = None
    if 'others' in networks:
      make_feed = lambda weights, inputs: set_rates(
        params, 'others', project(weights, inputs)
      )
      result, others = run(
        'others', params, start.others, feed_inputs, marks, make_feed
      )
      feed = result.feed
    else:
      feed = project(None, feed_inputs)
    feed = set_rates(params, 'main', feed)
    result, main = run('main', params, start.main, feed, marks, None)

    read = jnp.einsum('bhtd->bthd', result.read)
    read = norm.rms_norm(params['norm'], read).astype(dtype)
    gate = jnp.einsum('bte,ehd->bthd', inputs, weights('gate'))
    out = jnp.einsum('bthd,hde->bte', read * jax.nn.silu(gate), weights('out'))
    return out, TitansState(conv, others, main)

  return layer.Layer(table, init_state, apply)


def _logits(forgotten: jax.Array) -> jax.Array:
  """The logit of 1 - forgotten."""
  return jnp.log1p(-forgotten) - jnp.log(forgotten)
