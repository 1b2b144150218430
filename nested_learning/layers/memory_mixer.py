r"""A memory per head that mixes tokens: self-modifying Titans and simpler ones.

In self-modifying Titans, the memories that make keys, values and rates learn
while they read. Per head, with static projections x^k, x^v, x^q of the layer's
input:

.. math::
   k_t, v_t &= M_k(x^k_t), M_v(x^v_t) \\
   inner\_lr_t, retention_t &= M_{lr}(x^k_t), M_r(x^k_t) \\
   y_t &= M_{main}(q_t)

Every memory M, main included, is written at k_t towards its own output for v_t,
from a learned initial memory. It is a matrix or a two-layer residual MLP, see
`nested_learning.memory.networks`. A role that is not in `adaptive` is its
projection alone. With no adaptive role and `target='value'` the layer is every
linear-attention, delta-rule and test-time-training mixer of the zoo.

Choices that the paper leaves open: projections are convolved over 4 tokens; k,
q, v, the outputs of their memories and the targets are L2-normalised; rates
have a learned bias per head outside the memories (`memory_projections.py`); the
read is normalised per head, gated and projected. The paper has one x for all
roles; with one projection each, a role whose memory never changes is ordinary.

Five defaults differ from the paper; the zoo's `hope_printed` has the paper's.
The objective is the dot product: Delta Gradient Descent already subtracts the
memory's output for a key, and the L2 objective would subtract it again. Only
the maps that make an output are erased and written: erasing the map that reads
the key empties the hidden layer for every key that was written, and values
stored behind it cannot be read. Retention keeps the initial memory, and a token
reads what was written up to it, not to its chunk's start. As printed, small
models do not recall new values; see experiments/results/ablations/README.md.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 79-91.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import memory
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import memory_engine
from nested_learning.layers import memory_projections
from nested_learning.layers import norm
from nested_learning.memory import extensions

RATES = ('inner_lr', 'retention')  # roles that give a number
ROLES = (*memory_projections.ROLES, *RATES)
# Roles that give a vector. 'k' is last, next to the numbers: all of these have
# the same input, so that the network reads them in one slice.
_VECTORS = ('v', 'q', 'k')


@dataclasses.dataclass(frozen=True)
class MemoryMixerConfig:
  """Settings of the memories; the defaults are self-modifying Titans."""

  num_heads: int
  head_dim: int
  kind: Literal['mlp', 'matrix'] = 'mlp'  # the network of every memory
  initial: Literal['learned', 'zero'] = 'learned'  # 'zero' for a matrix alone
  hidden_dim: int = 0  # hidden width of an MLP; 0 is head_dim
  # Of an MLP; the paper does not say.
  activation: Literal['silu', 'gelu'] = 'silu'
  # The network's output; 'norm' is x + LayerNorm(M(x)), as in TTT and Miras,
  # 'map' has no residual connection.
  output: Literal['plain', 'norm', 'map'] = 'plain'
  adaptive: tuple[str, ...] = ('k', 'v', 'inner_lr', 'retention')  # or 'q' too
  # Of keys and queries; 'elu' is 1 + elu(x), 'polynomial' is Atlas'.
  features: Literal['l2', 'elu', 'polynomial'] = 'l2'
  # What a write aims at: the memory's own output for the value, or the value.
  target: Literal['own', 'value'] = 'own'
  chunk_size: int = 64  # tokens between anchors of the main memory
  chunk_size_others: int = 64  # tokens between anchors of the other memories
  objective: Literal['dot', 'l2', 'huber', 'l3'] = 'dot'
  inner_lr: Literal['token', 'one'] = 'token'  # made for each token, or 1
  # Made for each token, RetNet's constant per head, or 1.
  retention: Literal['token', 'head', 'none'] = 'token'
  # Maps with the delta rule.
  erase: Literal['none', 'input', 'output', 'every_map'] = 'output'
  learns: Literal['output', 'every_map'] = 'output'  # maps that tokens write
  # Weights that the delta rule erases from; Gated DeltaNet takes 'retained'.
  erase_from: Literal['previous', 'retained'] = 'previous'
  retain_to: Literal['initial', 'zero'] = 'initial'  # limit of retention
  # Read after each token's write, or at the chunk's start as in the paper.
  read: Literal['token', 'chunk'] = 'token'
  momentum: bool = False  # Titans' trace; its rate is a static projection
  # What is read, a map of the written weights; the last two are Miras'.
  weights: Literal['as_written', 'lq_norm', 'softmax'] = 'as_written'
  max_inner_lr: float = 2.0  # bound of the inner learning rate; 2 reflects
  max_norm: float | None = 8.0  # bound on a map's distance from its start
  # Another way to write the main memory: Atlas' windows, DeltaTTT's targets.
  extension: extensions.Omega | extensions.LocalTargets | None = None
  # 'fused' is a kernel that no TPU has run yet; 'token' is slow, to compare.
  engine: Literal['chunk', 'fused', 'token'] = 'chunk'

  def __post_init__(self):
    errors.check_choices(self)
    self._check_sizes()
    unknown = sorted(set(self.adaptive) - set(ROLES))
    if unknown:
      raise errors.UserError(
        f'adaptive={self.adaptive} names {unknown}; known roles are '
        f'{", ".join(ROLES)}.'
      )
    if self.adaptive and self.target != 'own':
      raise errors.UserError(
        f'target={self.target!r} is one vector, which the memories of '
        f"{self.adaptive} cannot share; use 'own', or adaptive=()."
      )
    for name in RATES:
      if name in self.adaptive and getattr(self, name) != 'token':
        raise errors.UserError(
          f'{name}={getattr(self, name)!r} is not made by a memory; take '
          f'{name!r} out of adaptive={self.adaptive}.'
        )
    if self.initial == 'zero' and self.kind != 'matrix':
      raise errors.UserError(
        f'a memory with kind={self.kind!r} and initial={self.initial!r} never '
        "changes; use 'learned'."
      )
    for group in ('main', 'others'):
      self.rule(group)  # refuses combinations that the engine does not define
    if self.extension is None:
      return
    if self.adaptive:
      raise errors.UserError(
        f'extension={self.extension} is not defined for memories that make '
        f'adaptive={self.adaptive}; set adaptive to ().'
      )
    self.extension.check_network(self.network())

  def _check_sizes(self) -> None:
    check = functools.partial(errors.check_field, self)
    for name in ('num_heads', 'head_dim', 'chunk_size', 'chunk_size_others'):
      check(name, getattr(self, name) >= 1, 'at least 1')
    check('hidden_dim', self.hidden_dim >= 0, 'at least 1, or 0 for head_dim')
    check(
      'max_inner_lr',
      0 <= self.max_inner_lr < math.inf,
      'a finite number of at least 0',
    )
    check(
      'max_norm',
      self.max_norm is None or self.max_norm > 0,
      'above 0, or None for no bound',
    )

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return True

  @property
  def granularity(self) -> int:
    """Tokens of a chunk; see `base.MixerConfig`."""
    others = self.chunk_size_others if self.adaptive else 1
    return math.lcm(self.chunk_size, others)

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    del max_length
    return _make_memory_mixer(self, embed_dim, dtype)

  @property
  def rates(self) -> Mapping[str, str]:
    """Rates that are made for each token, by a memory or a projection.

    Each has a kind: an 'inner_lr', the 'retention' or another 'fraction'.
    """
    rates = {}
    if self.inner_lr == 'token':
      rates['inner_lr'] = 'inner_lr'
    if self.retention == 'token':
      rates['retention'] = 'retention'
    if self.momentum:
      rates['momentum'] = 'fraction'
    if self.extension is not None:
      rates |= self.extension.inputs
    return rates

  def rule(self, group: Literal['main', 'others']) -> memory.Rule:
    """Returns the engine's rule for one group of memories."""
    is_main = group == 'main'
    to_weights = None
    if self.weights != 'as_written':
      to_weights = functools.partial(
        jax.tree.map, memory.RETENTION_MAPS[self.weights]
      )
    return memory.Rule(
      chunk_size=self.chunk_size if is_main else self.chunk_size_others,
      momentum=self.momentum,
      objective=memory.OBJECTIVES[self.objective],
      erase=self.erase,
      learns=self.learns,
      erase_from=self.erase_from,
      retain_to=self.retain_to,
      read=self.read if is_main else 'none',
      target=self.target,
      normalize_target=norm.l2_normalize,
      max_norm=self.max_norm,
      extension=self.extension if is_main else None,
      to_weights=to_weights,
    )

  def network(
    self, group: Literal['main', 'others'] = 'main', *, output_norm: Any = None
  ) -> memory.Network:
    """Returns the network of one group of memories.

    Args:
      group: 'main', which gives one vector, or 'others', which stacks the
        adaptive roles.
      output_norm: Scale and bias of the LayerNorm of the outputs, [(b,) h, d]
        each, with output 'norm'; None if the network is not applied.

    Returns:
      A `memory.Network`.
    """
    num_vectors, num_scalars = 1, 0
    if group == 'others':
      num_vectors = len(set(_VECTORS) & set(self.adaptive))
      num_scalars = len(set(RATES) & set(self.adaptive))
    sizes = {
      'num_heads': self.num_heads,
      'dim': self.head_dim,
      'num_vectors': num_vectors,
      'num_scalars': num_scalars,
    }
    if self.output == 'map':
      sizes['finish'] = lambda x, y: y
    if output_norm is not None:
      scale, bias = (
        output_norm[name][..., None, None, :] for name in ('scale', 'bias')
      )
      sizes['finish'] = lambda x, y: x + norm.layer_norm(scale, bias, y)
    if self.kind == 'matrix':
      if self.target != 'own':
        # The identity is a start for a target of the memory's own, not for v.
        stddev = 0.02 if self.output == 'norm' else 0.0
        sizes['init'] = parameters.normal(stddev)
      return memory.make_matrix(**sizes)
    return memory.make_mlp(
      **sizes,
      hidden_dim=self.hidden_dim or self.head_dim,
      activation=memory.ACTIVATIONS[self.activation],
    )


