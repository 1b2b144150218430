"""Tests optax's contract for optimisers on all of ours."""

import functools
import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized
from flax import nnx
import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers
from tests import compiling


def timescales(learning_rate, rule=optax.adam):
  """Makes two levels, the slow one on every second step."""
  return optimizers.multi_timescale(
    [
      optimizers.Level('fast', 1, rule(learning_rate)),
      optimizers.Level('slow', 2, rule(learning_rate)),
    ],
    lambda params: jax.tree.map(
      lambda leaf: 'slow' if leaf.ndim == 2 else 'fast', params
    ),
  )


def m3(learning_rate):
  """Makes M3 with the last two axes as matrices; the slow momentum is used."""
  numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
  return optimizers.m3(
    learning_rate,
    slow_every=2,
    ns_steps=2,
    adam_b2=0.95,
    dimension_numbers=lambda params: jax.tree.map(
      lambda leaf: numbers if leaf.ndim >= 2 else None, params
    ),
  )


# Name: factory of a learning rate, and a rate that converges.
OPTIMIZERS = {
  'dgd': (optimizers.dgd, 5e-4),
  'm3': (m3, 3e-3),
  'delta_momentum': (optimizers.delta_momentum, 1e-3),
  'preconditioned_momentum': (optimizers.preconditioned_momentum, 1e-3),
  'deep_momentum': (optimizers.deep_momentum, 1e-3),
  'multi_timescale': (timescales, 3e-3),
}
NAMES = tuple(OPTIMIZERS)
# DGD takes the energy of every map's inputs; nothing erased is energy 0.
NEEDS_ENERGY = ('dgd',)


def make(name, learning_rate=None):
  factory, rate = OPTIMIZERS[name]
  return factory(rate if learning_rate is None else learning_rate)


def extra(name, params):
  zeros = lambda leaf: jnp.zeros((), jnp.promote_types(leaf.dtype, jnp.float32))
  return {'energy': jax.tree.map(zeros, params)} if name in NEEDS_ENERGY else {}


def make_params(dtype=jnp.float32):
  return {
    'kernel': jnp.linspace(-1.0, 1.0, 24, dtype=dtype).reshape(4, 6),
    'stack': jnp.linspace(1.0, 2.0, 12, dtype=dtype).reshape(2, 2, 3),
    'bias': jnp.arange(1.0, 4.0, dtype=dtype),
    'scale': jnp.ones((), dtype),
  }


def make_gradients(params):
  return jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)


def types(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float64), np.asarray(b, np.float64), tolerance, tolerance
    ),
    actual,
    expected,
  )


class ContractTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_converges_on_standard_functions(self, name):
    targets = {
      'parabola': jnp.array([1.0, -1.0, 1.0]),
      'rosenbrock': jnp.ones(2),
      'matrix': jnp.array([[3.0, -2.0], [1.0, 4.0]]),
      'mixed': (jnp.array([1.0, -1.0, 2.0]), jnp.eye(2) - jnp.eye(2)[::-1]),
    }
    params = jax.tree.map(jnp.zeros_like, targets)
    params['parabola'] = jnp.array([-1.0, 10.0, 1.0])

    def loss(params):
      squares = jax.tree.map(
        lambda p, t: jnp.sum((p - t) ** 2), params, targets
      )
      x, y = params['rosenbrock']
      return (
        squares['parabola']
        + (1 - x) ** 2
        + 100 * (y - x**2) ** 2
        + squares['matrix']
        + sum(squares['mixed'])
      )

    # Every optimiser at a fixed rate would have to be tuned; a schedule ends
    # all of them at rest, and tests schedules.
    rate = OPTIMIZERS[name][1]
    tx = make(name, optax.linear_schedule(20 * rate, 0.0, 8_000))
    if name == 'dgd':
      tx = make(name, 1e-3)

    def body(carry, _):
      params, state = carry
      updates, state = tx.update(
        jax.grad(loss)(params), state, params, **extra(name, params)
      )
      return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(body, (params, tx.init(params)), length=8_000)
    assert_close(carry[0], targets, 5e-2)

  @parameterized.product(name=NAMES, dtype=('bfloat16', 'float64'))
  def test_keeps_types_under_jit_and_does_not_recompile(self, name, dtype):
    with jax.enable_x64(dtype == 'float64'):
      params = make_params(jnp.dtype(dtype))
      tx = make(name)
      state = tx.init(params)
      gradients = make_gradients(params)

      @functools.partial(compiling.jit, donate_argnums=1)
      def step(params, state):
        updates, state = tx.update(
          gradients, state, params, **extra(name, params)
        )
        return optax.apply_updates(params, updates), state, updates

      old_types = types(state)
      new_params, new_state, updates = step(params, state)
      self.assertEqual(types(new_state), old_types)
      self.assertEqual(types(updates), types(params))
      step(new_params, new_state)
      self.assertEqual(step._cache_size(), 1)
      if dtype == 'bfloat16':
        optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params))

  @parameterized.parameters(*NAMES)
  def test_works_inside_wrappers(self, name):
    factory, rate = OPTIMIZERS[name]
    params = make_params()
    gradients, more = make_gradients(params), extra(name, params)
    tx = make(name)
    expected, _ = tx.update(gradients, tx.init(params), params, **more)

    with self.subTest('arguments that nobody expects'):
      updates, _ = tx.update(
        gradients, tx.init(params), params, unexpected=1, **more
      )
      assert_close(updates, expected)
    with self.subTest('chain'):
      chained = optax.chain(optax.clip_by_global_norm(1e9), tx)
      updates, _ = chained.update(
        gradients, chained.init(params), params, **more
      )
      assert_close(updates, expected)
    with self.subTest('masked and partition'):
      mask = jax.tree.map(lambda leaf: leaf.ndim != 1, params)
      parts = optax.partition(
        {True: tx, False: optax.set_to_zero()},
        mask,
        mask_compatible_extra_args=True,
      )
      updates, _ = parts.update(gradients, parts.init(params), params, **more)
      assert_close(updates['kernel'], expected['kernel'])
      self.assertFalse(jnp.any(updates['bias']))
    with self.subTest('schedule'):
      scheduled = make(name, lambda count: rate / (1 + count))
      updates, _ = scheduled.update(
        gradients, scheduled.init(params), params, **more
      )
      assert_close(updates, expected)
    if name != 'multi_timescale':  # Its levels are no hyperparameters.
      with self.subTest('inject_hyperparams'):
        injected = optax.inject_hyperparams(factory)(rate)
        updates, _ = injected.update(
          gradients, injected.init(params), params, **more
        )
        assert_close(updates, expected)

  @parameterized.parameters(*NAMES)
  def test_a_part_of_the_parameters_with_defaults_of_wrappers(self, name):
    params = {key: make_params()[key] for key in ('kernel', 'bias', 'scale')}
    gradients, more = make_gradients(params), extra(name, params)
    tx = make(name)
    expected, _ = tx.update(gradients, tx.init(params), params, **more)
    labels = {'kernel': 'train', 'bias': 'train', 'scale': 'rest'}
    transforms = {'train': tx, 'rest': optax.set_to_zero()}
    mask = {'kernel': True, 'bias': True, 'scale': False}
    for wrapper in (
      optax.partition(transforms, labels),
      optax.multi_transform(transforms, labels),
      optax.masked(tx, mask),
      optax.masked(tx, mask, mask_compatible_extra_args=True),
      optax.selective_transform(
        tx, freeze_mask={'kernel': False, 'bias': False, 'scale': True}
      ),
    ):
      updates, _ = wrapper.update(
        gradients, wrapper.init(params), params, **more
      )
      for key in ('kernel', 'bias'):
        assert_close(updates[key], expected[key])

  @parameterized.product(name=NAMES, dtype=('bfloat16', 'float32'))
  def test_strict_dtype_promotion(self, name, dtype):
    params = make_params(jnp.dtype(dtype))
    tx, more = make(name), extra(name, params)
    if name == 'multi_timescale':  # optax.adam is refused by itself.
      tx = timescales(1e-3, optax.sgd)
    with jax.numpy_dtype_promotion('strict'):
      gradients, state = make_gradients(params), tx.init(params)
      for _ in range(2):
        updates, state = tx.update(gradients, state, params, **more)
    self.assertEqual(types(updates), types(params))

  @parameterized.parameters(*NAMES)
  def test_huge_gradients_leave_finite_parameters(self, name):
    params = make_params()
    tx, more = make(name), extra(name, params)
    update = compiling.jit(
      lambda scale, state: tx.update(
        jax.tree.map(lambda g: scale * g, make_gradients(params)),
        state,
        params,
        **more,
      )
    )
    state = tx.init(params)
    for scale in (1e19, 1e19, 1.0, 1.0):
      updates, state = update(scale, state)
      finite = jax.tree.map(lambda u: bool(jnp.all(jnp.isfinite(u))), updates)
      self.assertTrue(all(jax.tree.leaves(finite)))

  @parameterized.parameters(*NAMES)
  def test_multi_steps(self, name):
    params = {key: make_params()[key] for key in ('kernel', 'bias')}
    tx, more = make(name), extra(name, params)
    gradients = make_gradients(params)
    expected, _ = compiling.jit(tx.update)(
      gradients, tx.init(params), params, **more
    )
    steps = optax.MultiSteps(tx, 2)
    state = steps.init(params)
    doubled = jax.tree.map(lambda g: 2 * g, gradients)
    nothing = jax.tree.map(jnp.zeros_like, gradients)
    update = compiling.jit(steps.update)
    _, state = update(doubled, state, params, **more)
    updates, _ = update(nothing, state, params, **more)
    assert_close(updates, expected)

  @parameterized.parameters(*NAMES)
  def test_vmap_over_models(self, name):
    tx = make(name)
    params = {key: make_params()[key] for key in ('kernel', 'bias')}
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.5]), params)

    def step(params):
      return tx.update(
        make_gradients(params), tx.init(params), params, **extra(name, params)
      )[0]

    updates = compiling.jit(jax.vmap(step))(both)
    assert_close(
      jax.tree.map(lambda leaf: leaf[0], updates), step(params), 1e-4
    )

  @parameterized.parameters(*NAMES)
  def test_empty_trees_shapes_and_other_dtypes(self, name):
    tx = make(name)
    updates, _ = tx.update({}, tx.init({}), {})
    self.assertEqual(updates, {})
    jax.eval_shape(tx.init, make_params())
    for dtype in (jnp.int32, jnp.complex64):
      params = {
        'w': jnp.ones((2, 2)),
        'b': jnp.ones(2),
        'n': jnp.ones(2, dtype),
      }
      with self.assertRaisesRegex(ValueError, f"'n'.*{jnp.dtype(dtype)}"):
        tx.init(params)
    if name != 'multi_timescale':
      for rate in (-0.1, jnp.array(-0.1), float('nan'), float('inf')):
        with self.assertRaisesRegex(ValueError, f'learning_rate={rate} must'):
          make(name, rate)
      injected = optax.inject_hyperparams(OPTIMIZERS[name][0])(-0.1)
      with self.assertRaisesRegex(ValueError, 'learning_rate=-0.1'):
        injected.init({'w': jnp.ones((2, 2))})

  @parameterized.parameters(*NAMES)
  def test_rejects_trees_that_do_not_match(self, name):
    params = {key: make_params()[key] for key in ('kernel', 'bias')}
    tx, more = make(name), extra(name, make_params())
    state = tx.init(params)
    others = {
      'stack': {'kernel': params['kernel'], 'stack': jnp.ones((2, 2, 3))},
      'kernel': {'kernel': jnp.ones((5, 6)), 'bias': params['bias']},
    }
    for key, gradients in others.items():
      with self.assertRaisesRegex(ValueError, f"'(bias|{key})'") as caught:
        tx.update(gradients, state, params, **more)
      self.assertNotIn('\n', str(caught.exception))
      if name == 'dgd':  # It has no state, so that the parameters may change.
        continue
      with self.assertRaisesRegex(ValueError, f"'(bias|{key})'") as caught:
        tx.update(gradients, state, None, **more)
      self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(*(name for name in NAMES if name != 'm3'))
  def test_size_of_the_state_is_that_of_the_readme(self, name):
    path = pathlib.Path(optimizers.__file__).parent / 'README.md'
    row = re.search(
      rf'^\| `{name}` \|.*\| (\d+)[^|]*\|$', path.read_text(), re.M
    )
    params = {'kernel': jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    tx = make(name)
    if name == 'multi_timescale':  # With the 8 bytes of Adam.
      tx = optimizers.multi_timescale(
        [optimizers.Level('slow', 2, optax.adam(1e-3))], 'slow'
      )
    state = jax.eval_shape(tx.init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    adam = 8 if name == 'multi_timescale' else 0
    self.assertEqual(round(size / 256**2 - adam, 1), int(row[1]))

  @parameterized.parameters(*NAMES)
  def test_parameters_without_entries(self, name):
    shapes = {'none': (0, 3), 'empty': (3, 0), 'stack': (2, 0, 3), 'w': (3, 3)}
    params = {key: jnp.ones(shape) for key, shape in shapes.items()}
    params['b'] = jnp.ones(3)
    tx = make(name)
    update = compiling.jit(
      lambda params: tx.update(
        params, tx.init(params), params, **extra(name, params)
      )[0]
    )
    updates = update(params)
    self.assertEqual(types(updates), types(params))
    expected = update({key: params[key] for key in ('w', 'b')})
    assert_close({key: updates[key] for key in expected}, expected)

  @parameterized.parameters(*NAMES)
  def test_a_single_array_is_a_tree(self, name):
    tx = make(name)
    if name == 'multi_timescale':
      tx = optimizers.multi_timescale(
        [optimizers.Level('a', 2, optax.adam(1.0))], 'a'
      )

    def two_steps(params):
      more, state = extra(name, params), tx.init(params)
      _, state = tx.update(params, state, params, **more)
      return tx.update(params, state, params, **more)[0]

    arrays = jnp.ones((2, 3)), jnp.ones(())
    results = compiling.jit(lambda *arrays: [two_steps(a) for a in arrays])
    for array, updates in zip(arrays, results(*arrays), strict=True):
      self.assertEqual(types(updates), types(array))
      self.assertTrue(jnp.all(updates < 0))

  @parameterized.product(
    name=NAMES,
    axis_type=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit),
  )
  def test_sharded_equals_unsharded(self, name, axis_type):
    tx = make(name)
    specs = {
      'rows': jax.P('x', None),
      'columns': jax.P(None, 'x'),
      'stack': jax.P('x', None, None),
      'bias': jax.P('x'),
    }
    params = {
      'rows': jnp.linspace(-1.0, 1.0, 128).reshape(8, 16),
      'columns': jnp.linspace(0.0, 1.0, 64).reshape(8, 8),
      'stack': jnp.linspace(0.0, 2.0, 48).reshape(8, 2, 3),
      'bias': jnp.linspace(1.0, 2.0, 8),
    }
    gradients, more = make_gradients(params), extra(name, params)

    @compiling.jit
    def two_steps(params, gradients, state):
      # The second one is that of a slow level, and of a slow momentum.
      _, state = tx.update(gradients, state, params, **more)
      return tx.update(gradients, state, params, **more)

    expected, _ = two_steps(params, gradients, tx.init(params))
    mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
    shardings = {k: jax.NamedSharding(mesh, s) for k, s in specs.items()}
    with jax.set_mesh(mesh):
      params = jax.device_put(params, shardings)
      gradients = jax.device_put(gradients, shardings)
      state = tx.init(params)
      updates, new_state = two_steps(params, gradients, state)
    assert_close(updates, expected)
    for old, new in zip(
      jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True
    ):
      self.assertTrue(new.sharding.is_equivalent_to(old.sharding, old.ndim))
      for key in ('rows', 'columns', 'stack'):
        if old.shape == params[key].shape:
          self.assertEqual(old.sharding.spec, specs[key])


class DimensionNumbersTest(parameterized.TestCase):
  """Tests sharded matrices of several axes; `m3` has tests of its own."""

  @parameterized.product(
    factory=(optimizers.delta_momentum, optimizers.deep_momentum),
    spec=(jax.P('x'), jax.P(None, 'x'), jax.P(None, None, 'x')),
    axis_type=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit),
  )
  def test_sharded_equals_unsharded(self, factory, spec, axis_type):
    numbers = optax.contrib.MuonDimensionNumbers
    tx = factory(
      0.1,
      dimension_numbers={
        'query': numbers((0,), (1, 2)),
        'out': numbers((0, 1), (2,)),
        'bias': None,
      },
    )
    shapes = {'query': (16, 8, 8), 'out': (8, 8, 16), 'bias': (8, 8)}
    params = {
      key: jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)
      for key, shape in shapes.items()
    }
    gradients = make_gradients(params)

    @compiling.jit
    def two_steps(params, gradients, state):
      _, state = tx.update(gradients, state, params)
      return tx.update(gradients, state, params)

    expected, _ = two_steps(params, gradients, tx.init(params))
    mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
      place = lambda tree: {
        key: jax.device_put(
          leaf, jax.NamedSharding(mesh, jax.P(*spec[: leaf.ndim]))
        )
        for key, leaf in tree.items()
      }
      params, gradients = place(params), place(gradients)
      state = tx.init(params)
      updates, new_state = two_steps(params, gradients, state)
    assert_close(updates, expected, 1e-4)
    for old, new in zip(
      jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True
    ):
      self.assertTrue(new.sharding.is_equivalent_to(old.sharding, old.ndim))


