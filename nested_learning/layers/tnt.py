r"""TNT: a global memory of long chunks and local memories of short ones.

The global memory V has one anchor per C_G tokens, which makes it fast, and
carries the stream from its start. A local memory W has one anchor per C_L
tokens, which makes it exact, and restarts from its learned initial memory every
S_L tokens (a shard). No shard waits for another, so that all shards of a row
are read at once:

.. math::
   V_{(n+1) C_G} &= V_{n C_G}
       - \sum_t inner\_lr_t \nabla L(V_{n C_G}; k_t, v_t) \\
   W_t &= W_{t-1} - inner\_lr_t \nabla L(W_{\xi(t, C_L)}; k_t, v_t),
       \quad W_{t-1} = W_{init} \text{ where a shard begins} \\
   o_t &= V_{\xi(t, C_G)}(q_t) + \sum_i W^{(i)}_t (P_t q_t), \qquad
   P_t = \sum_\tau k_\tau k_\tau^T / |k_\tau|^2

with \xi(t, C) the start of t's chunk, and P summed over the tokens of the shard
so far: it projects a query onto the keys that the memory was written with. All
memories share keys, values and queries; each has its own biases of the rates.

Training begins with long chunks. A second stage shortens the chunks of the
local memories for the last steps (`locals.0.chunk_size`): no parameter has a
chunk in its shape, so that the model stays the same.

`MemoryMixerConfig` sets retention, momentum, the delta rule and the network of
all memories. The equations leave the output open: it is normalised and gated as
in `memory_mixer`. A document border restarts local memories but does not move
the borders of shards, which are counted from a stream's start.

References:
  Li et al., TNT, arXiv:2511.07343, 2025, eqs. 5-7 and 15.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import context_parallel
from nested_learning import errors
from nested_learning import memory
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import memory_engine
from nested_learning.layers import memory_mixer
from nested_learning.layers import memory_projections
from nested_learning.layers import norm

_GLOBAL = 'global'
_PROJECTION_CHUNK = 64  # tokens; changes the speed of P, not its value


@dataclasses.dataclass(frozen=True)
class LocalConfig:
  """A memory that restarts in every shard."""

  chunk_size: int = 16  # tokens between anchors, C_L
  shard_size: int = 2048  # tokens between restarts, S_L

  def __post_init__(self):
    for name in ('chunk_size', 'shard_size'):
      errors.check_field(self, name, getattr(self, name) >= 1, 'at least 1')
    errors.check_field(
      self,
      'shard_size',
      self.shard_size % self.chunk_size == 0,
      f'a multiple of chunk_size={self.chunk_size}',
    )


@dataclasses.dataclass(frozen=True)
class TntConfig:
  """A global memory and local ones."""

  memory: memory_mixer.MemoryMixerConfig  # of all; its chunk_size is C_G
  locals: tuple[LocalConfig, ...] = (LocalConfig(),)
  # Queries of local memories: P_t q_t, or q_t.
  query: Literal['projected', 'plain'] = 'projected'
  # Bound of the global memory's inner learning rate: it takes all the steps of
  # its long chunk at once.
  max_global_lr: float = 1e-3

  def __post_init__(self):
    errors.check_choices(self)
    errors.check_field(
      self,
      'max_global_lr',
      0 <= self.max_global_lr < math.inf,
      'a finite number of at least 0',
    )
    if self.memory.adaptive:
      raise errors.UserError(
        f'memory.adaptive={self.memory.adaptive} has no place in TNT, whose '
        'memories share keys and values; set it to ().'
      )
    self.rules()  # refuses combinations that the engine does not define

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return True

  @property
  def granularity(self) -> int:
    """Tokens of a chunk and of shards; see `base.MixerConfig`."""
    shards = (local.shard_size for local in self.locals)
    return math.lcm(self.memory.chunk_size, *shards)

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    del max_length
    return _make_tnt(self, embed_dim, dtype)

  def rules(self) -> dict[str, memory.Rule]:
    """Returns the engine's rule of each memory; V is read at its anchors."""
    rule = self.memory.rule('main')
    return {_GLOBAL: dataclasses.replace(rule, read='chunk')} | {
      _name(i): dataclasses.replace(rule, chunk_size=local.chunk_size)
      for i, local in enumerate(self.locals)
    }

  def shards(self) -> dict[str, int]:
    """Returns the tokens between restarts of each local memory."""
    return {_name(i): local.shard_size for i, local in enumerate(self.locals)}


