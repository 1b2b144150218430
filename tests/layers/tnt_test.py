"""TNT against its equations in a NumPy loop, and as a stream."""

import dataclasses
import itertools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from nested_learning import parameters
from nested_learning.layers import memory_projections
from tests import compiling

_ROWS, _LENGTH, _EMBED, _HEADS, _DIM = 2, 24, 6, 2, 3
_SIZES = {'embed_dim': _EMBED, 'dtype': jnp.float64}


def make_config(**settings):
  size = models.zoo.Size(1, _HEADS * _DIM, _HEADS, 4)
  zoo = models.zoo.FAMILIES['tnt'].mixer(size)
  memory = dataclasses.replace(zoo.memory, chunk_size=8, max_inner_lr=0.5)
  settings = {
    'locals': (
      layers.LocalConfig(chunk_size=2, shard_size=4),
      layers.LocalConfig(chunk_size=3, shard_size=12),
    ),
    'max_global_lr': 0.05,
    **settings,
  }
  return layers.TntConfig(memory, **settings)


def make(config):
  layer = config.make(**_SIZES)
  params = parameters.init(jax.random.key(0), layer.table, jnp.float64)
  # Random initial memories, of the size of their updates.
  keys = iter(jax.random.split(jax.random.key(1), 100))
  params['memory'] = jax.tree.map(
    lambda x: 0.7 * jax.random.normal(next(keys), x.shape), params['memory']
  )
  return layer, params


def jit(apply):
  return compiling.jit(
    lambda params, state, x, *marks: apply(
      params, state, x, layers.TokenInfo(*marks)
    )
  )


def silu(x):
  return x / (1.0 + np.exp(-x))


class Memory:
  """M(x) = x + W1 silu(W2 x), written by descent on 1/2 |M(k) - v|^2."""

  def __init__(self, params, head):
    self.initial = {
      'in': np.asarray(params['in'])[head],
      'out': np.asarray(params['vector'])[head, 0],
    }
    self.now = self.anchor = dict(self.initial)

  @staticmethod
  def read(weights, x):
    return x + weights['out'] @ silu(weights['in'] @ x)

  def write(self, key, value, rate):
    """Steps from the current weights, with the error of the anchor."""
    w = self.anchor
    hidden = w['in'] @ key
    error = self.read(w, key) - value
    gate = 1.0 / (1.0 + np.exp(-hidden))
    slope = gate * (1.0 + hidden * (1.0 - gate))
    back = slope * (w['out'].T @ error)
    self.now = {
      'in': self.now['in'] - rate * np.outer(back, key),
      'out': self.now['out'] - rate * np.outer(error, silu(hidden)),
    }


def run_by_hand(config, params, x, reset):
  """Computes eqs. 5-7 of the paper in loops over rows, heads and tokens."""
  projected, _ = memory_projections.project(
    params,
    None,
    x,
    layers.TokenInfo(reset),
    features='l2',
    normalize_values=False,
    rates=config.memory.rates,
    dtype=jnp.float64,
  )
  made = {k: np.asarray(x) for k, x in projected.tokens.items()}
  raw = np.einsum('bte,erh->brht', x, params['rates'])[:, 0]
  read = np.zeros((*x.shape[:2], _HEADS, _DIM))
  for b in range(len(x)):
    for h in range(_HEADS):
      bounds = {'global': config.max_global_lr}
      spans = {'global': (config.memory.chunk_size, None)}
      for i, local in enumerate(config.locals):
        bounds[f'local_{i}'] = config.memory.max_inner_lr
        spans[f'local_{i}'] = local.chunk_size, local.shard_size
      memories = {name: Memory(params['memory'][name], h) for name in bounds}
      seen = dict.fromkeys(bounds, 0.0)  # P_t of each memory's shard
      for t in range(x.shape[1]):
        key, value, query = (made[name][b, h, t] for name in 'kvq')
        for name, memory in memories.items():
          chunk, shard = spans[name]
          if reset[b, t] or (shard and t % shard == 0):
            memory.now = memory.anchor = dict(memory.initial)
            seen[name] = np.zeros((_DIM, _DIM))
          if t % chunk == 0:
            memory.anchor = dict(memory.now)
          logit = raw[b, h, t] + float(params['bias'][name]['inner_lr'][h])
          rate = bounds[name] / (1.0 + np.exp(-logit))
          memory.write(key, value, rate)
          if name == 'global':
            read[b, t, h] += memory.read(memory.anchor, query)
            continue
          # |k|^2 with the epsilon of the layer's normalisation.
          seen[name] = seen[name] + np.outer(key, key) / (key @ key + 1e-6)
          asked = query
          if config.query == 'projected':
            asked = seen[name] @ query
          read[b, t, h] += memory.read(memory.now, asked)
  mean_square = np.mean(read**2, axis=-1, keepdims=True)
  read = read / np.sqrt(mean_square + 1e-6) * np.asarray(params['norm'])
  gate = np.einsum('bte,ehd->bthd', x, params['gate'])
  return np.einsum('bthd,hde->bte', read * silu(gate), params['out'])


class TntTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.enable_x64(True))
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(_ROWS, _LENGTH, _EMBED))
    self.reset = rng.uniform(size=(_ROWS, _LENGTH)) < 0.1
    self.mask = rng.uniform(size=(_ROWS, _LENGTH)) < 0.7

  @parameterized.parameters(
    # All shards at once; or, where the last is cut off, one after the other.
    (_LENGTH, 'projected'),
    (_LENGTH - 1, 'plain'),
  )
  def test_equals_the_papers_equations(self, num_tokens, query):
    config = make_config(query=query)
    layer, params = make(config)
    x, reset = self.x[:, :num_tokens], self.reset[:, :num_tokens]
    apply = jit(layer.apply)
    for marked in (reset, np.zeros_like(reset)):
      out, _ = apply(params, None, x, marked, None)
      expected = run_by_hand(config, params, x, marked)
      np.testing.assert_allclose(out, expected, atol=1e-10)

  def test_stream_in_pieces_with_gaps(self):
    config = make_config()
    layer, params = make(config)
    apply = jit(layer.apply)
    state = layer.init_state(params, _ROWS)
    outputs, cuts = [], (0, 5, 6, 11, _LENGTH)
    for start, stop in itertools.pairwise(cuts):
      piece = lambda x, i=start, j=stop: x[:, i:j]
      tokens = piece(self.x), piece(self.reset), piece(self.mask)
      out, state = apply(params, state, *tokens)
      outputs.append(out)
    out = np.concatenate(outputs, axis=1)
    for row in range(_ROWS):
      there = np.flatnonzero(self.mask[row])
      expected = run_by_hand(
        config,
        params,
        self.x[row : row + 1, there],
        self.reset[row : row + 1, there],
      )
      np.testing.assert_allclose(out[row, there], expected[0], atol=1e-10)
      # Shards of 4 and of 12 tokens begin together every 12.
      self.assertEqual(state.position[row], len(there) % 12)

  def test_second_stage_has_the_parameters_of_the_first(self):
    first = make_config()
    finer = tuple(
      dataclasses.replace(local, chunk_size=1) for local in first.locals
    )
    tables = [
      config.make(**_SIZES).table
      for config in (first, dataclasses.replace(first, locals=finer))
    ]
    shapes = [
      jax.tree.map(lambda x: x.shape, parameters.abstract(table))
      for table in tables
    ]
    self.assertEqual(*shapes)

  @parameterized.parameters(
    ({'chunk_size': 4, 'shard_size': 10}, 'shard_size=10 .* chunk_size=4'),
    ({'shard_size': 0}, 'shard_size=0 must be at least 1'),
    ({'chunk_size': 0}, 'chunk_size=0 must be at least 1'),
    ({'chunk_size': -2}, 'chunk_size=-2 must be at least 1'),
  )
  def test_bad_sizes_of_a_local_memory(self, sizes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      layers.LocalConfig(**sizes)

  @parameterized.parameters(
    ({'query': 'keys'}, "query='keys'"),
    ({'max_global_lr': -1.0}, 'max_global_lr=-1.0 must be a finite number'),
    ({'memory': layers.MemoryMixerConfig(_HEADS, _DIM)}, r'set it to \(\)'),
  )
  def test_bad_settings_name_the_value(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(make_config(), **changes)
