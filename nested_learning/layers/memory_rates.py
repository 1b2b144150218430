r"""The rates at which the memories of a mixer write: biases, bounds and caps.

A rate is a sigmoid of what a memory or a projection gives for the token, with a
learned bias per head; `inner_lr` is bounded by a constant. It may also be
capped by what retention lets go of, so that a token adds at most a fixed
multiple of what it takes away:

.. math::
   cap_t = (1 - retention_t) / injection, \qquad
   inner\_lr_t \leftarrow cap_t (1 - e^{-inner\_lr_t / cap_t})

or hard, the smaller of the two; or softly and no larger than retention too, so
that for keys of norm one the delta rule turns no direction round ('spectral').

References:
  VisionHOPE, arXiv:2609.33325, 2026 (the stability-matched step; its r may
  differ between tokens, here it is one constant).
"""

from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import memory
from nested_learning import parameters

ROLES = ('inner_lr', 'retention')
# Where inner_lr starts, as a logit: the other memories move slowly at first, so
# that a key means the same when it is written and when it is read.
_INNER_LR_BIAS = {'main': -1.0, 'others': -4.0}
# What a token lets memories forget at first, from the first head to the last.
# In the first heads the others are soon back at their start, so that their
# drift has an end, which rows of training reach: a value written after a
# thousand tokens is then made as one of the first hundred is.
_FORGOTTEN = {'main': (0.02, 0.001), 'others': (0.2, 0.001)}
_SMALLEST_CAP = 1e-9  # under a quotient
CAPS = ('soft', 'hard', 'spectral')


def made(config: Any) -> list[str]:
  """The rates that a `MemoryMixerConfig` has made for each token."""
  rates = [role for role in ROLES if getattr(config, role) == 'token']
  rates += ['momentum'] if config.momentum else []
  rates += ['weight'] if config.step == 'orthogonal' else []
  return rates + (['hidden_lr'] if config.errors != 'propagated' else [])


def table(config: Any, name: str) -> parameters.Table:
  """The biases of the rates that are made, one per head.

  Args:
    config: A `MemoryMixerConfig`.
    name: Of the memories, 'main' or 'others'.

  Returns:
    A table with a [h] per rate.
  """
  heads = config.num_heads
  forgotten = lambda: jnp.geomspace(*_FORGOTTEN[name], heads)
  inits = {
    'inner_lr': parameters.constant(_INNER_LR_BIAS[name]),
    'retention': parameters.values(lambda: _logits(forgotten())),
    'momentum': parameters.constant(0.0),
    'weight': parameters.constant(0.0),
    'hidden_lr': parameters.constant(_INNER_LR_BIAS[name]),
  }
  return {
    role: parameters.Param((heads,), ('heads',), inits[role], decay=False)
    for role in made(config)
  }


def set_rates(
  config: Any, bias: dict[str, jax.Array], feed: memory.Feed
) -> memory.Feed:
  """The feed with the rates at which one group of memories writes.

  Args:
    config: A `MemoryMixerConfig`.
    bias: Of `table`, each [b, h, 1, 1].
    feed: Its `extra` has the raw number of each rate, [b, h, t, 1].

  Returns:
    A feed with rates.
  """

  def rate(role):
    return jax.nn.sigmoid(feed.extra[role] + bias[role])

  one = jnp.ones((*feed.key.shape[:3], 1), feed.key.dtype)
  match config.retention:
    case 'token':
      retention = rate('retention')
    case 'head':  # Sun et al., RetNet, arXiv:2307.08621, 2023, eq. 8
      kept = 1.0 - 2.0 ** (-5.0 - jnp.arange(config.num_heads))
      retention = one * kept[:, None, None].astype(one.dtype)
    case 'none':
      retention = one
  inner_lr = one
  if config.inner_lr == 'token':
    inner_lr = config.max_inner_lr * rate('inner_lr')
  if config.injection is not None:
    inner_lr = cap_step(
      inner_lr, retention, injection=config.injection, cap=config.cap
    )
  others = {r: rate(r) for r in made(config) if r not in ROLES}
  if 'hidden_lr' in others:
    others['hidden_lr'] *= config.max_inner_lr
  return feed._replace(inner_lr=inner_lr, retention=retention, **others)


def cap_step(
  inner_lr: jax.Array,
  retention: jax.Array,
  *,
  injection: float,
  cap: str = 'soft',
) -> jax.Array:
  """Caps inner learning rates at (1 - retention) / injection.

  Args:
    inner_lr: >= 0, of any shape.
    retention: In [0, 1], of the same shape.
    injection: How much is taken away for what is added; VisionHOPE's r.
    cap: One of `CAPS`.

  Returns:
    An array like inner_lr: above neither it nor the cap, and near it where the
    cap is far.
  """
  bound = (1.0 - retention) / injection
  if cap == 'hard':
    return jnp.minimum(inner_lr, bound)
  soft = bound * -jnp.expm1(-inner_lr / jnp.maximum(bound, _SMALLEST_CAP))
  return jnp.minimum(soft, retention) if cap == 'spectral' else soft


def _logits(forgotten: jax.Array) -> jax.Array:
  """The logit of 1 - forgotten."""
  return jnp.log1p(-forgotten) - jnp.log(forgotten)