class TntState(NamedTuple):
  """State of the layer.

  Attributes:
    conv: Last inputs of the convolution, [b, 3, channels].
    memories: State of each memory, by name.
    projections: P of each shard size, as the state of a memory, by name.
    position: int32 [b], tokens since all shards began together.
  """

  conv: jax.Array
  memories: dict[str, memory.State]
  projections: dict[str, memory.State]
  position: jax.Array


class _Shared(NamedTuple):
  """Arguments that all memories of a call share.

  Attributes:
    config: A `TntConfig`.
    info: Borders and padding among the tokens.
    position: int [b, t], earlier tokens since all shards began together.
  """

  config: TntConfig
  info: base.TokenInfo
  position: jax.Array


def _make_tnt(config: TntConfig, embed_dim, dtype) -> base.Layer:
  c = config.memory
  wide = jnp.promote_types(dtype, jnp.float32)
  tables = {name: c.network().table for name in config.rules()}
  bias = {
    name: memory_projections.rate_table(
      c.rates, num_heads=c.num_heads, group='main'
    )
    for name in tables
  }
  table = memory_mixer.make_table(c, embed_dim, tables, bias, c.rates)
  # Shards of one size share their P.
  sizes = sorted(set(config.shards().values()))
  sizes = sizes if config.query == 'projected' else []

  def init_state(params, batch_size):
    start = functools.partial(memory.init_state, batch_size=batch_size)
    initial = memory_mixer.initial_memories(params, tables, dtype)
    return TntState(
      conv=memory_projections.init_state(params, batch_size, dtype),
      memories={
        name: start(rule, initial[name])
        for name, rule in config.rules().items()
      },
      projections={
        str(size): start(_projection_rule(size), _no_keys(c, wide))
        for size in sizes
      },
      position=jnp.zeros((batch_size,), jnp.int32),
    )

  def apply(params, state, inputs, info):
    start = TntState(None, {}, {}, None) if state is None else state
    tokens, conv = memory_projections.project(
      params,
      start.conv,
      inputs,
      info,
      features=c.features,
      normalize_values=False,
      rates=c.rates,
      dtype=dtype,
    )
    writes = tokens.write_inputs()
    position, count = _positions(start.position, inputs, info)
    shared = _Shared(config, info, position)

    projections, queries = {}, {}
    for size in sizes:
      queries[size], projections[str(size)] = _project_queries(
        shared, start.projections.get(str(size)), writes, size
      )
    initial = memory_mixer.initial_memories(params, tables, dtype)
    read, memories = 0.0, {}
    for name in tables:
      own, memories[name] = _read_memory(
        shared, name, params, initial, start.memories.get(name), writes, queries
      )
      read = read + own

    out = memory_projections.output(params, read, inputs)
    together = math.lcm(*config.shards().values())
    return out, TntState(conv, memories, projections, count % together)

  return base.make_layer(table, init_state, apply)


