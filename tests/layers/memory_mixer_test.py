"""The contract of the memory mixer, for several settings."""

import dataclasses

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import parameters
from nested_learning.layers import memory_mixer
from nested_learning.memory import extensions
from tests import compiling

_BATCH, _LENGTH, _EMBED = 2, 21, 6
_HOPE = layers.MemoryMixerConfig(
  num_heads=2, head_dim=4, hidden_dim=6, chunk_size=8, chunk_size_others=5
)
_LOCAL = {
  'learns': 'every_map',
  'adaptive': (),
  'target': 'value',
  'erase': 'every_map',
  'extension': extensions.LocalTargets(),
  'hidden_dim': 0,
}
_CONFIGS = {
  'hope': _HOPE,
  'all_memories': dataclasses.replace(
    _HOPE, adaptive=memory_mixer.ROLES, momentum=True, read='chunk'
  ),
  'matrix': dataclasses.replace(_HOPE, kind='matrix', retain_to='zero'),
  'static': dataclasses.replace(_HOPE, adaptive=(), erase='input'),
  'norm': dataclasses.replace(_HOPE, output='norm', chunk_size_others=8),
}


def make(config, dtype=jnp.float32):
  return config.make(embed_dim=_EMBED, dtype=jnp.dtype(dtype))


def init(layer):
  """Draws parameters near their initial values, none of them exactly zero."""
  params = parameters.init(jax.random.key(0), layer.table)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(
    tree,
    [
      x + 0.2 * jax.random.normal(k, x.shape)
      for x, k in zip(leaves, keys, strict=True)
    ],
  )


class MemoryMixerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    shape = (_BATCH, _LENGTH)
    self.x = rng.normal(size=(*shape, _EMBED)).astype(np.float32)
    self.reset = rng.uniform(size=shape) < 0.1
    self.all = np.ones(shape, bool)

  @parameterized.parameters(*_CONFIGS)
  def test_stream_contract(self, name):
    layer = make(_CONFIGS[name])
    params = init(layer)
    start = layer.init_state(params, _BATCH)

    @compiling.jit
    def apply(state, x, reset, mask):
      return layer.apply(params, state, x, layers.TokenInfo(reset, mask))

    whole, last = apply(start, self.x, self.reset, self.all)
    with self.subTest('shapes and types'):
      self.assertEqual(whole.shape, self.x.shape)
      self.assertEqual(whole.dtype, jnp.float32)
      self.assertEqual(
        jax.tree.map(jnp.shape, last), jax.tree.map(jnp.shape, start)
      )
      for leaf in jax.tree.leaves((last.main.memory, last.others)):
        self.assertIn(leaf.dtype, (jnp.float32, jnp.int32))

    with self.subTest('a token changes the outputs from its own on'):
      for t in (3, 11):
        changed = self.x.copy()
        changed[:, t] += 1.0
        none = np.zeros_like(self.reset)
        before, _ = apply(start, self.x, none, self.all)
        after, _ = apply(start, changed, none, self.all)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        differs = np.abs(after - before).max(axis=(0, 2))
        self.assertTrue(np.all(differs[t:] > 0))

    with self.subTest('any split gives the same, also one per row'):
      rng = np.random.default_rng(1)
      for num_calls in (2, 4, _LENGTH):
        call = np.sort(rng.integers(num_calls, size=(_BATCH, _LENGTH)), axis=1)
        state, total = start, 0.0
        for i in range(num_calls):
          out, state = apply(state, self.x, self.reset, call == i)
          total += np.where((call == i)[..., None], out, 0.0)
        np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-5)
        jax.tree.map(
          lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5),
          state.main.memory,
          last.main.memory,
        )

    with self.subTest('padding changes nothing, wherever it stands'):
      poison = np.where(self.all[..., None], self.x, 0.0)
      mask = self.all.copy()
      mask[:, ::4] = False
      poison[:, ::4] = 1e6
      out, state = apply(start, self.x, self.reset, mask)
      again, same = apply(start, poison, self.reset, mask)
      there = mask[..., None]
      np.testing.assert_array_equal(
        np.where(there, out, 0), np.where(there, again, 0)
      )
      jax.tree.map(np.testing.assert_array_equal, state, same)

    with self.subTest('documents are independent'):
      border = 10
      reset = np.zeros_like(self.reset)
      reset[:, border] = True
      other = self.x.copy()
      other[:, :border] *= -1.0
      out, _ = apply(start, self.x, reset, self.all)
      again, _ = apply(start, other, reset, self.all)
      np.testing.assert_array_equal(out[:, border:], again[:, border:])
      self.assertGreater(np.abs(out - again)[:, :border].max(), 1e-3)

  @parameterized.parameters(*_CONFIGS)
  def test_gradients_reach_every_parameter(self, name):
    layer = make(_CONFIGS[name])
    params = init(layer)
    info = layers.TokenInfo(self.reset)

    @compiling.jit
    def run(params):
      def loss(params):
        out, _ = layer.apply(params, None, self.x, info)
        return jnp.sum(jnp.sin(3.0 * out)), out

      start = layer.init_state(params, _BATCH)
      carried, _ = layer.apply(params, start, self.x, info)
      return *jax.grad(loss, has_aux=True)(params), carried

    grads, out, carried = run(params)
    np.testing.assert_allclose(out, carried, rtol=1e-5, atol=1e-5)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
      self.assertTrue(np.all(np.isfinite(grad)))
      self.assertGreater(np.abs(grad).max(), 1e-6, parameters.path_name(path))
    if 'others' in grads['memory']:  # every role's own memory learns
      roles = (
        [
          *jnp.unstack(grads['memory']['others'].get('vector', 0), axis=1),
          *jnp.unstack(grads['memory']['others']['scalar'], axis=1),
        ]
        if name != 'matrix'
        else jnp.unstack(grads['memory']['others']['in'], axis=1)
      )
      for role in roles:
        self.assertGreater(np.abs(role).max(), 1e-6)

  def test_writes_and_half_precision(self):
    layer, half = make(_HOPE), make(_HOPE, jnp.bfloat16)
    params = init(layer)

    @compiling.jit
    def run(params):
      info = layers.TokenInfo(self.reset)
      return (
        layer.apply(params, None, self.x, info)[0],
        layer.apply(params, None, self.x, info._replace(write=False))[0],
        half.apply(params, None, self.x.astype(jnp.bfloat16), info),
      )

    out, unwritten, (low, state) = run(params)
    self.assertGreater(np.abs(out - unwritten).max(), 1e-3)
    self.assertEqual(low.dtype, jnp.bfloat16)
    self.assertEqual(state.main.memory['in'].dtype, jnp.float32)
    error = np.abs(np.asarray(low, np.float32) - out)
    self.assertLess(np.sqrt(np.mean(error**2)), 2e-2 * np.abs(out).max())

  def test_roles_are_read_with_their_norm(self):
    # Nothing is written: the norm acts only through the read of the query.
    config = dataclasses.replace(_CONFIGS['norm'], adaptive=memory_mixer.ROLES)
    params = init(make(config))
    half = params | {
      'output_norm': params['output_norm']
      | {
        'others': jax.tree.map(
          lambda x: 0.5 * x, params['output_norm']['others']
        )
      }
    }
    info = layers.TokenInfo(write=False)

    @compiling.jit
    def run(params):
      return make(config).apply(params, None, self.x, info)[0]

    self.assertGreater(np.abs(run(params) - run(half)).max(), 1e-3)

  @parameterized.parameters(
    ({'adaptive': ('k', 'w')}, "names \\['w'\\]; known roles are k, v"),
    ({'objective': 'l1'}, "objective='l1' must be one of 'dot', 'l2'"),
    ({'kind': 'tensor'}, "kind='tensor' must be one of 'mlp', 'matrix'"),
    ({'activation': 'tan'}, "activation='tan' must be one of 'silu'"),
    ({'erase': 'some'}, "erase='some' must be one of 'none'"),
    ({'chunk_size_others': 0}, 'chunk_size_others=0 must be at least 1'),
    ({'chunk_size': -1}, 'chunk_size=-1 must be at least 1'),
    ({'num_heads': 0}, 'num_heads=0 must be at least 1'),
    ({'num_heads': -2}, 'num_heads=-2 must be at least 1'),
    ({'head_dim': 0}, 'head_dim=0 must be at least 1'),
    ({'head_dim': -1}, 'head_dim=-1 must be at least 1'),
    ({'hidden_dim': -1}, 'hidden_dim=-1 must be at least 1, or 0'),
    ({'max_norm': 0.0}, 'max_norm=0.0 must be above 0'),
    ({'max_inner_lr': -0.5}, 'max_inner_lr=-0.5 must be a finite'),
    ({'max_inner_lr': float('inf')}, 'max_inner_lr=inf must be a finite'),
    (
      {
        'extension': extensions.Omega(4),
        'erase': 'none',
        'learns': 'every_map',
      },
      'Omega.window=4.* set adaptive to',
    ),
    (_LOCAL | {'kind': 'matrix'}, "LocalTargets .* kind='mlp'"),
    (_LOCAL | {'hidden_dim': 6}, 'hidden_dim=6 must be head_dim=4'),
    ({'features': 'cubic'}, "features='cubic' must be one of 'l2', 'elu'"),
  )
  def test_bad_settings_name_the_value(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(_HOPE, **changes)
