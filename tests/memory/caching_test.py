"""Memory Caching against its equations, written out token by token."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import memory
from tests import compiling

_DIM, _TOKENS, _CHUNK, _SEGMENT, _KEPT = 4, 29, 3, 6, 2
_BORDER = 15  # in the middle of a segment, where two are kept
_RULE = memory.Rule(
  chunk_size=_CHUNK,
  erase='input',
  objective=memory.OBJECTIVES['dot'],
  target='value',
  retain_to='zero',
)


def gated_residual_memory(initial, tokens):
  """Behrouz et al., arXiv:2602.24281, section 3, on top of a delta rule."""
  weights, kept, keys, reads = initial, [], [], []
  for t in range(_TOKENS):
    k, v, q, u = (tokens[name][t] for name in 'kvqu')
    if t == _BORDER:
      weights, kept, keys = initial, [], []
    weights = weights + tokens['inner_lr'][t] * jnp.outer(v - weights @ k, k)
    keys.append(k)
    seen = [*kept, (weights, sum(keys) / len(keys))]
    gates = jax.nn.softmax(jnp.stack([u @ mean for _, mean in seen]))
    reads.append(
      sum(g * (m @ q) for g, (m, _) in zip(gates, seen, strict=True))
    )
    if (t + 1) % _SEGMENT == 0:
      kept, keys = seen[-_KEPT:], []
  return jnp.stack(reads)


class CachingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    rng = np.random.default_rng(0)
    tokens = {name: rng.normal(size=(_TOKENS, _DIM)) for name in 'kvqu'}
    tokens['k'] /= np.linalg.norm(tokens['k'], axis=-1, keepdims=True)
    tokens['u'] *= 3.0  # so that gates differ
    tokens['inner_lr'] = rng.uniform(size=(_TOKENS, 1))
    self.tokens = jax.tree.map(jnp.asarray, tokens)
    self.initial = jnp.asarray(rng.normal(size=(_DIM, _DIM)))
    self.network = memory.make_matrix(num_heads=1, dim=_DIM, num_vectors=1)
    self.reset = (jnp.arange(_TOKENS) == _BORDER)[None]

  def scan(self, initial, tokens, start=None, *, reset, mask=None, write=True):
    """Reads of rows that all have these tokens, and what is carried."""
    num_rows = reset.shape[0]
    initial = {'in': initial[None]}
    row = lambda x: jnp.broadcast_to(x, (num_rows, 1, *x.shape))
    feed = memory.Feed(
      key=row(tokens['k']),
      value=row(tokens['v']),
      query=row(tokens['q']),
      inner_lr=row(tokens['inner_lr']),
      retention=row(jnp.ones_like(tokens['inner_lr'])),
    )
    is_start = start is None
    if is_start:
      start = (
        memory.init_state(initial, num_rows),
        memory.init_cache(initial, num_rows, num_segments=_KEPT),
      )

    def call(state, feed, reset, mask):
      engine, whole = memory.chunk_scan, {'starts_chunk': mask is None}
      if feed.key.shape[2] == 1:
        engine, whole = memory.token_loop, {}
      return engine(
        self.network,
        _RULE,
        initial,
        state,
        feed,
        project=None,
        reset=reset,
        mask=mask,
        write=write,
        **whole,
      )

    read, *after = memory.scan_segments(
      call,
      self.network,
      _RULE,
      *start,
      feed,
      row(tokens['u']),
      segment_size=_SEGMENT,
      is_start=is_start,
      reset=reset,
      mask=mask,
      write=write,
    )
    return read[:, 0], tuple(after)

  def test_equals_the_paper(self):
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=(_TOKENS, _DIM)))

    def loss(function):
      def total(initial, tokens):
        reads = function(initial, tokens)
        return jnp.sum(weights * reads), reads

      return jax.grad(total, argnums=(0, 1), has_aux=True)

    def actual(initial, tokens):
      return self.scan(initial, tokens, reset=self.reset)[0][0]

    @compiling.jit
    def run(initial, tokens):
      return (
        loss(gated_residual_memory)(initial, tokens),
        loss(actual)(initial, tokens),
      )

    (expected_grads, expected), (grads, reads) = run(self.initial, self.tokens)
    np.testing.assert_allclose(reads, expected, rtol=1e-9, atol=1e-9)
    self.assertGreater(np.abs(expected).max(), 0.1)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      grads,
      expected_grads,
    )
    for grad in jax.tree.leaves(grads):
      self.assertGreater(np.abs(grad).max(), 1e-3)

  def test_any_split_and_token_by_token(self):
    reset = jnp.tile(self.reset, (2, 1))
    call = compiling.jit(
      lambda start, reset, mask: self.scan(
        self.initial, self.tokens, start, reset=reset, mask=mask
      )
    )
    start = (
      memory.init_state({'in': self.initial[None]}, 2),
      memory.init_cache({'in': self.initial[None]}, 2, num_segments=_KEPT),
    )
    there = jnp.ones((2, _TOKENS), bool)
    whole, last = call(start, reset, there)
    expected = compiling.jit(gated_residual_memory)(self.initial, self.tokens)
    np.testing.assert_allclose(whole[1], expected, rtol=1e-9, atol=1e-9)
    close = lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-9)
    rng = np.random.default_rng(2)
    for num_calls in (2, 5):
      part = np.sort(rng.integers(num_calls, size=(2, _TOKENS)), axis=1)
      state, total = start, 0.0
      for i in range(num_calls):
        read, state = call(state, reset, jnp.asarray(part == i))
        total += np.where((part == i)[..., None], read, 0.0)
      close(total, whole)
      jax.tree.map(close, self.comparable(state), self.comparable(last))

    token = compiling.jit(
      lambda start, tokens, reset: self.scan(
        self.initial, tokens, start, reset=reset
      )
    )
    state, reads = start, []
    for t in range(_TOKENS):
      one = jax.tree.map(lambda x, t=t: x[t : t + 1], self.tokens)
      read, state = token(state, one, reset[:, t : t + 1])
      reads.append(read)
    close(np.concatenate(reads, axis=1), whole)
    jax.tree.map(close, self.comparable(state), self.comparable(last))

    with self.subTest('padding changes no bit'):
      _, after = call(last, reset, jnp.zeros((2, _TOKENS), bool))
      jax.tree.map(
        np.testing.assert_array_equal,
        self.comparable(after),
        self.comparable(last),
      )

  def comparable(self, state):
    """The state without anchors, and without what is not of the document."""
    own, cache = state
    exists = jnp.arange(_KEPT) >= _KEPT - cache.count[:, None]
    keep = lambda x: jnp.where(
      exists.reshape(2, 1, _KEPT, *[1] * (x.ndim - 3)), x, 0.0
    )
    cache = cache._replace(
      memory=jax.tree.map(keep, cache.memory), mean=keep(cache.mean)
    )
    return own._replace(anchor=None), cache

  def test_writes_off_leave_the_cache(self):
    quiet = jnp.zeros((1, _TOKENS), bool)
    there = jnp.ones((1, _TOKENS), bool)

    @compiling.jit
    def run():
      _, state = self.scan(self.initial, self.tokens, reset=quiet)
      _, after = self.scan(
        self.initial, self.tokens, state, reset=quiet, mask=there, write=False
      )
      return state, after

    (_, before), (_, after) = run()
    for name in ('memory', 'mean', 'count'):
      jax.tree.map(
        np.testing.assert_array_equal,
        getattr(after, name),
        getattr(before, name),
      )


if __name__ == '__main__':
  absltest.main()
