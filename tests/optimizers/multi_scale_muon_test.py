"""Tests M3 for whole models, against optax's Muon."""

import warnings

from absl.testing import parameterized
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers
from tests import compiling

_numbers = optax.contrib.MuonDimensionNumbers
# Kernels as Flax lays them out: attention, its output, a convolution, layers
# stacked by a scan.
_SHAPES = {
  'query': {'kernel': (16, 2, 4), 'bias': (2, 4)},
  'out': {'kernel': (2, 4, 16)},
  'conv': (3, 3, 2, 8),
  'layers': (2, 6, 3, 4),
  'norm': (16,),
}
_NUMBERS = {
  'query': {'kernel': _numbers((0,), (1, 2)), 'bias': None},
  'out': {'kernel': _numbers((0, 1), (2,))},
  'conv': _numbers((0, 1, 2), (3,)),
  'layers': _numbers((1,), (-1, -2)),
  'norm': None,
}


def _make(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.array(rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def _run(tx, params, num_steps=4):
  """Returns the updates of every step."""
  state, history = tx.init(params), []
  update = compiling.jit(tx.update)
  shapes = jax.tree.map(jnp.shape, params)
  for step in range(num_steps):
    updates, state = update(_make(shapes, step), state, params)
    history.append(updates)
  return history


def _assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
    actual,
    expected,
  )


class M3Test(parameterized.TestCase):
  @parameterized.parameters(
    {'nesterov': True},
    {'nesterov': False, 'consistent_rms': None},
    # optax rounds the decayed momentum before it adds the gradient.
    {'mu_dtype': 'bfloat16', 'tolerance': 2e-2},
  )
  def test_one_clock_without_second_moment_is_muon(
    self, tolerance=1e-5, **options
  ):
    params = _make(_SHAPES)
    options = {
      'consistent_rms': 0.2,
      'beta': 0.9,
      'eps': 1e-7,
      'ns_steps': 4,
      'weight_decay': 0.1,
      'weight_decay_mask': lambda tree: jax.tree.map(
        lambda leaf: leaf.ndim == 4, tree
      ),
      'adam_b1': 0.8,
      'adam_b2': 0.95,
      'adam_eps_root': 1e-6,
      'adam_learning_rate': 3e-3,
      **options,
    }
    ours = optimizers.m3(
      1e-2,
      slow_every=None,
      second_decay=None,
      dimension_numbers=_NUMBERS,
      **options,
    )
    muon = optax.contrib.muon(
      1e-2, muon_weight_dimension_numbers=_NUMBERS, **options
    )
    _assert_close(_run(ours, params), _run(muon, params), tolerance)

  def test_defaults_that_muon_has_too_are_the_same(self):
    # All but what the docstring names; consistent_rms is off in Muon.
    params = _make(_SHAPES)
    ours = optimizers.m3(
      1e-2, slow_every=None, second_decay=None, dimension_numbers=_NUMBERS
    )
    muon = optax.contrib.muon(
      1e-2, consistent_rms=0.2, muon_weight_dimension_numbers=_NUMBERS
    )
    _assert_close(_run(ours, params, 2), _run(muon, params, 2))

  @parameterized.parameters((None, 16, 4), ('bfloat16', 10, 2))
  def test_bytes_of_state(self, mu_dtype, expected, muon):
    # The numbers of the table in the README.
    params = jax.eval_shape(lambda: {'kernel': jnp.zeros((64, 64))})

    def num_bytes(tx):
      leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
      arrays = [leaf for leaf in leaves if leaf.ndim == 2]
      return sum(leaf.dtype.itemsize for leaf in arrays)

    settings = {'second_decay': None, 'slow_every': None}
    m3 = lambda **off: optimizers.m3(1.0, mu_dtype=mu_dtype, **off)
    second, slow = (4, 8) if mu_dtype is None else (2, 6)
    self.assertEqual(num_bytes(m3()), expected)
    self.assertEqual(num_bytes(m3(second_decay=None)), expected - second)
    self.assertEqual(num_bytes(m3(slow_every=None)), expected - slow)
    self.assertEqual(num_bytes(m3(**settings)), muon)
    tx = optax.contrib.scale_by_muon(mu_dtype=mu_dtype)
    init = lambda params: tx.init(params).mu
    self.assertEqual(num_bytes(tx._replace(init=init)), muon)

  def test_mask_holds_for_adam_too(self):
    params = _make({'kernel': (3, 3), 'scale': (4,), 'table': (5,)})
    mask = {'kernel': False, 'scale': False, 'table': True}
    decayed, plain = [
      _run(
        optimizers.m3(
          0.1,
          weight_decay=decay,
          adam_weight_decay=decay,
          weight_decay_mask=mask,
        ),
        params,
        1,
      )[0]
      for decay in (0.5, 0.0)
    ]
    _assert_close(decayed['kernel'], plain['kernel'])
    _assert_close(decayed['scale'], plain['scale'])
    _assert_close(decayed['table'] - plain['table'], -0.05 * params['table'])

  def test_without_dimension_numbers_kernels_alone_are_matrices(self):
    shapes = {
      'dense': {'kernel': (4, 3), 'bias': (3,)},
      'attention': {'kernel': (4, 2, 3), 'bias': (2, 3)},
      'embedding': (5, 4),
    }
    params = _make(shapes)
    tx = optimizers.m3(1e-2)
    with self.assertWarnsRegex(
      UserWarning, r'3 of them .*attention.*m3_for_model.*dimension_numbers'
    ) as caught:
      updates = _run(tx, params, 1)[0]
    self.assertLen(caught.warnings, 1)
    adam = _run(optax.nadamw(1e-2, weight_decay=0.0), params, 1)[0]
    differs = jax.tree.map(
      lambda a, b: bool(jnp.max(jnp.abs(a - b)) > 1e-4), updates, adam
    )
    expected = jax.tree.map(lambda _: False, params)
    expected['dense']['kernel'] = True
    self.assertEqual(differs, expected)
    for fine in ({'dense': params['dense']}, {'bias': jnp.ones(3)}):
      with warnings.catch_warnings():
        warnings.simplefilter('error')
        optimizers.m3(1e-2).init(fine)
        optimizers.m3(1e-2, dimension_numbers=lambda tree: None)

  def test_learning_rates_and_settings_can_be_injected(self):
    params = _make({'kernel': (4, 6), 'dense': {'kernel': (6, 6)}, 'b': (3,)})
    options = {'slow_every': 2, 'weight_decay': 0.1}
    tx = optimizers.m3(1e-2, **options)
    injected = optax.inject_hyperparams(optimizers.m3)(1e-2, **options)
    _assert_close(_run(injected, params), _run(tx, params), 1e-4)
    state, types = (
      injected.init(params),
      lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree),
    )
    self.assertEqual(state.hyperparams['ns_steps'], 5)
    _, new = compiling.jit(injected.update)(params, state, params)
    self.assertEqual(types(state), types(new))
    # Numbers that change take effect, without a second compilation.
    slower = state._replace(hyperparams={**state.hyperparams, 'ns_steps': 1})
    _, kept = injected.update(params, slower, params)
    self.assertEqual(kept.hyperparams['ns_steps'], 1)

  @parameterized.parameters('float16', 'bfloat16', 'float32', 'float64')
  def test_types_are_stable_under_strict_promotion(self, dtype):
    with jax.enable_x64(dtype == 'float64'):
      with jax.numpy_dtype_promotion('strict'):
        params = {
          'kernel': jnp.ones((4, 6), dtype),
          'empty': {'kernel': jnp.ones((0, 3), dtype)},
          'b': jnp.ones(3, dtype),
        }
        tx = optimizers.m3(1e-2, slow_every=2, weight_decay=0.1)
        state = tx.init(params)
        update = compiling.jit(tx.update)
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        for _ in range(2):
          updates, new = update(params, state, params)
          self.assertEqual(types(new), types(state))
          self.assertEqual(types(updates), types(params))
          self.assertTrue(jnp.all(jnp.isfinite(updates['kernel'])))
          state = new

  def test_wrappers_may_take_parameters_away(self):
    params = _make(_SHAPES)
    tx = optimizers.m3(1e-2, dimension_numbers=_NUMBERS)
    expected = _run(tx, params, 1)[0]
    frozen = jax.tree.map(lambda leaf: leaf.ndim == 3, params)
    for wrapped in (
      optax.masked(tx, jax.tree.map(lambda is_frozen: not is_frozen, frozen)),
      optax.partition({True: optax.set_to_zero(), False: tx}, frozen),
    ):
      updates = _run(wrapped, params, 1)[0]
      _assert_close(updates['conv'], expected['conv'])
      _assert_close(updates['norm'], expected['norm'])

  @parameterized.named_parameters(
    ('rate', 'learning_rate=-1', {'learning_rate': -1}),
    ('decay', 'weight_decay=-0.1', {'weight_decay': -0.1}),
    ('adam', 'adam_b2=1.0', {'adam_b2': 1.0}),
    ('period', 'slow_every=0', {'slow_every': 0}),
    ('steps', 'ns_steps=2.5', {'ns_steps': 2.5}),
    (
      'text',
      "learning_rate='1e-3' must be a number",
      {'learning_rate': '1e-3'},
    ),
    ('nothing', 'beta=None must be a number', {'beta': None}),
    ('integers', "mu_dtype='int8' must be a floating", {'mu_dtype': 'int8'}),
    ('no_type', "mu_dtype='bf16' must be a floating", {'mu_dtype': 'bf16'}),
  )
  def test_rejects_bad_settings(self, message, settings):
    with self.assertRaisesRegex(ValueError, message):
      optimizers.m3(**{'learning_rate': 1e-3, **settings})

  @parameterized.named_parameters(
    ('tree', {'other': _numbers(0, 1)}, r"no entry for parameter \['w'\]"),
    ('rank', {'w': _numbers(0, 2)}, r"fit parameter \['w'\].*from -2 to 1"),
    ('overlap', {'w': _numbers(1, -1)}, r"fit parameter \['w'\].*different"),
    ('none', {'w': _numbers((), 1)}, r"fit parameter \['w'\].*at least one"),
    ('tuple', {'w': (0, 1)}, r"0 at \['w'\]\[0\]: give an optax.contrib"),
    ('bool', {'w': True}, r"True at \['w'\]: give an optax.contrib"),
    ('text', 'auto', r"'auto' at \(the whole tree\): give an optax.contrib"),
  )
  def test_rejects_dimension_numbers_that_do_not_fit(self, numbers, message):
    tx = optimizers.m3(1e-3, dimension_numbers=numbers)
    with self.assertRaisesRegex(ValueError, message) as caught:
      tx.init({'w': jnp.ones((4, 4))})
    self.assertNotIn('\n', str(caught.exception))

  def test_rejects_a_mask_of_another_tree(self):
    for mask in ({'v': True}, lambda params: {'v': True}):
      tx = optimizers.m3(1e-3, weight_decay=0.1, weight_decay_mask=mask)
      with self.assertRaisesRegex(
        ValueError, r"weight_decay_mask, with \['v'\], .* with \['kernel'\]"
      ) as caught:
        tx.init({'kernel': jnp.ones((4, 4))})
      self.assertNotIn('\n', str(caught.exception))

  def test_rejects_integer_and_complex_parameters(self):
    for dtype in (jnp.int32, jnp.complex64):
      with self.assertRaisesRegex(ValueError, "'n'.*dtype"):
        optimizers.m3(1e-3).init({'n': jnp.zeros((2, 2), dtype)})