class MemoryMixerState(NamedTuple):
  """State of the layer.

  Attributes:
    conv: Last inputs of the convolution, [b, 3, channels].
    others: State of the k, v, inner_lr and retention memories; None without.
    main: State of the main memory.
  """

  conv: jax.Array
  others: memory.State | None
  main: memory.State


def _make_memory_mixer(
  config: MemoryMixerConfig, embed_dim, dtype
) -> base.Layer:
  c = config
  groups = ('main', 'others') if c.adaptive else ('main',)
  tables = {group: c.network(group).table for group in groups}
  projected = tuple(rate for rate in c.rates if rate not in c.adaptive)
  bias = {
    group: memory_projections.rate_table(
      c.rates, num_heads=c.num_heads, group=group
    )
    for group in groups
  }
  table = make_table(c, embed_dim, tables, bias, projected)

  def init_state(params, batch_size):
    initial = initial_memories(params, tables, dtype)
    start = {
      group: memory.init_state(c.rule(group), initial[group], batch_size)
      for group in groups
    }
    conv = memory_projections.init_state(params, batch_size, dtype)
    return MemoryMixerState(conv, start.get('others'), start['main'])

  def run(group, params, state, inputs, info):
    def make(params, num_rows):
      bias, output_norm = _per_row(params, num_rows)
      network = c.network(group, output_norm=output_norm.get(group))
      if group == 'main':
        return network, None
      return network, _make_project(c, network, bias[group])

    initial = initial_memories(params, tables, dtype)[group]
    return memory_engine.run(
      make, params, c.rule(group), initial, state, inputs, info, engine=c.engine
    )

  def apply(params, state, inputs, info):
    start = MemoryMixerState(None, None, None) if state is None else state
    tokens, conv = memory_projections.project(
      params,
      start.conv,
      inputs,
      info,
      features=c.features,
      normalize_values=c.target == 'own',
      rates=projected,
      dtype=dtype,
    )
    writes, others = tokens.write_inputs(), None
    if c.adaptive:
      result, others = run('others', params, start.others, tokens, info)
      writes = result.inputs
    bias, _ = _per_row(params, inputs.shape[0])
    writes = _set_rates(c, writes, bias['main'])
    result, main = run('main', params, start.main, writes, info)
    out = memory_projections.output(params, result.read, inputs)
    return out, MemoryMixerState(conv, others, main)

  return base.make_layer(table, init_state, apply)


