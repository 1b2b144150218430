r"""TNT: a memory of large chunks beside memories of small ones that start anew.

The global memory V has one anchor per C_G tokens, which is why it is quick, and
carries what a stream has said from its start. A local memory W has one per C_L
tokens, which is why it is exact, and starts anew from its learned initial
memory every S_L tokens (a shard): no shard waits for another, and all of them
are worked on at once, wherever they are:

.. math::
   V_{(n+1) C_G} &= V_{n C_G}
       - \sum_t inner\_lr_t \nabla L(V_{n C_G}; k_t, v_t) \\
   W_t &= W_{t-1} - inner\_lr_t \nabla L(W_{\xi(t, C_L)}; k_t, v_t),
       \quad W_{t-1} = W_{init} \text{ where a shard begins} \\
   o_t &= V_{\xi(t, C_G)}(q_t) + \sum_i W^{(i)}_t (P_t q_t), \qquad
   P_t = \sum_\tau k_\tau k_\tau^T / |k_\tau|^2

with \xi(t, C) the start of t's chunk, and P summed over the tokens of the shard
so far: a memory is asked about what it was written with. All memories have the
same keys, values and queries; rates have a bias for each memory.

A model is trained with long chunks first. The second stage makes those of the
local memories shorter for the last steps: no parameter has a chunk in its
shape, so that it is the same model with another `locals.0.chunk_size`.

Whatever else a memory may have (retention, momentum, the delta rule, what is
read) is that of `MemoryMixerConfig`. Left open by the equations: the outputs'
norm and gate are those of `memory_mixer`, and a document border ends a shard's
memories but moves no border of shards, which are counted from a stream's start.

References:
  Li et al., TNT, arXiv:2511.07343, 2025, eqs. 5-7 and 15.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import context_parallel
from nested_learning import errors
from nested_learning import memory
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import memory_engine
from nested_learning.layers import memory_features
from nested_learning.layers import memory_mixer
from nested_learning.layers import memory_out
from nested_learning.layers import memory_rates
from nested_learning.layers import memory_roles
from nested_learning.layers import memory_table
from nested_learning.layers import norm

_GLOBAL = 'global'
_PROJECTION_CHUNK = 64  # tokens; how P is computed, not what it is


@dataclasses.dataclass(frozen=True)
class LocalConfig:
  """A memory that starts anew in every shard."""

  chunk_size: int = 16  # tokens between anchors, C_L
  shard_size: int = 2048  # tokens after which it starts anew, S_L

  def __post_init__(self):
    if self.chunk_size < 1 or self.shard_size % self.chunk_size:
      raise errors.UserError(
        f'a local memory has shard_size={self.shard_size}, which is not a '
        f'multiple of its chunk_size={self.chunk_size}; change one of them.'
      )


@dataclasses.dataclass(frozen=True)
class TntConfig:
  """A global memory and local ones."""

  memory: memory_mixer.MemoryMixerConfig  # of all; its chunk_size is C_G
  locals: tuple[LocalConfig, ...] = (LocalConfig(),)
  query: str = 'projected'  # of local memories: P_t q_t; or 'plain', q_t
  # Bound of the global memory's inner learning rate: it takes all the steps of
  # its long chunk at once.
  max_global_lr: float = 1e-3

  def __post_init__(self):
    if self.memory.adaptive:
      raise errors.UserError(
        f'memory.adaptive={self.memory.adaptive} has no place in TNT, whose '
        'memories share keys and values; set it to ().'
      )
    if self.query not in ('projected', 'plain'):
      raise errors.UserError(
        f"query={self.query!r} must be 'projected' or 'plain'."
      )
    self.rules()  # raises on what the engine does not know

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return True

  @property
  def granularity(self) -> int:
    """Tokens of a chunk and of shards; see `base.MixerConfig`."""
    shards = (local.shard_size for local in self.locals)
    return math.lcm(self.memory.chunk_size, *shards)

  def make(self, *, embed_dim: int, max_length: int, dtype: Any) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    del max_length
    return make_tnt(self, embed_dim=embed_dim, dtype=dtype)

  def rules(self) -> dict[str, memory.Rule]:
    """The engine's rule for each memory; the global one is read at anchors."""
    rule = self.memory.rule('main')
    return {_GLOBAL: dataclasses.replace(rule, read='chunk')} | {
      _name(i): dataclasses.replace(rule, chunk_size=local.chunk_size)
      for i, local in enumerate(self.locals)
    }


