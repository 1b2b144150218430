"""Tests that sharded parameters are updated like others, and stay in place."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers
from tests import compiling
from tests.optimizers import contract


class ShardedTest(parameterized.TestCase):
  @parameterized.product(
    name=contract.NAMES,
    axis_type=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit),
  )
  def test_sharded_equals_unsharded(self, name, axis_type):
    tx = contract.make(name)
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
    gradients, more = (
      contract.make_gradients(params),
      contract.extra(name, params),
    )

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
    contract.assert_close(updates, expected)
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
    gradients = contract.make_gradients(params)

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
    contract.assert_close(updates, expected, 1e-4)
    for old, new in zip(
      jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True
    ):
      self.assertTrue(new.sharding.is_equivalent_to(old.sharding, old.ndim))