def _read_memory(shared, name, params, initial, state, writes, queries):
  """Writes one memory and returns its reads [b, h, t, d] and its state."""
  config = shared.config
  c = config.memory
  is_global = name == _GLOBAL
  own = memory_projections.set_rates(
    writes,
    jax.tree.map(lambda x: x[:, None, None], params['bias'][name]),
    kinds=c.rates,
    max_inner_lr=config.max_global_lr if is_global else c.max_inner_lr,
    retention=c.retention,
  )
  arguments = (
    lambda output_norm, _: (c.network(output_norm=output_norm), None),
    params.get('output_norm', {}).get(name),
    config.rules()[name],
    initial[name],
    state,
  )
  if is_global:
    result, state = memory_engine.run(
      *arguments, own, shared.info, engine=c.engine
    )
  else:
    size = config.shards()[name]
    own = own._replace(query=queries.get(size, own.query))
    result, state = _run_shards(
      shared, *arguments, own, size=size, engine=c.engine
    )
  return result.read, state


def _project_queries(shared, state, writes, size):
  """Returns P_t q_t [b, h, t, d] for shards of one size, and the state of P."""
  c = shared.config.memory
  keys = norm.l2_normalize(writes.key)
  ones = jnp.ones((*keys.shape[:3], 1), keys.dtype)
  result, state = _run_shards(
    shared,
    lambda *_: (_projection(c), None),
    None,
    _projection_rule(size),
    _no_keys(c, keys.dtype),
    state,
    memory.WriteInputs(keys, keys, ones, ones, query=writes.query),
    size=size,
  )
  return result.read, state


def _run_shards(
  shared, make, params, rule, initial, state, writes, *, size, engine='chunk'
):
  """Runs a memory that restarts in every shard; whole shards all at once."""
  info, num_tokens = shared.info, writes.key.shape[2]
  if state is not None or info.mask is not None or num_tokens % size:
    begins = shared.position % size == 0
    reset = begins if info.reset is None else begins | info.reset
    info = info._replace(reset=reset)
    return memory_engine.run(
      make, params, rule, initial, state, writes, info, engine=engine
    )

  def run(params, initial, writes, reset):
    num_rows = writes.key.shape[0]
    result, state = memory_engine.run(
      make,
      params,
      rule,
      initial,
      None,
      jax.tree.map(lambda x: _cut(x, size, 2), writes),
      info._replace(reset=None if reset is None else _cut(reset, size, 1)),
      engine=engine,
    )
    last = lambda x: x.reshape(num_rows, -1, *x.shape[1:])[:, -1]
    read = result.read
    read = read.reshape(num_rows, -1, *read.shape[1:])
    read = jnp.moveaxis(read, 1, 2)  # [b, h, shards, c, d]
    read = read.reshape(*read.shape[:2], -1, read.shape[-1])
    return result._replace(read=read), jax.tree.map(last, state)

  if context_parallel.num_parts(num_tokens, multiple=size) == 1:
    return run(params, initial, writes, info.reset)

  def part(shared, tokens):
    result, state = run(*shared, *tokens)
    return result, jax.tree.map(lambda x: x[None], state)

  # No shard crosses devices, so that nothing is sent.
  run_parts = context_parallel.over_parts(part, (None, (2, 1)), (2, 0))
  result, states = run_parts((params, initial), (writes, info.reset))
  return result, jax.tree.map(lambda x: x[-1], states)


def _cut(x: jax.Array, size: int, axis: int) -> jax.Array:
  """Cuts rows [b, ..., t, ...] into rows per shard, [b n, ..., size, ...]."""
  x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
  x = jnp.moveaxis(x, axis, 1)
  return x.reshape(-1, *x.shape[2:])


def _positions(start, inputs, info):
  """Returns the tokens before each token [b, t], and those after the call [b].

  They are counted since all shards began together.
  """
  shape = inputs.shape[:2]
  present = jnp.ones(shape, bool) if info.mask is None else info.mask
  count = jnp.cumsum(present, axis=1, dtype=jnp.int32)
  if start is not None:
    count = start[:, None] + count
  return count - 1, count[:, -1]


def _projection(config: memory_mixer.MemoryMixerConfig) -> memory.Network:
  """Returns the network of P, which sums the outer products of keys."""
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


def _name(index: int) -> str:
  return f'local_{index}'