class TntState(NamedTuple):
  """What the layer carries.

  Attributes:
    conv: The last inputs of the convolution, [b, 3, channels].
    memories: The state of each memory, by name.
    projections: P of each shard size, as a memory's state, by name.
    position: int32 [b], tokens since all shards began together.
  """

  conv: jax.Array
  memories: dict[str, memory.State]
  projections: dict[str, memory.State]
  position: jax.Array


def make_tnt(config: TntConfig, *, embed_dim: int, dtype: Any) -> base.Layer:
  """Makes the layer.

  Args:
    config: Its memories.
    embed_dim: Width e of inputs and outputs.
    dtype: Type of the projections; memories are float32 at least.

  Returns:
    A `Layer`.
  """
  c = config.memory
  wide = jnp.promote_types(dtype, jnp.float32)
  rules = config.rules()
  shards = {_name(i): local.shard_size for i, local in enumerate(config.locals)}
  rates = memory_rates.made(c)
  initial_table = {name: _network(c, None).table for name in rules}
  bias = {name: memory_rates.table(c, 'main') for name in initial_table}
  table = memory_table.make(c, embed_dim, initial_table, bias, rates)

  def first_memory(params, name):
    if 'memory' in params:
      return params['memory'][name]
    zeros = lambda p: jnp.zeros(p.shape, wide)
    return parameters.map_params(zeros, initial_table[name])

  def init_state(params, batch_size):
    return TntState(
      conv=memory_features.init_state(params, batch_size, dtype),
      memories={
        name: memory.init_state(
          first_memory(params, name), batch_size, momentum=c.momentum
        )
        for name in rules
      },
      projections={
        str(size): memory.init_state(_no_keys(c, wide), batch_size)
        for size in (set(shards.values()) if _projects(config) else ())
      },
      position=jnp.zeros((batch_size,), jnp.int32),
    )

  def apply(params, state, inputs, marks):
    start = TntState(None, {}, {}, None) if state is None else state
    made, conv = memory_features.apply(
      params,
      start.conv,
      inputs,
      marks,
      features=c.features,
      normalize_values=False,
      dtype=dtype,
    )
    raw = {}
    if rates:
      raw = jnp.einsum(
        'bte,erh->rbht', inputs, params['rates'].astype(dtype)
      ).astype(wide)
      raw = dict(zip(rates, raw[..., None], strict=True))
    feed = memory_roles.to_feed(made, raw)
    position, count = _positions(start.position, inputs, marks)

    projections, queries = {}, {}
    for size in sorted(set(shards.values())) if _projects(config) else ():
      keys = norm.l2_normalize(feed.key)
      ones = jnp.ones((*keys.shape[:3], 1), wide)
      result, projections[str(size)] = _run_shards(
        lambda *_: (_projection(c), None),
        None,
        _projection_rule(size),
        _no_keys(c, wide),
        start.projections.get(str(size)),
        memory.Feed(keys, keys, ones, ones, query=feed.query),
        marks,
        position,
        size,
      )
      queries[size] = result.read

    read, memories = 0.0, {}
    for name, rule in rules.items():
      bias = jax.tree.map(lambda x: x[:, None, None], params['bias'][name])
      bounded = c
      if name == _GLOBAL:
        bounded = dataclasses.replace(c, max_inner_lr=config.max_global_lr)
      own = memory_rates.set_rates(bounded, bias, feed)._replace(extra=None)
      arguments = (
        lambda output_norm, _: (_network(c, output_norm), None),
        params.get('output_norm', {}).get(name),
        rule,
        first_memory(params, name),
        start.memories.get(name),
      )
      if name == _GLOBAL:
        result, memories[name] = memory_engine.run(
          *arguments, own, marks, engine=c.engine
        )
      else:
        size = shards[name]
        own = own._replace(query=queries.get(size, own.query))
        result, memories[name] = _run_shards(
          *arguments, own, marks, position, size, engine=c.engine
        )
      read = read + result.read

    out = memory_out.apply(params, read, inputs)
    together = math.lcm(*shards.values())
    return out, TntState(conv, memories, projections, count % together)

  return base.make_layer(table, init_state, apply)


