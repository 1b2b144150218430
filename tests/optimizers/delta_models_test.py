"""Tests the setup of Delta Gradient Descent for models of all frameworks."""

import warnings

from absl.testing import parameterized
from flax import nnx
import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers
from tests.optimizers import small_models


def assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
    actual,
    expected,
  )


class ModelTest(parameterized.TestCase):
  def test_linen_stacked_layers_equal_separate_ones(self):
    x = jax.random.normal(jax.random.key(1), (5, 4))
    scanned, separate = small_models.Stack(True), small_models.Stack(False)
    params = scanned.init(jax.random.key(0), x)['params']
    unstacked = {name: params[name] for name in ('LayerNorm_0', 'head')}
    for i in range(3):
      unstacked[f'layer_{i}'] = jax.tree.map(
        lambda p, i=i: p[i], params['layers']
      )

    def make_loss(model):
      return lambda params, x: jnp.mean(model.apply({'params': params}, x) ** 2)

    outputs = [
      jax.jit(
        optimizers.value_and_delta_grad(make_loss(model), target='printed')
      )(tree, x)
      for model, tree in ((scanned, params), (separate, unstacked))
    ]
    (_, grads, extra), (_, expected, expected_extra) = outputs
    energy = extra['energy']['layers']['Dense_1']['kernel']
    self.assertEqual(energy.shape, (3,))
    for i in range(3):
      assert_close(
        jax.tree.map(lambda leaf, i=i: leaf[i], grads['layers']),
        expected[f'layer_{i}'],
      )
      np.testing.assert_allclose(
        energy[i],
        expected_extra['energy'][f'layer_{i}']['Dense_1']['kernel'],
        rtol=1e-5,
      )
    maps = optimizers.find_maps(make_loss(scanned), params, x)
    self.assertEqual(maps['layers']['Dense_0'], {'kernel': True, 'bias': False})
    self.assertFalse(maps['LayerNorm_0']['scale'])

  def test_trains_with_a_linen_train_state(self):
    model = small_models.Stack(True)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    params = model.init(jax.random.key(0), x)['params']
    loss_fn = lambda params, x: jnp.mean(
      (model.apply({'params': params}, x) - 1) ** 2
    )
    value_and_grad, tx = optimizers.dgd_for_model(
      loss_fn, params, x, learning_rate=0.05
    )
    state = train_state.TrainState.create(
      apply_fn=model.apply, params=params, tx=tx
    )

    @jax.jit
    def step(state):
      loss, grads, extra = value_and_grad(state.params, x)
      return optimizers.apply_gradients(state, grads, extra), loss

    with self.subTest('as the transformation alone'):
      _, grads, extra = value_and_grad(params, x)
      updates, _ = tx.update(grads, tx.init(params), params, **extra)
      assert_close(step(state)[0].params, optax.apply_updates(params, updates))
    losses = []
    for _ in range(10):
      state, loss = step(state)
      losses.append(float(loss))
    self.assertLess(losses[-1], 0.8 * losses[0])
    self.assertEqual(state.step, 10)
    self.assertIs(state.tx, tx)
    self.assertLessEqual(step._cache_size(), 2)  # A step of int 0, then arrays.

  def test_trains_an_nnx_module(self):
    model = small_models.Net(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    loss_fn = lambda model, x: jnp.mean((model(x) - 1) ** 2)
    value_and_grad, tx = optimizers.dgd_for_model(
      loss_fn,
      model,
      x,
      learning_rate=0.05,
      fallback=optax.adam(1e-2),
      num_samples=lambda x: x.shape[0],
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
      loss, grads, extra = value_and_grad(model, x)
      optimizer.update(model, grads, **extra)
      return loss, extra['energy']

    before = model.norm.mean[...]
    losses = []
    for _ in range(10):
      loss, energy = step(model, optimizer, x)
      losses.append(float(loss))
    np.testing.assert_allclose(
      energy['first']['kernel'][...], jnp.sum(x**2) / 5, rtol=1e-5
    )
    self.assertLess(losses[-1], 0.8 * losses[0])
    self.assertGreater(jnp.max(jnp.abs(model.norm.mean[...] - before)), 1e-3)
    report = optimizers.parameter_report(loss_fn, model, x)
    self.assertLen([info for info in report if info.dgd == 'map'], 2)

  @parameterized.parameters(None, 'adam')
  def test_trains_a_part_of_an_nnx_module(self, fallback):
    model = small_models.Net(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    loss_fn = lambda model, x: jnp.mean((model(x) - 1) ** 2)
    value_and_grad, tx = optimizers.dgd_for_model(
      loss_fn,
      model,
      x,
      learning_rate=0.05,
      fallback=optax.adam(1e-2) if fallback else None,
    )
    part = nnx.All(nnx.Param, nnx.PathContains('first'))
    optimizer = nnx.Optimizer(model, tx, wrt=part)
    leaves = lambda: [
      model.first.kernel[...],
      model.first.bias[...],
      model.second.kernel[...],
    ]
    before = leaves()

    @nnx.jit
    def step(model, optimizer, x):
      loss, grads, extra = value_and_grad(model, x)
      optimizer.update(model, grads, **extra)
      return loss

    losses = [float(step(model, optimizer, x)) for _ in range(10)]
    self.assertLess(losses[-1], losses[0])
    moved = [
      bool(jnp.any(a != b)) for a, b in zip(before, leaves(), strict=True)
    ]
    self.assertEqual(moved, [True, True, False])

  def test_nnx_module_on_a_slow_clock(self):
    # The parts of a level keep their rules, and its energies accumulate.
    model = small_models.Net(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    loss_fn = lambda model, x: jnp.mean((model(x) - 1) ** 2)
    value_and_grad, dgd = optimizers.dgd_for_model(
      loss_fn, model, x, learning_rate=0.05
    )
    extra = jax.eval_shape(lambda: value_and_grad(nnx.clone(model), x)[2])
    tx = optimizers.multi_timescale(
      [optimizers.Level('fast', 1, dgd), optimizers.Level('slow', 2, dgd)],
      lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: 'slow' if path[0].key == 'first' else 'fast', tree
      ),
      phases='aligned',
      accumulate=extra,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
      _, grads, extra = value_and_grad(model, x)
      optimizer.update(model, grads, **extra)

    kernels = [model.first.kernel[...], model.second.kernel[...]]
    step(model, optimizer, x)
    np.testing.assert_array_equal(model.first.kernel[...], kernels[0])
    self.assertGreater(jnp.sum(abs(model.second.kernel[...] - kernels[1])), 0)
    energy = optimizer.opt_state.levels['slow'].accumulated_extra['energy']
    np.testing.assert_allclose(
      energy['first']['kernel'][...], jnp.sum(x**2) / 5, rtol=1e-5
    )
    step(model, optimizer, x)
    self.assertGreater(jnp.sum(abs(model.first.kernel[...] - kernels[0])), 0)

  def test_works_on_a_part_of_the_parameters(self):
    params, batch = small_models.make_mlp()
    value_and_grad, dgd = optimizers.dgd_for_model(
      small_models.mlp_loss, params, batch, learning_rate=0.5, target='printed'
    )
    _, gradients, extra = value_and_grad(params, batch)
    expected, _ = dgd.update(gradients, dgd.init(params), params, **extra)
    tx = optax.partition(
      {'dgd': dgd, 'none': optax.set_to_zero()},
      {'first': 'dgd', 'second': 'none'},
      mask_compatible_extra_args=True,
    )
    updates, _ = tx.update(gradients, tx.init(params), params, **extra)
    assert_close(updates['first'], expected['first'])
    for wrapper in (
      optax.partition(
        {'dgd': dgd, 'none': optax.set_to_zero()},
        {'first': 'dgd', 'second': 'none'},
      ),
      optax.masked(dgd, {'first': True, 'second': False}),
      optax.selective_transform(
        dgd, freeze_mask={'first': False, 'second': True}
      ),
    ):
      updates, _ = wrapper.update(
        gradients, wrapper.init(params), params, **extra
      )
      assert_close(updates['first'], expected['first'])
    with self.assertRaisesRegex(ValueError, r"energy has no value .*'third'"):
      third = {'third': jnp.ones((2, 2))}
      optimizers.dgd(1.0).update(
        third, optimizers.dgd(1.0).init(third), third, **extra
      )
    _, dgd = optimizers.dgd_for_model(
      small_models.mlp_loss,
      params,
      batch,
      learning_rate=0.5,
      fallback=optax.adam(0.1),
    )
    with self.assertRaisesRegex(ValueError, r"maps has no value .*\['third'\]"):
      dgd.init({'third': jnp.ones((2, 2))})

  def test_finds_convolutions_and_joined_kernels_of_an_lstm(self):
    x = jnp.ones((2, 3, 4))
    model = nn.Sequential([
      nn.Conv(5, (3,)),
      nn.RNN(nn.OptimizedLSTMCell(6)),
    ])  # fmt: skip
    params = model.init(jax.random.key(0), x)
    loss_fn = lambda params, x: jnp.mean(model.apply(params, x) ** 2)
    report = optimizers.parameter_report(loss_fn, params, x)
    rules = [info.dgd for info in report if 'kernel' in info.path]
    self.assertEqual(rules, ['map'] * 9)

  def test_does_not_warn_about_biases_of_attention(self):
    x = jnp.ones((2, 3, 4))
    model = nn.MultiHeadDotProductAttention(2)  # biases [heads, head_dim]
    params = model.init(jax.random.key(0), x)
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      optimizers.dgd_for_model(
        lambda params, x: jnp.mean(model.apply(params, x)),
        params,
        x,
        learning_rate=0.1,
      )

  def test_warns_about_matrices_that_it_cannot_follow(self):
    @jax.custom_vjp
    def multiply(w, x):
      return x @ w

    multiply.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: r)
    replicated = jax.shard_map(
      lambda w, x: x @ w,
      mesh=jax.make_mesh((1,), ('x',)),
      in_specs=(jax.P(), jax.P()),
      out_specs=jax.P(),
    )
    losses = {
      'shard_map': lambda params, x: jnp.sum(replicated(params['w'], x)),
      'custom_vjp': lambda params, x: jnp.sum(multiply(params['w'], x)),
      'mul': lambda params, x: jnp.sum(x @ (params['w'] * params['w'])),
      'dynamic_slice': lambda params, x: jax.lax.fori_loop(
        0,
        2,
        lambda i, y: y + jnp.sum(x[0] * (x @ params['w'][i][:, None])),
        0.0,
      ),
      'gather': lambda params, x: jnp.einsum(
        'bi,bio->', x, jnp.stack([params['w']] * 2)[jnp.arange(3) // 2]
      ),
      'lookup': lambda params, x: jnp.sum(params['w'][jnp.arange(3) // 2]),
    }
    params, x = {'w': jnp.eye(2), 'v': jnp.eye(2)}, jnp.ones((3, 2))
    for name, loss in losses.items():
      both = lambda p, x, loss=loss: loss(p, x) + jnp.sum(x @ p['v'])
      with self.subTest(name):
        if name == 'lookup':  # A table is no map, and needs no word.
          with warnings.catch_warnings():
            warnings.simplefilter('error')
            optimizers.dgd_for_model(both, params, x, learning_rate=0.1)
          continue
        with self.assertWarnsRegex(UserWarning, rf"\['w'\] \({name}"):
          optimizers.dgd_for_model(both, params, x, learning_rate=0.1)
        with self.assertRaisesRegex(ValueError, rf"lost .*\['w'\] \({name}"):
          optimizers.dgd_for_model(loss, params, x, learning_rate=0.1)

  def test_rejects_bad_arguments(self):
    params, batch = small_models.make_mlp()
    with self.assertRaisesRegex(ValueError, 'learning_rate=-1.0'):
      optimizers.dgd(-1.0)
    with self.assertRaisesRegex(ValueError, 'erase=-0.5 must be'):
      optimizers.dgd(1.0, target='printed', erase=-0.5)
    with self.assertRaisesRegex(ValueError, "fallback='adam' must be an optax"):
      optimizers.dgd(1.0, fallback='adam')
    tx = optimizers.dgd(1.0)
    with self.assertRaisesRegex(ValueError, 'extra argument energy='):
      tx.update(params, tx.init(params), params)
    with self.assertRaisesRegex(ValueError, "'n'.*int32"):
      tx.init({'n': jnp.zeros(2, jnp.int32)})
    with self.assertRaisesRegex(ValueError, 'nothing to erase'):
      optimizers.dgd_for_model(
        lambda params, batch: jnp.sum(params['first']['bias'] ** 2),
        params,
        batch,
        learning_rate=1.0,
      )
