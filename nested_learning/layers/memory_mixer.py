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
per head outside the memories, one for main and one for the others, which move
slowly at first and in some heads return soon (`memory_rates.py`); the read is
normalised per head, gated and projected. The paper has one x for all roles;
with a projection each, a role whose memory never changes is an ordinary one.

Three defaults are not as printed. The objective is the dot product: Delta
Gradient Descent already subtracts what the memory gives for a key, and the L2
objective would subtract it again. It erases at the maps that make an output
alone: erasing at the map that reads the key empties the hidden layer for every
key that was written, and what is stored behind it cannot be read. And tokens
write these maps alone, so that what was written is read through the same hidden
layer however many tokens later. As printed, with objective 'l2', and erase and
learns 'every_map', small models recall nothing that was written anew; see
`experiments/ablations/erase.py`.

With no role but main a memory, and `target='value'`, the same layer is every
linear-attention, delta-rule and test-time-training mixer of the zoo: there a
value is what was projected, and k and q alone are normalised.

What newer papers add is an option each, in a file of its own: Atlas' windows
(`memory/tails.py`) and orthogonal steps (`memory/orthogonal.py`), local errors
(`memory/local.py`) and steps that are capped (`memory_rates.py`).

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 83-91.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import memory
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import memory_engine
from nested_learning.layers import memory_features
from nested_learning.layers import memory_out
from nested_learning.layers import memory_rates
from nested_learning.layers import memory_roles
from nested_learning.layers import memory_table
from nested_learning.layers import norm

ROLES = (*memory_features.ROLES, *memory_rates.ROLES)

