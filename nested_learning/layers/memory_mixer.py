r"""A memory that mixes tokens: self-modifying Titans, and all that is simpler.

In self-modifying Titans, keys, values, rates and retention learn as they read.

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

With no role but main a memory, and `target='value'`, the same layer is every
linear-attention, delta-rule and test-time-training mixer of the zoo: there a
value is what was projected, and k and q alone are normalised.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 83-91.
"""

import dataclasses
import functools
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

# What keys and queries are made of, from what was convolved.
_FEATURES = {
  'l2': lambda x: norm.l2_normalize(jax.nn.silu(x)),
  'elu': lambda x: jax.nn.elu(x) + 1.0,  # Katharopoulos et al., eq. 7
}

_CHOICES = {
  'kind': ('mlp', 'matrix'),
  'initial': ('learned', 'zero'),
  'output': ('plain', 'norm'),
  'features': tuple(_FEATURES),
  'activation': tuple(memory.ACTIVATIONS),
  'target': ('own', 'value'),
  'objective': tuple(memory.OBJECTIVES),
  'inner_lr': ('token', 'one'),
  'retention': ('token', 'head', 'none'),
  'weights': ('as_written', *memory.RETENTION_MAPS),
  'engine': ('chunk', 'token'),
}


@dataclasses.dataclass(frozen=True)
class MemoryMixerConfig:
  """A memory per head; a role that is no memory is a static projection.

  The defaults are self-modifying Titans.
  """

  num_heads: int
  head_dim: int
  kind: str = 'mlp'  # of every memory: 'mlp' | 'matrix'
  initial: str = 'learned'  # where memories start; or 'zero', a matrix alone
  hidden_dim: int = 0  # of the MLP memories; 0 is head_dim
  activation: str = 'silu'  # of the MLP memories; the paper does not say
  output: str = 'plain'  # 'norm' is x + LayerNorm(M(x)), as TTT and Miras have
  adaptive: tuple[str, ...] = ('k', 'v', 'inner_lr', 'retention')  # or 'q' too
  features: str = 'l2'  # of keys and queries; 'elu' is 1 + elu(x)
  target: str = 'own'  # the memory's own output for the value; or 'value'
  chunk_size: int = 64  # tokens between anchors of the main memory
  chunk_size_others: int = 64  # the same of all other memories
  objective: str = 'l2'  # or 'dot', 'huber', 'l3'
  inner_lr: str = 'token'  # made for each token; or 'one'
  retention: str = 'token'  # the same; 'head', RetNet's constants; or 'none'
  erase: str = 'every_map'  # maps with the delta rule; or 'input', 'none'
  erase_from: str = 'previous'  # weights; or 'retained', as Gated DeltaNet does
  retain_to: str = 'initial'  # or 'zero'
  read: str = 'token'  # or 'chunk', as the paper prints
  momentum: bool = False  # Titans' trace, its rate a static projection
  weights: str = 'as_written'  # what is read; Miras: 'lq_norm', 'softmax' of it
  max_inner_lr: float = 0.5  # bound of the inner learning rate
  injection: float | None = (
    None  # VisionHOPE's r: a soft cap (1 - retention) / r
  )
  max_norm: float | None = 8.0  # bound on a map's departure from its start
  engine: str = 'chunk'  # 'token' is the definition: slow, for comparison

  def __post_init__(self):
    unknown = set(self.adaptive) - set(ROLES)
    if unknown:
      raise ValueError(
        f'adaptive={self.adaptive} names {sorted(unknown)}; known roles are '
        f'{", ".join(ROLES)}.'
      )
    for name, known in _CHOICES.items():
      if getattr(self, name) not in known:
        raise ValueError(
          f'{name}={getattr(self, name)!r} must be one of {", ".join(known)}.'
        )
    if self.adaptive and self.target != 'own':
      raise ValueError(
        f'target={self.target!r} is one vector, which the memories of '
        f"{self.adaptive} cannot share; use 'own', or adaptive=()."
      )
    for name in _SCALARS:
      if name in self.adaptive and getattr(self, name) != 'token':
        raise ValueError(
          f'{name}={getattr(self, name)!r} is not made by a memory; take '
          f'{name!r} out of adaptive={self.adaptive}.'
        )
    if self.initial == 'zero' and self.kind != 'matrix':
      raise ValueError(
        f'a memory with kind={self.kind!r} and initial={self.initial!r} never '
        "changes; use 'learned'."
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
      erase_from=self.erase_from,
      retain_to=self.retain_to,
      read=self.read if is_main else 'none',
      target=self.target,
      normalize_target=norm.l2_normalize,
      max_norm=self.max_norm,
      to_weights=(
        None
        if self.weights == 'as_written'
        else functools.partial(
          jax.tree.map, memory.RETENTION_MAPS[self.weights]
        )
      ),
    )

  def network(
    self, *, num_vectors: int, num_scalars: int, output_norm: Any = None
  ) -> memory.Network:
    """The network of memories with these roles.

    Args:
      num_vectors: Roles that give a vector.
      num_scalars: Roles that give a number.
      output_norm: Parameters of the outputs' norm, with output 'norm'.

    Returns:
      A `memory.Network`.
    """
    finish = {}
    if output_norm is not None:
      wide = jax.tree.map(lambda x: x[:, None, None], output_norm)
      finish['finish'] = lambda x, y: (
        x + norm.layer_norm(wide['scale'], wide['bias'], y)
      )
    if self.kind == 'matrix':
      if self.target != 'own':  # from zero, where the target is not one's own
        finish['init'] = parameters.normal(
          0.02 if self.output == 'norm' else 0.0
        )
      return memory.make_matrix(
        num_heads=self.num_heads,
        dim=self.head_dim,
        num_vectors=num_vectors,
        num_scalars=num_scalars,
        **finish,
      )
    return memory.make_mlp(
      num_heads=self.num_heads,
      dim=self.head_dim,
      num_vectors=num_vectors,
      num_scalars=num_scalars,
      hidden_dim=self.hidden_dim or self.head_dim,
      activation=memory.ACTIVATIONS[self.activation],
      **finish,
    )


