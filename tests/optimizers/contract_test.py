"""Tests optax's contract for optimisers on all of ours."""

import functools
import pathlib
import re

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import optax

from nested_learning import optimizers
from tests import compiling
from tests.optimizers import contract


class ContractTest(parameterized.TestCase):
  @parameterized.parameters(*contract.NAMES)
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
    rate = contract.OPTIMIZERS[name][1]
    tx = contract.make(name, optax.linear_schedule(20 * rate, 0.0, 8_000))
    if name == 'dgd':
      tx = contract.make(name, 1e-3)

    def body(carry, _):
      params, state = carry
      updates, state = tx.update(
        jax.grad(loss)(params), state, params, **contract.extra(name, params)
      )
      return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(body, (params, tx.init(params)), length=8_000)
    contract.assert_close(carry[0], targets, 5e-2)

  @parameterized.product(name=contract.NAMES, dtype=('bfloat16', 'float64'))
  def test_keeps_types_under_jit_and_does_not_recompile(self, name, dtype):
    with jax.enable_x64(dtype == 'float64'):
      params = contract.make_params(jnp.dtype(dtype))
      tx = contract.make(name)
      state = tx.init(params)
      gradients = contract.make_gradients(params)

      @functools.partial(compiling.jit, donate_argnums=1)
      def step(params, state):
        updates, state = tx.update(
          gradients, state, params, **contract.extra(name, params)
        )
        return optax.apply_updates(params, updates), state, updates

      old_types = contract.types(state)
      new_params, new_state, updates = step(params, state)
      self.assertEqual(contract.types(new_state), old_types)
      self.assertEqual(contract.types(updates), contract.types(params))
      step(new_params, new_state)
      self.assertEqual(step._cache_size(), 1)
      if dtype == 'bfloat16':
        optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params))

  @parameterized.parameters(*contract.NAMES)
  def test_works_inside_wrappers(self, name):
    factory, rate = contract.OPTIMIZERS[name]
    params = contract.make_params()
    gradients, more = (
      contract.make_gradients(params),
      contract.extra(name, params),
    )
    tx = contract.make(name)
    expected, _ = tx.update(gradients, tx.init(params), params, **more)

    with self.subTest('arguments that nobody expects'):
      updates, _ = tx.update(
        gradients, tx.init(params), params, unexpected=1, **more
      )
      contract.assert_close(updates, expected)
    with self.subTest('chain'):
      chained = optax.chain(optax.clip_by_global_norm(1e9), tx)
      updates, _ = chained.update(
        gradients, chained.init(params), params, **more
      )
      contract.assert_close(updates, expected)
    with self.subTest('masked and partition'):
      mask = jax.tree.map(lambda leaf: leaf.ndim != 1, params)
      parts = optax.partition(
        {True: tx, False: optax.set_to_zero()},
        mask,
        mask_compatible_extra_args=True,
      )
      updates, _ = parts.update(gradients, parts.init(params), params, **more)
      contract.assert_close(updates['kernel'], expected['kernel'])
      self.assertFalse(jnp.any(updates['bias']))
    with self.subTest('schedule'):
      scheduled = contract.make(name, lambda count: rate / (1 + count))
      updates, _ = scheduled.update(
        gradients, scheduled.init(params), params, **more
      )
      contract.assert_close(updates, expected)
    if name != 'multi_timescale':  # Its levels are no hyperparameters.
      with self.subTest('inject_hyperparams'):
        injected = optax.inject_hyperparams(factory)(rate)
        updates, _ = injected.update(
          gradients, injected.init(params), params, **more
        )
        contract.assert_close(updates, expected)

  @parameterized.parameters(*contract.NAMES)
  def test_a_part_of_the_parameters_with_defaults_of_wrappers(self, name):
    params = {
      key: contract.make_params()[key] for key in ('kernel', 'bias', 'scale')
    }
    gradients, more = (
      contract.make_gradients(params),
      contract.extra(name, params),
    )
    tx = contract.make(name)
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
        contract.assert_close(updates[key], expected[key])

  @parameterized.product(name=contract.NAMES, dtype=('bfloat16', 'float32'))
  def test_strict_dtype_promotion(self, name, dtype):
    params = contract.make_params(jnp.dtype(dtype))
    tx, more = contract.make(name), contract.extra(name, params)
    if name == 'multi_timescale':  # optax.adam is refused by itself.
      tx = contract.timescales(1e-3, optax.sgd)
    with jax.numpy_dtype_promotion('strict'):
      gradients, state = contract.make_gradients(params), tx.init(params)
      update = compiling.jit(tx.update)
      for _ in range(2):
        updates, state = update(gradients, state, params, **more)
    self.assertEqual(contract.types(updates), contract.types(params))

  @parameterized.parameters(*contract.NAMES)
  def test_huge_gradients_leave_finite_parameters(self, name):
    params = contract.make_params()
    tx, more = contract.make(name), contract.extra(name, params)
    update = compiling.jit(
      lambda scale, state: tx.update(
        jax.tree.map(lambda g: scale * g, contract.make_gradients(params)),
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

  @parameterized.parameters(*contract.NAMES)
  def test_vanishing_gradients_leave_finite_parameters(self, name):
    shapes = {'one': (1,), 'kernel': (1, 1), 'stack': (2, 1, 1), 'two': (2, 3)}
    params = {key: jnp.ones(shape) for key, shape in shapes.items()}
    tx, more = contract.make(name), contract.extra(name, params)
    update = compiling.jit(
      lambda scale, state: tx.update(
        jax.tree.map(lambda leaf: scale * leaf, params), state, params, **more
      )
    )
    state = tx.init(params)
    for scale in (1.0, 0.0, 1e-40, 1e-30, 0.0, 1.0):
      updates, state = update(scale, state)
      finite = jax.tree.map(lambda u: bool(jnp.all(jnp.isfinite(u))), updates)
      self.assertTrue(all(jax.tree.leaves(finite)))

  @parameterized.parameters(*contract.NAMES)
  def test_multi_steps(self, name):
    params = {key: contract.make_params()[key] for key in ('kernel', 'bias')}
    tx, more = contract.make(name), contract.extra(name, params)
    gradients = contract.make_gradients(params)
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
    contract.assert_close(updates, expected)

  @parameterized.parameters(*contract.NAMES)
  def test_vmap_over_models(self, name):
    tx = contract.make(name)
    params = {key: contract.make_params()[key] for key in ('kernel', 'bias')}
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.5]), params)

    def step(params):
      return tx.update(
        contract.make_gradients(params),
        tx.init(params),
        params,
        **contract.extra(name, params),
      )[0]

    updates = compiling.jit(jax.vmap(step))(both)
    contract.assert_close(
      jax.tree.map(lambda leaf: leaf[0], updates), step(params), 1e-4
    )

  @parameterized.parameters(*contract.NAMES)
  def test_empty_trees_shapes_and_other_dtypes(self, name):
    tx = contract.make(name)
    updates, _ = tx.update({}, tx.init({}), {})
    self.assertEqual(updates, {})
    jax.eval_shape(tx.init, contract.make_params())
    for dtype in (jnp.int32, jnp.complex64):
      params = {
        'w': jnp.ones((2, 2)),
        'b': jnp.ones(2),
        'n': jnp.ones(2, dtype),
      }
      with self.assertRaisesRegex(ValueError, f"'n'.*{jnp.dtype(dtype)}"):
        tx.init(params)
    if name != 'multi_timescale':
      for rate in (-0.1, jnp.array(-0.1), float('nan'), float('inf'), [1.0]):
        with self.assertRaisesRegex(
          ValueError, re.escape(f'learning_rate={rate} must')
        ):
          contract.make(name, rate)
      injected = optax.inject_hyperparams(contract.OPTIMIZERS[name][0])(-0.1)
      with self.assertRaisesRegex(ValueError, 'learning_rate=-0.1'):
        injected.init({'w': jnp.ones((2, 2))})

  @parameterized.parameters(*contract.NAMES)
  def test_rejects_parameters_that_are_no_arrays(self, name):
    params = {'w': jnp.ones((2, 2)), 'b': jnp.ones(2), 's': 1.0}
    with self.assertRaisesRegex(ValueError, r"\['s'\] is 1.0, .* no array"):
      contract.make(name).init(params)

  @parameterized.parameters(*contract.NAMES)
  def test_rejects_trees_that_do_not_match(self, name):
    params = {key: contract.make_params()[key] for key in ('kernel', 'bias')}
    tx, more = contract.make(name), contract.extra(name, contract.make_params())
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

  @parameterized.parameters(*(name for name in contract.NAMES if name != 'm3'))
  def test_size_of_the_state_is_that_of_the_readme(self, name):
    path = pathlib.Path(optimizers.__file__).parent / 'README.md'
    row = re.search(
      rf'^\| `{name}` \|.*\| (\d+)[^|]*\|$', path.read_text(), re.M
    )
    params = {'kernel': jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    tx = contract.make(name)
    if name == 'multi_timescale':  # With the 8 bytes of Adam.
      tx = optimizers.multi_timescale(
        [optimizers.Level('slow', 2, optax.adam(1e-3))], 'slow'
      )
    state = jax.eval_shape(tx.init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    adam = 8 if name == 'multi_timescale' else 0
    self.assertEqual(round(size / 256**2 - adam, 1), int(row[1]))

  @parameterized.parameters(*contract.NAMES)
  def test_parameters_without_entries(self, name):
    shapes = {'none': (0, 3), 'empty': (3, 0), 'stack': (2, 0, 3), 'w': (3, 3)}
    params = {key: jnp.ones(shape) for key, shape in shapes.items()}
    params['b'] = jnp.ones(3)
    tx = contract.make(name)
    update = compiling.jit(
      lambda params: tx.update(
        params, tx.init(params), params, **contract.extra(name, params)
      )[0]
    )
    updates = update(params)
    self.assertEqual(contract.types(updates), contract.types(params))
    expected = update({key: params[key] for key in ('w', 'b')})
    contract.assert_close({key: updates[key] for key in expected}, expected)

  @parameterized.parameters(*contract.NAMES)
  def test_a_single_array_is_a_tree(self, name):
    tx = contract.make(name)
    if name == 'multi_timescale':
      tx = optimizers.multi_timescale(
        [optimizers.Level('a', 2, optax.adam(1.0))], 'a'
      )

    def two_steps(params):
      more, state = contract.extra(name, params), tx.init(params)
      _, state = tx.update(params, state, params, **more)
      return tx.update(params, state, params, **more)[0]

    arrays = jnp.ones((2, 3)), jnp.ones(())
    results = compiling.jit(lambda *arrays: [two_steps(a) for a in arrays])
    for array, updates in zip(arrays, results(*arrays), strict=True):
      self.assertEqual(contract.types(updates), contract.types(array))
      self.assertTrue(jnp.all(updates < 0))