_CHOICES = {
  'kind': ('mlp', 'matrix'),
  'initial': ('learned', 'zero'),
  'output': ('plain', 'norm', 'map'),
  'features': tuple(memory_features.FEATURES),
  'activation': tuple(memory.ACTIVATIONS),
  'target': ('own', 'value'),
  'objective': tuple(memory.OBJECTIVES),
  'inner_lr': ('token', 'one'),
  'retention': ('token', 'head', 'none'),
  'weights': ('as_written', *memory.RETENTION_MAPS),
  'cap': memory_rates.CAPS,
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
  # 'norm' is x + LayerNorm(M(x)), as TTT and Miras have; 'map' M(x) alone.
  output: str = 'plain'
  adaptive: tuple[str, ...] = ('k', 'v', 'inner_lr', 'retention')  # or 'q' too
  # Of keys and queries; 'elu' is 1 + elu(x), 'polynomial' Atlas'.
  features: str = 'l2'
  target: str = 'own'  # the memory's own output for the value; or 'value'
  chunk_size: int = 64  # tokens between anchors of the main memory
  chunk_size_others: int = 64  # the same of all other memories
  objective: str = 'dot'  # or 'l2', 'huber', 'l3'
  inner_lr: str = 'token'  # made for each token; or 'one'
  retention: str = 'token'  # the same; 'head', RetNet's constants; or 'none'
  erase: str = 'output'  # maps with the delta rule; or as in `memory.Rule`
  learns: str = 'output'  # maps that tokens write; or 'every_map'
  erase_from: str = 'previous'  # weights; or 'retained', as Gated DeltaNet does
  retain_to: str = 'initial'  # or 'zero'
  read: str = 'token'  # or 'chunk', as the paper prints
  momentum: bool = False  # Titans' trace, its rate a static projection
  weights: str = 'as_written'  # what is read; Miras: 'lq_norm', 'softmax' of it
  max_inner_lr: float = 2.0  # bound of the inner learning rate; 2 reflects
  # VisionHOPE's r: caps inner_lr at (1 - retention) / r.
  injection: float | None = None
  cap: str = 'soft'  # how; or 'hard', 'spectral'
  max_norm: float | None = 8.0  # bound on a map's departure from its start
  window: int | None = None  # tokens whose errors a step sums, as Atlas has
  step: str = 'gradient'  # Atlas: 'orthogonal', along the trace
  errors: str = 'propagated'  # DeltaTTT: 'local' to each map
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
    for name in memory_rates.ROLES:
      if name in self.adaptive and getattr(self, name) != 'token':
        raise ValueError(
          f'{name}={getattr(self, name)!r} is not made by a memory; take '
          f'{name!r} out of adaptive={self.adaptive}.'
        )
    if self.injection is not None and self.injection <= 0:
      raise ValueError(
        f'injection={self.injection} must be above 0, or None for no cap.'
      )
    if self.initial == 'zero' and self.kind != 'matrix':
      raise ValueError(
        f'a memory with kind={self.kind!r} and initial={self.initial!r} never '
        "changes; use 'learned'."
      )
    for name in ('main', 'others'):
      self.rule(name)  # raises on what the engine does not know
    self._check_extensions()

  def _check_extensions(self) -> None:
    """Checks what newer papers add; all of it is of the main memory alone."""
    is_set = {
      'window': self.window not in (None, 1),
      'step': self.step != 'gradient',
      'errors': self.errors != 'propagated',
    }
    for name in [name for name in is_set if is_set[name]]:
      if self.adaptive:
        raise ValueError(
          f'{name}={getattr(self, name)!r} is not defined for memories that '
          f'make adaptive={self.adaptive}; set adaptive to ().'
        )
    if not is_set['errors']:
      return
    if self.kind != 'mlp':
      raise ValueError(
        f'errors={self.errors!r} are of the maps of an MLP; set '
        f"kind={self.kind!r} to 'mlp'."
      )
    if self.hidden_dim not in (0, self.head_dim):
      raise ValueError(
        f'errors={self.errors!r} make the hidden layer learn the value: '
        f'hidden_dim={self.hidden_dim} must be head_dim={self.head_dim}.'
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

  def make(self, *, embed_dim: int, max_length: int, dtype: Any) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    del max_length
    return make_memory_mixer(self, embed_dim=embed_dim, dtype=dtype)

  def rule(self, name: str) -> memory.Rule:
    """The engine's rule for the 'main' memory or the 'others'."""
    is_main = name == 'main'
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
      window=self.window or 1 if is_main else 1,
      step=self.step if is_main else 'gradient',
      errors=self.errors if is_main else 'propagated',
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
      output_norm: Scale and bias of the outputs' norm, [(b,) h, d] each, with
        output 'norm'; None where the network is not applied.

    Returns:
      A `memory.Network`.
    """
    finish = {'finish': lambda x, y: y} if self.output == 'map' else {}
    if output_norm is not None:
      wide = jax.tree.map(lambda x: x[..., None, None, :], output_norm)
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
) -> base.Layer:
  """Makes the layer.

  Args:
    config: Its settings.
    embed_dim: Width e of inputs and outputs.
    dtype: Type of the projections; memories are float32 at least.

  Returns:
    A `Layer`.
  """
  c = config
  wide = jnp.promote_types(dtype, jnp.float32)
  sizes = memory_roles.sizes(c.adaptive)
  tables = {name: c.network(**size).table for name, size in sizes.items()}
  # Rates that are no memory are projections.
  rates = [r for r in memory_rates.made(c) if r not in c.adaptive]
  bias = {name: memory_rates.table(c, name) for name in tables}
  table = memory_table.make(c, embed_dim, tables, bias, rates)

  def first_memory(params):
    if 'memory' in params:
      return params['memory']
    zeros = lambda p: jnp.zeros(p.shape, wide)
    return parameters.map_params(zeros, tables)

  def init_state(params, batch_size):
    start = {
      name: memory.init_state(
        initial, batch_size, momentum=c.momentum, window=c.window or 1
      )
      for name, initial in first_memory(params).items()
    }
    conv = memory_features.init_state(params, batch_size, dtype)
    return MemoryMixerState(conv, start.get('others'), start['main'])

  def run(name, params, state, inputs, marks):
    def make(params, num_rows):
      bias, output_norm = _per_row(params, num_rows)
      network = c.network(**sizes[name], output_norm=output_norm.get(name))
      if name == 'main':
        return network, None
      return network, memory_roles.make_project(c, network, bias[name])

    initial = first_memory(params)[name]
    return memory_engine.run(
      make, params, c.rule(name), initial, state, inputs, marks, engine=c.engine
    )

  def apply(params, state, inputs, marks):
    start = MemoryMixerState(None, None, None) if state is None else state
    weights = lambda name: params[name].astype(dtype)
    made, conv = memory_features.apply(
      params,
      start.conv,
      inputs,
      marks,
      features=c.features,
      normalize_values=c.target == 'own',
      dtype=dtype,
    )
    raw = {}
    if rates:
      raw = jnp.einsum('bte,erh->rbht', inputs, weights('rates')).astype(wide)
      raw = dict(zip(rates, raw[..., None], strict=True))

    others, feed = None, memory_roles.to_feed(made, raw)
    if 'others' in sizes:
      result, others = run('others', params, start.others, (made, raw), marks)
      feed = result.feed
    bias, _ = _per_row(params, inputs.shape[0])
    feed = memory_rates.set_rates(c, bias['main'], feed)
    result, main = run('main', params, start.main, feed, marks)

    out = memory_out.apply(params, result.read, inputs)
    return out, MemoryMixerState(conv, others, main)

  return base.make_layer(table, init_state, apply)


def _per_row(params: Any, batch_size: int) -> tuple[Any, Any]:
  """Biases [b, h, 1, 1] and output norms [b, h, d], a copy per row.

  The scans' backward passes then sum over no rows.
  """
  per_row = lambda x: jnp.broadcast_to(x, (batch_size, *x.shape))
  bias = jax.tree.map(lambda x: per_row(x[:, None, None]), params['bias'])
  return bias, jax.tree.map(per_row, params.get('output_norm', {}))
