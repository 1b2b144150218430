r"""The Continuum Memory System: MLPs that learn at different clocks.

Each level is a pre-norm residual SwiGLU MLP, f_1 the fastest. They are
connected in one of three ways:

* 'sequential': x <- x + f_l(x) for one level after the other;
* 'independent': every level sees the chain's input and a learned weighted sum
  is added, x + \sum_l w_l f_l(x); with weights of 1, where they start, this is
  one MLP as wide as all levels together;
* 'nested': sequential, and a level that learns inside a sequence starts anew
  from its parameters at every update of the next slower one.

A Transformer's MLP is the chain of one level. On what clock a level's
parameters change is not this file's matter: see
`nested_learning.optimizers.multi_timescale` for training and
`nested_learning.levels.reader` for learning inside a sequence.

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 70-74, 97.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import re
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import norm
from nested_learning.memory import objectives

# Names are parts of parameters' paths and of metrics' names.
_NAME = re.compile(r'[A-Za-z][A-Za-z0-9_-]{0,63}')
LOCAL_OBJECTIVES = ('l2', 'dot')  # of `memory.objectives`


class LocalLoss(NamedTuple):
  """A loss of each level's own input and output.

  Attributes:
    objective: 'l2' or 'dot', see `apply_with_gradients`.
    names: Levels whose gradients are computed.
    target: [b, t, e], target of a level's output.
    counts: [b, t], weight of each token; 0 leaves it out.
  """

  objective: str
  names: tuple[str, ...]
  target: jax.Array
  counts: jax.Array


class StateAndGradients(NamedTuple):
  """State of a layer that was given a `LocalLoss`.

  Attributes:
    state: State of the layer without one.
    gradients: Gradients of the local losses, at the paths of the parameters of
      the levels that learn.
  """

  state: Any
  gradients: Any


@dataclasses.dataclass(frozen=True)
class LevelConfig:
  """One level of the chain."""

  name: str  # unique within a model; labels its parameters
  mlp_dim: int  # hidden width of its MLP
  # Tokens between updates in training; None is every step.
  train_every: int | None = None

  RENAMED: ClassVar = {'chunk_size': 'train_every'}

  def __post_init__(self):
    is_plain = isinstance(self.name, str) and _NAME.fullmatch(self.name)
    if not is_plain or self.name == 'base':
      raise errors.UserError(
        f'name={self.name!r} must be a letter followed by at most 63 '
        "letters, digits, '_' or '-', and not 'base', which labels parameters "
        'outside the chain.'
      )
    errors.check_field(self, 'mlp_dim', self.mlp_dim >= 1, 'at least 1')
    fine = self.train_every is None or self.train_every >= 1
    errors.check_field(
      self, 'train_every', fine, 'at least 1 token, or None for every step'
    )


@dataclasses.dataclass(frozen=True)
class ChainConfig:
  """How the levels are connected; the default is the paper's Figure 5."""

  # Eqs. 73, 74 and 72.
  connection: Literal['sequential', 'independent', 'nested'] = 'sequential'
  # The level that acts first; 'slowest_first' is eq. 70.
  order: Literal['fastest_first', 'slowest_first'] = 'fastest_first'

  def __post_init__(self):
    errors.check_choices(self)


def check(levels: Sequence[LevelConfig], chain: ChainConfig) -> None:
  """Refuses levels that do not make the chain.

  Args:
    levels: As in a model's config, listed fastest first.
    chain: How they are connected.

  Raises:
    errors.UserError: Two levels have one name, a slower level is listed before
      a faster one, or a nested chain has a clock that is not a multiple of the
      one before it.
  """
  names = [level.name for level in levels]
  for name in names:
    if names.count(name) > 1:
      raise errors.UserError(
        f'two levels are named {name!r}; give every level a name of its own.'
      )
  for faster, slower in itertools.pairwise(levels):
    check_pair(
      (faster.name, faster.train_every),
      (slower.name, slower.train_every),
      chain,
    )


def check_pair(
  faster: tuple[str, int | None],
  slower: tuple[str, int | None],
  chain: ChainConfig,
) -> None:
  """Refuses two neighbours of a chain; see `check`.

  Args:
    faster: Name and tokens between updates; None is every step.
    slower: Those of the level after it.
    chain: How they are connected.
  """
  (name, size), (next_name, next_size) = faster, slower
  if size is not None and (next_size is None or next_size < size):
    raise errors.UserError(
      f'level {name!r} (train_every={size}) is listed before {next_name!r} '
      f'(train_every={next_size}), which is faster; list levels fastest first '
      "(model.chain.order='slowest_first' lets the slowest act first)."
    )
  if chain.connection == 'nested' and size is not None and next_size % size:
    raise errors.UserError(
      f'level {next_name!r} has train_every={next_size}, no multiple of the '
      f'{size} of level {name!r} inside it; in a nested chain set it to '
      f'{next_size // size * size} or {(next_size // size + 1) * size}.'
    )


def table(levels: Sequence[LevelConfig], *, embed_dim: int) -> parameters.Table:
  """The parameters of the levels, one entry per level."""
  return {level.name: _level_table(level, embed_dim) for level in levels}