class Classifier(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class NnxClassifier(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.second = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.first(x)))


class FlaxTest(parameterized.TestCase):
  """Tests drop-in use with Flax; `dgd` has tests of its own."""

  @parameterized.parameters(*(name for name in NAMES if name != 'dgd'))
  def test_linen_train_state_and_nnx_optimizer(self, name):
    x = jax.random.normal(jax.random.key(0), (16, 4))
    y = jnp.arange(16) % 3
    loss_of = lambda logits: jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, y)
    )
    rate = 3.0 if name == 'delta_momentum' else 0.03

    model = Classifier()
    state = train_state.TrainState.create(
      apply_fn=model.apply,
      params=model.init(jax.random.key(1), x)['params'],
      tx=make(name, rate),
    )
    loss_fn = lambda params: loss_of(model.apply({'params': params}, x))
    step = compiling.jit(
      lambda state: state.apply_gradients(grads=jax.grad(loss_fn)(state.params))
    )
    before = loss_fn(state.params)
    for _ in range(15):
      state = step(state)
    self.assertLess(loss_fn(state.params), 0.9 * before)

    module = NnxClassifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, make(name, rate), wrt=nnx.Param)

    @nnx.jit
    def nnx_step(module, optimizer):
      loss, grads = nnx.value_and_grad(lambda m: loss_of(m(x)))(module)
      optimizer.update(module, grads)
      return loss

    losses = [float(nnx_step(module, optimizer)) for _ in range(15)]
    self.assertLess(losses[-1], 0.9 * losses[0])


if __name__ == '__main__':
  absltest.main()