def make_table(
  config: MemoryMixerConfig,
  embed_dim: int,
  memories: Mapping[str, parameters.Table],
  bias: Mapping[str, parameters.Table],
  projected: Sequence[str],
) -> parameters.Table:
  """Returns the parameters of a layer around memories.

  Args:
    config: Settings of the memories.
    embed_dim: Width e of inputs and outputs.
    memories: Initial memories by name, parameters where they are learned.
    bias: Biases of the rates of each memory.
    projected: Names of the rates that are projected from the layer's input.

  Returns:
    A table.
  """
  heads, dim = config.num_heads, config.head_dim
  table = {
    **memory_projections.table(
      num_heads=heads,
      head_dim=dim,
      embed_dim=embed_dim,
      features=config.features,
      rates=projected,
    ),
    'bias': dict(bias),
  }
  if config.initial == 'learned':
    table['memory'] = dict(memories)
  if config.output == 'norm':
    per_head = lambda value: parameters.Param(
      (heads, dim), ('heads', None), parameters.constant(value), decay=False
    )
    table['output_norm'] = {
      name: {'scale': per_head(1.0), 'bias': per_head(0.0)} for name in memories
    }
  return table


def initial_memories(
  params: Any, tables: Mapping[str, parameters.Table], dtype: Any
) -> Any:
  """Returns the initial memories by name: learned parameters, or zeros.

  Args:
    params: Parameters of `make_table`.
    tables: Tables of the memories by name.
    dtype: Type of the layer's projections.

  Returns:
    A tree like the tables, [h, ..., out, in] per map.
  """
  if 'memory' in params:
    return params['memory']
  wide = jnp.promote_types(dtype, jnp.float32)
  return parameters.map_params(lambda p: jnp.zeros(p.shape, wide), tables)


