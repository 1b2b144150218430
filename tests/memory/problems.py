"""A small self-modifying memory of two heads with random tokens in float64.

The memory makes its own keys and values (vector roles 0 and 1), inner learning
rates and retentions (scalar roles 0 and 1); queries read role 0.
"""

from collections.abc import Mapping, Sequence
import itertools
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import memory
from nested_learning import parameters
from nested_learning.layers import norm

BATCH, HEADS, DIM, HIDDEN = 2, 2, 5, 4

# Settings of the engine and the tested values of each.
FACTORS: Mapping[str, Sequence[Any]] = {
  'kind': ('mlp', 'matrix'),
  'erase': ('none', 'input', 'output', 'every_map'),
  'learns': ('every_map', 'output'),
  'erase_from': ('previous', 'retained'),
  'retain_to': ('zero', 'initial'),
  'momentum': (False, True),
  'objective': ('l2', 'dot'),
  'read': ('token', 'chunk'),
  'target': ('own', 'value'),
  'max_norm': (None, 0.5),
  'chunk_size': (1, 7, 16, 64),
  'marks': ('none', 'reset', 'reset_and_mask'),
  'feed': ('made', 'given'),
}


class Problem(NamedTuple):
  """A network, its initial memory, and the tokens it reads."""

  network: memory.Network
  project: Any
  initial: Any
  inputs: dict[str, jax.Array]
  reset: jax.Array
  mask: jax.Array


def make_problem(
  kind: str, *, num_tokens: int = 33, momentum: bool = False, seed: int = 0
) -> Problem:
  """Draws a problem with a border and a gap at about every seventh token."""
  rng = np.random.default_rng(seed)
  network = make_network(kind)
  shape = (BATCH, HEADS, num_tokens)
  inputs = {name: rng.normal(size=(*shape, DIM)) for name in ('x', 'q')}
  if momentum:
    inputs['momentum'] = rng.uniform(size=(*shape, 1))
  initial = parameters.map_params(
    lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape)), network.table
  )
  return Problem(
    network=network,
    project=make_project(network),
    initial=initial,
    inputs=jax.tree.map(jnp.asarray, inputs),
    reset=jnp.asarray(rng.uniform(size=(BATCH, num_tokens)) < 0.15),
    mask=jnp.asarray(rng.uniform(size=(BATCH, num_tokens)) > 0.15),
  )


def make_network(kind: str, activation=jax.nn.silu) -> memory.Network:
  """Makes a network of two vector and two scalar roles."""
  sizes = {'num_heads': HEADS, 'dim': DIM, 'num_vectors': 2, 'num_scalars': 2}
  if kind == 'matrix':
    return memory.make_matrix(**sizes)
  return memory.make_mlp(**sizes, hidden_dim=HIDDEN, activation=activation)


def make_project(network: memory.Network, rate=jax.nn.sigmoid):
  """Makes `project`; `rate` maps raw outputs into (0, 1)."""

  def project(weights, inputs):
    made = network.read(weights, inputs['x'], (0, 1), (0, 2))
    value = network.read(weights, inputs['x'], (1, 2), (0, 0))
    return memory.WriteInputs(
      key=norm.l2_normalize(made.vectors[..., 0, :, :]),
      value=norm.l2_normalize(value.vectors[..., 0, :, :]),
      inner_lr=0.5 * rate(made.scalars[..., 0, :, :] - 1.0),
      retention=rate(made.scalars[..., 1, :, :] + 2.0),
      momentum=inputs.get('momentum'),
      query=inputs['q'],
    )

  return project


def make_rule(kind: str, settings: Mapping[str, Any]) -> memory.Rule:
  """Makes a rule with some of `FACTORS` set and targets that fit."""
  others = ('kind', 'marks', 'feed')
  settings = {k: v for k, v in settings.items() if k not in others}
  settings['objective'] = memory.OBJECTIVES[settings.get('objective', 'l2')]
  if settings.get('target') == 'value':
    settings['objective'] = vectors_only(settings['objective'])
  return memory.Rule(**settings, normalize_target=norm.l2_normalize)


def comparable(state: memory.State) -> memory.State:
  """Returns the state without anchors that the next token replaces."""

  def leaf(weights, anchor):
    starts = (state.offset == 0).reshape(-1, *[1] * (anchor.ndim - 1))
    return jnp.where(starts, weights, anchor)

  return state._replace(anchor=jax.tree.map(leaf, state.memory, state.anchor))


def vectors_only(objective):
  """Restricts an objective to vector roles; scalars have no target."""

  def restricted(prediction, target):
    if prediction.shape[-1] != target.shape[-1]:
      return jnp.zeros(prediction.shape[:-1], prediction.dtype)
    return objective(prediction, target)

  return restricted


def covering(seed: int = 0) -> list[dict[str, Any]]:
  """Returns settings in which every pair of values of two factors occurs."""
  rng = random.Random(seed)
  names = list(FACTORS)
  missing = set()
  for a, b in itertools.combinations(names, 2):
    missing |= {(a, x, b, y) for x in FACTORS[a] for y in FACTORS[b]}

  def covers(row):
    pairs = itertools.combinations(names, 2)
    return missing & {(a, row[a], b, row[b]) for a, b in pairs}

  rows = []
  while missing:
    candidates = []
    for _ in range(200):
      row = {name: rng.choice(FACTORS[name]) for name in names}
      a, x, b, y = min(missing, key=str)
      candidates.append({**row, a: x, b: y})
    best = max(candidates, key=lambda row: len(covers(row)))
    missing -= covers(best)
    rows.append(best)
  return rows