class MemoryMixerState(NamedTuple):
  """What the layer carries.

  Attributes:
    conv: The last inputs of the convolution, [b, 3, channels].
    others: State of the k, v, inner_lr and retention memories; None without.
    main: State of the main memory.
  """

  conv: jax.Array
  others: memory.State | None
  main: memory.State


def make_memory_mixer(
  config: MemoryMixerConfig, *, embed_dim: int, dtype: Any
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
  given = [r for r in _SCALARS if getattr(c, r) != 'token']
  rates = [r for r in _SCALARS if r not in c.adaptive and r not in given]
  rates += ['momentum'] if c.momentum else []
  roles = {'main': {'num_vectors': 1, 'num_scalars': 0}}
  if vectors or scalars:
    roles['others'] = {
      'num_vectors': len(vectors),
      'num_scalars': len(scalars),
    }
  networks = {name: c.network(**sizes) for name, sizes in roles.items()}
  wide = jnp.promote_types(dtype, jnp.float32)
  channels = len(_VECTORS) * heads * dim

  def bias_table(name):
    param = lambda init: parameters.Param((heads,), ('heads',), init)
    forgotten = lambda: jnp.geomspace(0.02, 0.001, heads)
    biases = {
      'inner_lr': param(parameters.constant(_INNER_LR_BIAS[name])),
      'retention': param(parameters.values(lambda: _logits(forgotten()))),
      'momentum': param(parameters.constant(0.0)),
    }
    wanted = {*_SCALARS, 'momentum'} if c.momentum else {*_SCALARS}
    return {r: biases[r] for r in biases if r in wanted - set(given)}

  table = {
    'in': parameters.Param(
      (embed_dim, heads, len(_VECTORS), dim),
      ('embed', 'heads', None, None),
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
  if c.initial == 'zero':
    del table['memory']
  if c.output == 'norm':
    per_head = lambda value: parameters.Param(
      (heads, dim), ('heads', None), parameters.constant(value)
    )
    table['output_norm'] = {
      name: {'scale': per_head(1.0), 'bias': per_head(0.0)} for name in networks
    }
  if rates:  # those that are no memory
    table['rates'] = parameters.Param(
      (embed_dim, len(rates), heads),
      ('embed', None, 'heads'),
      parameters.fan_in(embed_dim, 0.1),
    )

  def first_memory(params):
    if 'memory' in params:
      return params['memory']
    return {
      name: parameters.map_params(lambda p: jnp.zeros(p.shape, wide), net.table)
      for name, net in networks.items()
    }

  def init_state(params, batch_size):
    start = {
      name: memory.init_state(initial, batch_size, momentum=c.momentum)
      for name, initial in first_memory(params).items()
    }
    conv = convolution.init_state(_CONV_WIDTH, channels, batch_size, dtype)
    return MemoryMixerState(conv, start.get('others'), start['main'])

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
    is_made = lambda role: role in vectors
    again = lambda role: norm.l2_normalize(made[role])
    return memory.Feed(
      key=again('k') if is_made('k') else made['k'],
      value=again('v') if is_made('v') else made['v'],
      query=again('q') if is_made('q') else made['q'],
      inner_lr=None,
      retention=None,
      extra=raw,
    )

  def per_row(bias, batch_size):
    """A copy per row: the scan's backward pass then sums over no rows."""
    return jax.tree.map(
      lambda x: jnp.broadcast_to(x[:, None, None], (batch_size, heads, 1, 1)),
      bias,
    )

  def set_rates(bias, feed):
    """The feed with the rates at which one group of memories writes."""
    raw = feed.extra

    def rate(role):
      return jax.nn.sigmoid(raw[role] + bias[role])

    one = jnp.ones((*feed.key.shape[:3], 1), wide)
    match c.retention:
      case 'token':
        retention = rate('retention')
      case 'head':  # Sun et al., RetNet, arXiv:2307.08621, 2023, eq. 8
        kept = 1.0 - 2.0 ** (-5.0 - jnp.arange(heads))
        retention = one * kept[:, None, None].astype(wide)
      case 'none':
        retention = one
    inner_lr = one
    if c.inner_lr == 'token':
      inner_lr = c.max_inner_lr * rate('inner_lr')
    if c.injection is not None:  # VisionHOPE's stability-matched step
      cap = (1.0 - retention) / c.injection
      inner_lr = cap * -jnp.expm1(-inner_lr / jnp.maximum(cap, 1e-9))
    return feed._replace(
      inner_lr=inner_lr,
      retention=retention,
      momentum=rate('momentum') if c.momentum else None,
    )

  def run(name, params, state, inputs, marks, project):
    first = jax.tree.leaves(inputs)[0]
    initial = first_memory(params)[name]
    output_norm = params['output_norm'][name] if c.output == 'norm' else None
    network = c.network(**roles[name], output_norm=output_norm)
    engine = memory.chunk_scan
    if c.engine == 'token' or (state is not None and first.shape[2] == 1):
      engine = memory.token_loop
      if state is None:
        state = memory.init_state(initial, first.shape[0], momentum=c.momentum)
    with jax.named_scope('memory'):  # in profiles and compiled programs
      return engine(
        network,
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
    start = MemoryMixerState(None, None, None) if state is None else state
    weights = lambda name: params[name].astype(dtype)
    # Channels of a head lie together, so that heads stay where they are kept.
    x = jnp.einsum('bte,ehsd->bthsd', inputs, weights('in'))
    x, conv = convolution.apply(
      params['conv'],
      start.conv,
      x.reshape(*x.shape[:2], channels),
      reset=marks.reset,
      mask=marks.mask,
    )
    x = x.reshape(*x.shape[:2], heads, len(_VECTORS), dim)
    k, v, q = jnp.einsum('bthsd->sbhtd', x.astype(wide))
    features = _FEATURES[c.features]
    v = jax.nn.silu(v)
    made = {
      'k': features(k),
      'v': norm.l2_normalize(v) if c.target == 'own' else v,
      'q': features(q),
    }
    raw = {}
    if rates:
      raw = jnp.einsum('bte,erh->rbht', inputs, weights('rates')).astype(wide)
      raw = dict(zip(rates, raw[..., None], strict=True))
    feed_inputs = made, raw
    bias = per_row(params['bias'], inputs.shape[0])

    others = None
    if 'others' in networks:
      make_feed = lambda weights, inputs: set_rates(
        bias['others'], project(weights, inputs)
      )
      result, others = run(
        'others', params, start.others, feed_inputs, marks, make_feed
      )
      feed = result.feed
    else:
      feed = project(None, feed_inputs)
    feed = set_rates(bias['main'], feed)
    result, main = run('main', params, start.main, feed, marks, None)

    read = jnp.einsum('bhtd->bthd', result.read)
    read = norm.rms_norm(params['norm'], read).astype(dtype)
    gate = jnp.einsum('bte,ehd->bthd', inputs, weights('gate'))
    out = jnp.einsum('bthd,hde->bte', read * jax.nn.silu(gate), weights('out'))
    return out, MemoryMixerState(conv, others, main)

  return layer.Layer(table, init_state, apply)


def _logits(forgotten: jax.Array) -> jax.Array:
  """The logit of 1 - forgotten."""
  return jnp.log1p(-forgotten) - jnp.log(forgotten)
