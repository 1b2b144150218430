"""Sliding-window attention against the masked definition, and as a stream."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import compilation
from nested_learning import layers
from nested_learning import parameters
from tests import compiling

_EMBED, _LENGTH = 6, 29


def make(window=5, num_persistent=0, num_kv_heads=2, dtype=jnp.float64):
  config = layers.AttentionConfig(
    num_heads=4,
    num_kv_heads=num_kv_heads,
    head_dim=4,
    window=window,
    num_persistent=num_persistent,
  )
  return config.make(embed_dim=_EMBED, dtype=dtype)


def rotate_by_hand(x):
  """Rotates pairs of channels of x [t, h, d] as complex numbers."""
  half = x.shape[-1] // 2
  angle = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
  return np.concatenate([turned.real, turned.imag], axis=-1)


def attend_by_hand(params, x, reset, window):
  """Attends within one row [t, e] without padding, with a mask of t x t."""
  params = jax.tree.map(np.asarray, params)
  project = lambda name: np.einsum('te,ehd->thd', x, params[name])
  query, key, value = (project(name) for name in ('query', 'key', 'value'))
  group = query.shape[1] // key.shape[1]
  key, value = (np.repeat(x, group, axis=1) for x in (key, value))
  document = np.cumsum(reset)
  age = np.arange(len(x))[:, None] - np.arange(len(x))
  visible = (age >= 0) & (age < window) & (document[:, None] == document)
  score = lambda q, k: np.einsum('thd,shd->hts', q, k) / q.shape[-1] ** 0.5
  scores = score(rotate_by_hand(query), rotate_by_hand(key))
  scores = np.where(visible, scores, -np.inf)
  if 'persistent_memory' in params:  # without a position
    always = params['persistent_memory']
    always = {n: np.repeat(x, group, axis=1) for n, x in always.items()}
    scores = np.concatenate([score(query, always['key']), scores], axis=-1)
    value = np.concatenate([always['value'], value])
  weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
  out = np.einsum('hts,shd->thd', weights, value)
  return np.einsum('thd,hde->te', out, params['out'])


class SlidingWindowTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    rng = np.random.default_rng(0)
    self.x = rng.normal(size=(2, _LENGTH, _EMBED))
    self.reset = rng.uniform(size=(2, _LENGTH)) < 0.1
    self.mask = rng.uniform(size=(2, _LENGTH)) < 0.7

  def parts(self, **changes):
    layer = make(**changes)
    params = parameters.init(jax.random.key(0), layer.table, jnp.float64)
    return layer, params, compiling.jit(layer.apply)

  def test_gradients_of_blocks_are_those_of_windows_alone(self):
    """Compares six blocks of 5 with one call per token and its window."""
    layer, params, _ = self.parts(num_persistent=2)
    marks = layers.TokenInfo(self.reset)

    def one_by_one(params, x):
      reads = []
      for i in range(_LENGTH):
        first = max(i - 4, 0)
        piece = x[:, first : i + 1]
        reset = self.reset[:, first : i + 1]
        reads.append(
          layer.apply(params, None, piece, layers.TokenInfo(reset))[0]
        )
      return jnp.concatenate([read[:, -1:] for read in reads], axis=1)

    blocks = lambda params, x: layer.apply(params, None, x, marks)[0]
    gradient = lambda f: jax.grad(lambda *a: jnp.sum(f(*a) ** 3), (0, 1))
    found = compiling.jit(gradient(blocks))(params, self.x)
    expected = compiling.jit(gradient(one_by_one))(params, self.x)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9),
      found,
      expected,
    )

  @parameterized.parameters((5, 0, 2), (1, 3, 4), (29, 0, 1), (64, 2, 2))
  def test_equals_the_masked_definition(self, window, persistent, kv_heads):
    layer, params, apply = self.parts(
      window=window, num_persistent=persistent, num_kv_heads=kv_heads
    )
    start = layer.init_state(params, 2)
    out, _ = apply(params, None, self.x, layers.TokenInfo(self.reset))
    masked, _ = apply(
      params, start, self.x, layers.TokenInfo(self.reset, self.mask)
    )
    for row in range(2):
      expected = attend_by_hand(params, self.x[row], self.reset[row], window)
      np.testing.assert_allclose(out[row], expected, atol=1e-9)
      there = self.mask[row]
      expected = attend_by_hand(
        params, self.x[row, there], self.reset[row, there], window
      )
      np.testing.assert_allclose(masked[row, there], expected, atol=1e-9)

  @parameterized.product(
    lengths=((13, 1, 15), (1, 2, 3, 5, 18)), marked=(False, True)
  )
  def test_any_split_gives_the_same(self, lengths, marked):
    layer, params, apply = self.parts(num_persistent=2)
    marks = (self.reset, self.mask) if marked else (None, None)
    whole, last = apply(params, None, self.x, layers.TokenInfo(*marks))
    state, pieces, t = layer.init_state(params, 2), [], 0
    for n in lengths:
      piece = [None if m is None else m[:, t : t + n] for m in marks]
      out, state = apply(
        params, state, self.x[:, t : t + n], layers.TokenInfo(*piece)
      )
      pieces.append(out)
      t += n
    there = self.mask[..., None] if marked else True
    np.testing.assert_allclose(
      np.where(there, np.concatenate(pieces, 1), 0),
      np.where(there, whole, 0),
      atol=1e-12,
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state, last
    )

  def test_padding_leaves_the_state(self):
    _, params, apply = self.parts()
    _, state = apply(params, None, self.x, layers.TokenInfo(self.reset))
    none = layers.TokenInfo(self.reset, np.zeros((2, _LENGTH), bool))
    _, after = apply(params, state, self.x, none)
    jax.tree.map(np.testing.assert_array_equal, after, state)

  def test_late_in_a_stream_is_as_exact_as_early(self):
    layer, params, apply = self.parts(dtype=jnp.float32)
    params = jax.tree.map(jnp.float32, params)
    x = self.x.astype(np.float32)
    start = layer.init_state(params, 2)
    expected, _ = apply(params, start, x, layers.TokenInfo())
    late = start._replace(slot=start.slot + 3, current=start.current + 10**9)
    out, _ = apply(params, late, x, layers.TokenInfo())
    np.testing.assert_array_equal(out, expected)

  def test_state_and_operations_do_not_grow_with_the_stream(self):
    layer, params, _ = self.parts(window=8)
    for leaf in jax.tree.leaves(layer.init_state(params, 2)):
      self.assertLessEqual(leaf.shape[1:2], (8,))

    def flops(num_tokens):
      x = jax.ShapeDtypeStruct((1, num_tokens, _EMBED), jnp.float64)
      run = lambda x: layer.apply(params, None, x, layers.TokenInfo())
      return compilation.matmul_flops(run, x)

    per_block = flops(512) - flops(504)
    self.assertEqual(flops(4096) - flops(512), per_block * (4096 - 512) // 8)