def _make_project(
  config: MemoryMixerConfig,
  network: memory.Network,
  bias: Mapping[str, jax.Array],
) -> Callable[[Any, memory_projections.Projected], memory.WriteInputs]:
  """Makes the function by which adaptive roles make their own writes.

  Args:
    config: Settings of the memories.
    network: Network of the adaptive roles.
    bias: Biases of their rates, each [b, h, 1, 1].

  Returns:
    `project(weights, tokens)`: the engine's inputs, from the roles' weights at
    the chunk's start and the static projections of its tokens.
  """
  vectors = [role for role in _VECTORS if role in config.adaptive]
  scalars = [role for role in RATES if role in config.adaptive]
  # Numbers are read with the key's projection, even where 'k' is not adaptive.
  read = dict.fromkeys([*vectors, 'k'] if scalars else vectors)

  def project(bias, weights, tokens):
    made, rates = dict(tokens.tokens), dict(tokens.rates)
    for role in read:
      i = vectors.index(role) if role in vectors else 0
      outputs = network.read(
        weights,
        made[role],
        (i, i + (role in vectors)),
        (0, len(scalars) if role == 'k' else 0),
      )
      if role == 'k':
        for j, rate in enumerate(scalars):
          rates[rate] = outputs.scalars[..., j, :, :]
      if role in vectors:
        made[role] = norm.l2_normalize(outputs.vectors[..., 0, :, :])
    projected = memory_projections.Projected(made, rates)
    return _set_rates(config, projected.write_inputs(), bias)

  # A kernel cuts heads, and the constants of 'head' differ among them.
  is_cut = config.retention != 'head'
  return (jax.tree_util.Partial if is_cut else functools.partial)(project, bias)


def _set_rates(config, writes, bias):
  return memory_projections.set_rates(
    writes,
    bias,
    kinds=config.rates,
    max_inner_lr=config.max_inner_lr,
    retention=config.retention,
  )


def _per_row(params: Any, batch_size: int) -> tuple[Any, Any]:
  """Returns biases [b, h, 1, 1] and output norms [b, h, d], copied per row.

  The backward passes of the scans then sum over no rows, which lie on different
  devices.
  """
  per_row = lambda x: jnp.broadcast_to(x, (batch_size, *x.shape))
  bias = jax.tree.map(lambda x: per_row(x[:, None, None]), params['bias'])
  return bias, jax.tree.map(per_row, params.get('output_norm', {}))
