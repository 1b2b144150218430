"""Capacity schedules against their equations, written out token by token."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import memory
from tests import compiling

_DIM, _HIDDEN, _TOKENS, _CHUNK = 6, 9, 19, 4
_BLOCKS, _LENGTH = 3, 9  # a block every three tokens
_BORDER = 14  # in the middle of a chunk
_RULE = memory.Rule(
  chunk_size=_CHUNK,
  erase='none',
  target='value',
  retain_to='zero',
  momentum=True,
)


def proteus(read, masks, initial, tokens):
  """Bayat et al., arXiv:2608.16844: k is that of a chunk's first token."""
  weights = anchor = initial
  surprise = jax.tree.map(jnp.zeros_like, initial)
  position, reads = 0, []
  for t in range(_TOKENS):
    token = {name: x[t] for name, x in tokens.items()}
    if t == _BORDER:
      weights = anchor = initial
      surprise = jax.tree.map(jnp.zeros_like, initial)
      position, begin = 0, 0
    if t % _CHUNK == 0:
      anchor, begin = weights, position
    mask = masks(min(_BLOCKS, 1 + begin // (_LENGTH // _BLOCKS)))
    weights, surprise, out = _write(
      read, mask, weights, anchor, surprise, token
    )
    reads.append(out)
    position += 1
  return jnp.stack(reads)


def _write(read, mask, weights, anchor, surprise, token):
  """Titans' step of the blocks that the mask leaves."""
  gated = lambda w, x: read(jax.tree.map(jnp.multiply, w, mask), x)
  loss = lambda w: 0.5 * jnp.sum((gated(w, token['k']) - token['v']) ** 2)
  surprise = jax.tree.map(
    lambda s, g: token['momentum'] * s + token['inner_lr'] * g,
    surprise,
    jax.grad(loss)(anchor),
  )
  weights = jax.tree.map(
    lambda w, s, m: jnp.where(m, token['retention'] * w - s, w),
    weights,
    surprise,
    mask,
  )
  return weights, surprise, gated(weights, token['q'])


def _mlp(w, x):
  return x + w['vector'] @ jax.nn.silu(w['in'] @ x)


def _mlp_masks(blocks):
  active = jnp.arange(_HIDDEN) < blocks * _HIDDEN // _BLOCKS
  return {
    'in': jnp.broadcast_to(active[:, None], (_HIDDEN, _DIM)),
    'vector': jnp.broadcast_to(active, (_DIM, _HIDDEN)),
  }


def _matrix_masks(blocks):
  active = jnp.arange(_DIM) < blocks * _DIM // _BLOCKS
  return {'in': jnp.broadcast_to(active, (_DIM, _DIM))}


_CASES = {
  'mlp': (
    memory.make_mlp(
      num_heads=1,
      dim=_DIM,
      num_vectors=1,
      hidden_dim=_HIDDEN,
      activation=jax.nn.silu,
    ),
    _mlp,
    _mlp_masks,
  ),
  'matrix': (
    memory.make_matrix(num_heads=1, dim=_DIM, num_vectors=1),
    lambda w, x: w['in'] @ x,
    _matrix_masks,
  ),
}


class CapacityTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(*_CASES)
  def test_equals_the_paper(self, kind):
    network, read, masks = _CASES[kind]
    rng = np.random.default_rng(0)
    initial = jax.tree.map(
      lambda m: jnp.asarray(0.5 * rng.normal(size=m.shape)), masks(1)
    )
    tokens = {name: rng.normal(size=(_TOKENS, _DIM)) for name in 'kvq'}
    tokens['k'] /= np.linalg.norm(tokens['k'], axis=-1, keepdims=True)
    for name, least in (('inner_lr', 0.0), ('retention', 0.8), ('momentum', 0)):
      tokens[name] = rng.uniform(least, 1.0, size=(_TOKENS, 1))
    tokens['inner_lr'] *= 0.2
    tokens = jax.tree.map(jnp.asarray, tokens)
    reset = (jnp.arange(_TOKENS) == _BORDER)[None]
    weights = jnp.asarray(rng.normal(size=(_TOKENS, _DIM)))
    stacked = network.table

    def units(begin):
      return memory.active_units(
        begin,
        num_units=network.num_units,
        num_blocks=_BLOCKS,
        num_tokens=_LENGTH,
      )

    def actual(engine, initial, tokens):
      initial = {
        name: initial[name].reshape(param.shape)
        for name, param in stacked.items()
      }
      start = memory.init_state(initial, 1, momentum=True)
      begin, _ = memory.chunk_positions(
        start.offset,
        start.offset,
        _CHUNK,
        num_tokens=_TOKENS,
        reset=reset,
        mask=None,
      )
      row = lambda name: tokens[name][None, None]
      feed = memory.Feed(
        key=row('k'),
        value=row('v'),
        query=row('q'),
        inner_lr=row('inner_lr'),
        retention=row('retention'),
        momentum=row('momentum'),
        active=units(begin)[:, None, :, None],
      )
      result, _ = engine(
        network, _RULE, initial, start, feed, project=None, reset=reset
      )
      return result.read[0, 0]

    def value_and_grad(function):
      def loss(initial, tokens):
        reads = function(initial, tokens)
        return jnp.sum(weights * reads), reads

      return jax.grad(loss, argnums=(0, 1), has_aux=True)

    @compiling.jit
    def run(initial, tokens):
      loop = lambda *values: actual(memory.token_loop, *values)
      scan = lambda *values: actual(memory.chunk_scan, *values)
      paper = lambda *values: proteus(read, masks, *values)
      return (
        value_and_grad(paper)(initial, tokens),
        value_and_grad(scan)(initial, tokens),
        loop(initial, tokens),
      )

    (expected_grads, expected), (grads, reads), by_token = run(initial, tokens)
    np.testing.assert_allclose(reads, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(by_token, expected, rtol=1e-9, atol=1e-9)
    self.assertGreater(np.abs(expected).max(), 0.1)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max()
      ),
      grads,
      expected_grads,
    )

  def test_positions_of_any_split(self):
    rng = np.random.default_rng(1)
    reset = jnp.asarray(rng.uniform(size=(2, _TOKENS)) < 0.1)
    begin = lambda position, offset, mask: memory.chunk_positions(
      position, offset, _CHUNK, num_tokens=_TOKENS, reset=reset, mask=mask
    )
    zero = jnp.zeros((2,), jnp.int32)
    whole, last = begin(zero, zero, None)
    call = np.sort(rng.integers(4, size=(2, _TOKENS)), axis=1)
    position, offset, total = zero, zero, 0
    for i in range(4):
      mask = jnp.asarray(call == i)
      part, position = begin(position, offset, mask)
      offset = (offset + jnp.sum(mask, axis=1)) % _CHUNK
      total += np.where(mask, part, 0)
    np.testing.assert_array_equal(total, whole)
    np.testing.assert_array_equal(position, last)
    self.assertGreater(np.max(whole), _CHUNK)

  def test_units_of_the_schedule(self):
    units = lambda position: memory.active_units(
      position, num_units=9, num_blocks=3, num_tokens=18
    )
    np.testing.assert_array_equal(
      units(jnp.array([0, 5, 6, 11, 12, 17, 18, 1000])),
      [3, 3, 6, 6, 9, 9, 9, 9],
    )


if __name__ == '__main__':
  absltest.main()