def _run_shards(
  make,
  params,
  rule,
  initial,
  state,
  feed,
  marks,
  position,
  size,
  *,
  engine='chunk',
):
  """A memory that starts anew in every shard: all of them at once, if whole."""
  num_tokens = feed.key.shape[2]
  if state is not None or marks.mask is not None or num_tokens % size:
    begins = position % size == 0
    reset = begins if marks.reset is None else begins | marks.reset
    marks = marks._replace(reset=reset)
    return memory_engine.run(
      make, params, rule, initial, state, feed, marks, engine=engine
    )

  def run(params, initial, feed, reset):
    num_rows = feed.key.shape[0]
    result, state = memory_engine.run(
      make,
      params,
      rule,
      initial,
      None,
      jax.tree.map(lambda x: _cut(x, size, 2), feed),
      marks._replace(reset=None if reset is None else _cut(reset, size, 1)),
      engine=engine,
    )
    last = lambda x: x.reshape(num_rows, -1, *x.shape[1:])[:, -1]
    read = result.read
    read = read.reshape(num_rows, -1, *read.shape[1:])
    read = jnp.moveaxis(read, 1, 2)  # [b, h, shards, c, d]
    read = read.reshape(*read.shape[:2], -1, read.shape[-1])
    return result._replace(read=read), jax.tree.map(last, state)

  if context_parallel.num_parts(num_tokens, multiple=size) == 1:
    return run(params, initial, feed, marks.reset)

  def part(shared, tokens):
    result, state = run(*shared, *tokens)
    return result, jax.tree.map(lambda x: x[None], state)

  # No shard crosses devices: nothing is sent.
  run_parts = context_parallel.over_parts(part, (None, (2, 1)), (2, 0))
  result, states = run_parts((params, initial), (feed, marks.reset))
  return result, jax.tree.map(lambda x: x[-1], states)


def _cut(x: jax.Array, size: int, axis: int) -> jax.Array:
  """Rows [b, ..., t, ...] as rows of their shards [b n, ..., size, ...]."""
  x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
  x = jnp.moveaxis(x, axis, 1)
  return x.reshape(-1, *x.shape[2:])


def _positions(start, inputs, marks):
  """Tokens before each token [b, t], as shards count them, and after all."""
  shape = inputs.shape[:2]
  present = jnp.ones(shape, bool) if marks.mask is None else marks.mask
  count = jnp.cumsum(present, axis=1, dtype=jnp.int32)
  if start is not None:
    count = start[:, None] + count
  return count - 1, count[:, -1]


def _projects(config: TntConfig) -> bool:
  return config.query == 'projected'


def _projection(config: memory_mixer.MemoryMixerConfig) -> memory.Network:
  """P as a memory: the sum of keys' outer products, read at every token."""
  return memory.make_matrix(
    num_heads=config.num_heads, dim=config.head_dim, num_vectors=1
  )


def _projection_rule(shard_size: int) -> memory.Rule:
  return memory.Rule(
    chunk_size=math.gcd(_PROJECTION_CHUNK, shard_size),
    objective=memory.OBJECTIVES['dot'],
    erase='none',
    retain_to='zero',
    target='value',
  )


def _no_keys(config: memory_mixer.MemoryMixerConfig, dtype: Any) -> Any:
  zeros = lambda p: jnp.zeros(p.shape, dtype)
  return parameters.map_params(zeros, _projection(config).table)


def _network(config: memory_mixer.MemoryMixerConfig, output_norm: Any):
  return config.network(num_vectors=1, num_scalars=0, output_norm=output_norm)


def _name(index: int) -> str:
  return f'local_{index}'