def mix_table(
  levels: Sequence[LevelConfig], chain: ChainConfig
) -> parameters.Table:
  """What a chain has beside its levels: 'mix' [levels], if independent."""
  if chain.connection != 'independent':
    return {}
  return {
    'mix': parameters.Param(
      (len(levels),), (None,), parameters.constant(1.0), decay=False
    )
  }


def apply(
  levels: Sequence[LevelConfig],
  params: Any,
  x: jax.Array,
  *,
  chain: ChainConfig = ChainConfig(),
  mix: jax.Array | None = None,
) -> jax.Array:
  """Passes x [b, t, e] through the chain.

  Args:
    levels: The levels, fastest first.
    params: Parameters of `table`.
    x: [b, t, e], its dtype is that of the arithmetic.
    chain: How they are connected.
    mix: [levels], the parameter of `mix_table` where levels are independent.

  Returns:
    [b, t, e].
  """
  mlp = lambda name, x: _mlp(params[name], x)
  return _connect(levels, mlp, x, chain=chain, mix=mix)


def apply_with_gradients(
  levels: Sequence[LevelConfig],
  params: Any,
  x: jax.Array,
  local_loss: LocalLoss,
  *,
  chain: ChainConfig = ChainConfig(),
  mix: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
  r"""Passes x through the chain; how its levels would learn a target by it.

  With a level's input x and output f(x), before it is added to the stream, and
  a target v of e numbers, it minimises over the tokens that count

  .. math::
    \frac{1}{2e} |f(x_t) - v_t|^2 \quad \text{('l2')}, \qquad
    -\frac{1}{e} \langle f(x_t), v_t \rangle \quad \text{('dot')}.

  Its gradient is made where the level is computed, and nothing is passed back
  to what is before it. 'l2' makes a level say the target instead of what it
  said before; 'dot' pulls it there for as long as it lasts. So they are for
  models that were trained through such steps: the checkpoint of
  `levels.InnerConfig`'s numbers, which was not, goes from 2.54 nats per byte to
  2.64 with 'l2' at a rate of 0.1, and to 4.17 with 'dot'.

  The papers leave open what a level's own key and value are (NL sections 7.1
  and 7.3). Here the key is the level's input, and the target is the caller's;
  `models.LanguageHead` takes the next token's embedding, since what comes next
  is what the chain is asked for.

  Args:
    levels: As for `apply`.
    params: As for `apply`.
    x: [b, t, e].
    local_loss: The levels, their objective and its target.
    chain: As for `apply`.
    mix: As for `apply`.

  Returns:
    What `apply` gives, and the gradients: from each name of `local_loss` to a
    tree like the level's parameters, summed over rows and tokens.
  """
  gradients = {}
  objective = objectives.OBJECTIVES[local_loss.objective]

  def mlp(name, x):
    if name not in local_loss.names:
      return _mlp(params[name], x)

    def loss(weights):
      output = _mlp(weights, x)
      wide = output.astype(jnp.promote_types(output.dtype, jnp.float32))
      values = objective(wide, local_loss.target)  # [b, t]
      return jnp.sum(local_loss.counts * values) / x.shape[-1], output

    gradients[name], output = jax.grad(loss, has_aux=True)(params[name])
    return output

  return _connect(levels, mlp, x, chain=chain, mix=mix), gradients


def _connect(
  levels: Sequence[LevelConfig],
  mlp: Callable[[str, jax.Array], jax.Array],
  x: jax.Array,
  *,
  chain: ChainConfig,
  mix: jax.Array | None,
) -> jax.Array:
  """The chain, whose MLPs `mlp(name, x)` computes."""
  if chain.connection == 'independent':
    outputs = [mlp(level.name, x) for level in levels]
    weights = mix.astype(x.dtype)
    return x + sum(weights[i] * y for i, y in enumerate(outputs))
  first = 1 if chain.order == 'fastest_first' else -1
  for level in levels[::first]:
    x = x + mlp(level.name, x)
  return x


def _mlp(params: Any, x: jax.Array) -> jax.Array:
  weights = jax.tree.map(lambda w: w.astype(x.dtype), params)
  normed = norm.rms_norm(params['norm'], x)
  gate = jnp.einsum('bte,ef->btf', normed, weights['gate'])
  up = jnp.einsum('bte,ef->btf', normed, weights['up'])
  return _gated_projection(gate, up, weights['down'])


@base.recomputed
def _gated_projection(gate, up, down):
  return jnp.einsum('btf,fe->bte', jax.nn.silu(gate) * up, down)


def _level_table(level: LevelConfig, embed_dim: int) -> parameters.Table:
  wide = lambda: parameters.Param(
    (embed_dim, level.mlp_dim),
    ('embed', 'mlp'),
    parameters.fan_in(embed_dim),
    decay=True,
  )
  return {
    'norm': norm.scale_param(embed_dim),
    'gate': wide(),
    'up': wide(),
    'down': parameters.Param(
      (level.mlp_dim, embed_dim),
      ('mlp', 'embed'),
      parameters.fan_in(level.mlp_dim),
      decay=True,
    ),
  }