class M3ForModelTest(parameterized.TestCase):
  def test_linen_attention_gets_the_updates_of_muon(self):
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    x, y = jax.random.normal(jax.random.key(0), (2, 4, 5, 8))
    params = model.init(jax.random.key(1), x)['params']
    loss_fn = lambda params, x: jnp.sum(model.apply({'params': params}, x) * y)
    ours = optimizers.m3_for_model(
      loss_fn, params, x, learning_rate=1.0, slow_every=None, second_decay=None
    )
    projection = {'kernel': _numbers((0,), (1, 2)), 'bias': None}
    numbers = dict.fromkeys(('query', 'key', 'value'), projection)
    numbers['out'] = {'kernel': _numbers((0, 1), (2,)), 'bias': None}
    muon = optax.contrib.muon(
      1.0, consistent_rms=0.2, muon_weight_dimension_numbers=numbers
    )
    _assert_close(_run(ours, params, 1), _run(muon, params, 1))

  def test_nnx_module_and_its_optimizer(self):
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    x = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
    loss_fn = lambda module, x: jnp.mean((module(x) - 1) ** 2)
    tx = optimizers.m3_for_model(loss_fn, module, x, learning_rate=0.1)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    before = loss_fn(module, x)

    @nnx.jit
    def step(module, optimizer):
      optimizer.update(module, nnx.grad(loss_fn)(module, x))

    for _ in range(5):
      step(module, optimizer)
    self.assertLess(loss_fn(module, x), 0.7 * before)
    moments = optimizer.opt_state.inner_states['m3'].inner_state[0].momentum
    shapes = [leaf.shape for leaf in jax.tree.leaves(moments)]
    self.assertEqual(shapes, [(4, 3)])

  def test_rejects_a_model_without_maps_and_another_tree(self):
    x = jnp.ones(3)
    with self.assertRaisesRegex(ValueError, 'no product of a parameter'):
      optimizers.m3_for_model(
        lambda p, x: jnp.sum(p['b'] * x), {'b': x}, x, learning_rate=1.0
      )
    tx = optimizers.m3_for_model(
      lambda p, x: jnp.sum(x @ p['w']),
      {'w': jnp.ones((3, 2))},
      x[None],
      learning_rate=1.0,
    )
    with self.assertRaisesRegex(ValueError, r"\['v'\].*it has \['w'\]"):
      tx.init({'v': jnp.ones((3, 2))})
