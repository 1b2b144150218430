"""Tests Delta Gradient Descent against its objective, in all frameworks."""

import functools
import warnings

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

printed_grad = functools.partial(
  optimizers.value_and_delta_grad, target='printed'
)


def make_mlp():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    'first': {
      'kernel': jax.random.normal(keys[0], (3, 5)),
      'bias': jnp.ones(5),
    },
    'second': {'kernel': jax.random.normal(keys[1], (5, 2))},
  }
  x, y = jax.random.normal(keys[2], (7, 3)), jax.random.normal(keys[3], (7, 2))
  return params, (x, y)


def mlp(params, x):
  hidden = jnp.tanh(x @ params['first']['kernel'] + params['first']['bias'])
  return hidden @ params['second']['kernel']


def mlp_loss(params, batch):
  return jnp.mean(jnp.sum((mlp(params, batch[0]) - batch[1]) ** 2, -1))


def defined_gradient(params, batch, erase):
  """Returns the gradient of the loss plus 1/2 |W x|^2 per map, x fixed."""
  x = batch[0]
  hidden = jnp.tanh(x @ params['first']['kernel'] + params['first']['bias'])

  def objective(params):
    first = x @ params['first']['kernel']
    second = jax.lax.stop_gradient(hidden) @ params['second']['kernel']
    pull = jnp.sum(first**2) + jnp.sum(second**2)
    return mlp_loss(params, batch) + erase / 2 * pull / x.shape[0]

  energy = {
    'first': {'kernel': jnp.sum(x**2) / 7, 'bias': 0.0},
    'second': {'kernel': jnp.sum(hidden**2) / 7},
  }
  return jax.grad(objective)(params), energy


def assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
    actual,
    expected,
  )


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(x))), None


class Stack(nn.Module):
  """Layers stacked by scan, under remat, after a norm."""

  scanned: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(x)
    if self.scanned:
      layers = nn.scan(
        nn.remat(Block),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=3,
      )
      x, _ = layers(name='layers')(x, None)
    else:
      for i in range(3):
        x, _ = Block(name=f'layer_{i}')(x, None)
    return nn.Dense(2, name='head')(x)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(3, 5, rngs=rngs)
    self.norm = nnx.BatchNorm(5, rngs=rngs)
    self.second = nnx.Linear(5, 2, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.norm(self.first(x))))


def minimise(objective, start):
  """Returns the minimum of a quadratic function, by Newton's method."""
  size = start.size
  gradient = jax.grad(objective)(start).reshape(size)
  hessian = jax.hessian(objective)(start).reshape(size, size)
  return start - jnp.linalg.solve(hessian, gradient).reshape(start.shape)


def train(tx, value_and_grad, params, batch, num_steps):
  """Returns the parameters after many steps on one batch."""

  def body(_, carry):
    params, state = carry
    _, gradients, extra = value_and_grad(params, batch)
    updates, state = tx.update(gradients, state, params, **extra)
    return optax.apply_updates(params, updates), state

  carry = params, tx.init(params)
  return jax.lax.fori_loop(0, num_steps, body, carry)[0]


class TargetTest(parameterized.TestCase):
  @parameterized.product(
    target=('corrected', 'printed'),
    length=(0.2, 1.0, 5.0),
    learning_rate=(0.1, 10.0),
  )
  def test_one_sample_is_the_exact_minimiser(
    self, target, length, learning_rate
  ):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      kernel = jnp.array(rng.normal(size=(4, 3)))
      x = jnp.array(rng.normal(size=4))
      x *= length / jnp.linalg.norm(x)
      label = rng.normal(size=3)
      loss_of = lambda y: jnp.sum(jnp.cos(y - label))
      loss_fn = lambda kernel, x: loss_of(x @ kernel)

      value_and_grad, tx = optimizers.dgd_for_model(
        loss_fn, kernel, x, learning_rate=learning_rate, target=target
      )
      _, grad, extra = value_and_grad(kernel, x)
      updates, _ = tx.update(grad, tx.init(kernel), kernel, **extra)

      u = -jax.grad(loss_of)(x @ kernel)
      if target == 'corrected':
        u = x @ kernel + u

      def objective(new):
        distance = jnp.sum((new - kernel) ** 2)
        fit = jnp.sum((x @ new - u) ** 2)
        return fit / 2 + distance / (2 * learning_rate)

      np.testing.assert_allclose(
        kernel + updates, minimise(objective, jnp.zeros((4, 3))), atol=1e-9
      )

  def test_many_samples_step_less_than_the_exact_minimiser(self):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      kernel = jnp.array(rng.normal(size=(4, 3)))
      x = jnp.array(rng.normal(size=(9, 4)) * [0.1, 0.5, 2.0, 6.0])
      y = jnp.array(rng.normal(size=(9, 3)))
      loss_fn = lambda kernel, x: jnp.mean(jnp.sum(jnp.sin(x @ kernel - y), 1))
      value_and_grad, tx = optimizers.dgd_for_model(
        loss_fn, kernel, x, learning_rate=3.0
      )
      _, grad, extra = value_and_grad(kernel, x)
      updates, _ = tx.update(grad, tx.init(kernel), kernel, **extra)
      target = x @ kernel - jnp.cos(x @ kernel - y)

      def objective(new):
        fit = jnp.mean(jnp.sum((x @ new - target) ** 2, axis=1))
        return fit / 2 + jnp.sum((new - kernel) ** 2) / 6.0

      exact = minimise(objective, kernel) - kernel
      # In every direction of the inputs, the same way and not as far.
      directions = jnp.linalg.svd(x, full_matrices=False)[2]
      ours, best = directions @ updates, directions @ exact
      ratio = ours / best
      self.assertGreater(jnp.min(ratio), 0.0)
      self.assertLess(jnp.max(ratio), 1.0)
      self.assertLess(objective(kernel + updates), objective(kernel))

  def test_fixed_points_of_corrected_are_those_of_the_loss(self):
    x = jax.random.normal(jax.random.key(0), (32, 4))
    y = x @ jax.random.normal(jax.random.key(1), (4, 2)) + 0.3
    loss_fn = lambda kernel, batch: jnp.mean(
      jnp.sum((batch[0] @ kernel - batch[1]) ** 2, axis=1)
    )
    solution = jnp.linalg.lstsq(x, y)[0]
    found = {}
    for target in ('corrected', 'printed'):
      value_and_grad, tx = optimizers.dgd_for_model(
        loss_fn, jnp.zeros((4, 2)), (x, y), learning_rate=1.0, target=target
      )
      found[target] = train(tx, value_and_grad, jnp.zeros((4, 2)), (x, y), 400)
    np.testing.assert_allclose(found['corrected'], solution, atol=1e-4)
    # Half the square error plus the paper's term: 2 / (2 + 1) of the way.
    np.testing.assert_allclose(found['printed'], solution * 2 / 3, atol=1e-4)

  @parameterized.named_parameters(
    ('momentum', optax.trace(0.9), 0.1),
    ('adam', optax.scale_by_adam(), 0.02),
    ('clip', optax.clip_by_global_norm(1.0), 0.3),
  )
  def test_other_rules_chain_onto_the_direction(self, rule, learning_rate):
    params, batch = make_mlp()
    value_and_grad = optimizers.value_and_delta_grad(mlp_loss)
    tx = optax.chain(
      optimizers.scale_by_dgd(learning_rate),
      rule,
      optax.scale_by_learning_rate(learning_rate),
    )
    trained = jax.jit(train, static_argnums=(0, 1, 4))(
      tx, value_and_grad, params, batch, 500
    )
    self.assertLess(mlp_loss(trained, batch), 0.05 * mlp_loss(params, batch))

  def test_corrected_step_is_safe_at_any_rate(self):
    # Inputs of very different lengths, where gradient descent diverges.
    x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.arange(1, 9)
    y = jax.random.normal(jax.random.key(1), (64, 4))
    loss_fn = lambda kernel, batch: (
      0.5 * jnp.mean(jnp.sum((batch[0] @ kernel - batch[1]) ** 2, axis=1))
    )
    value_and_grad, tx = optimizers.dgd_for_model(
      loss_fn, jnp.zeros((8, 4)), (x, y), learning_rate=1e6
    )
    losses = []
    for num_steps in (0, 1, 10, 100):
      kernel = train(tx, value_and_grad, jnp.zeros((8, 4)), (x, y), num_steps)
      losses.append(loss_fn(kernel, (x, y)))
    self.assertTrue(all(np.diff(losses) < 0))

  def test_rejects_settings_of_the_other_target(self):
    params, batch = make_mlp()
    with self.assertRaisesRegex(ValueError, "erase=0.5 .* target='printed'"):
      optimizers.dgd(1.0, erase=0.5)
    with self.assertRaisesRegex(ValueError, "erase=0.5 .* target='printed'"):
      optimizers.value_and_delta_grad(mlp_loss, erase=0.5)
    with self.assertRaisesRegex(ValueError, "target='paper' is not one of"):
      optimizers.dgd(1.0, target='paper')
    tx = optimizers.dgd(1.0)
    for energy in (jnp.ones(3), jnp.ones((2, 5))):
      with self.assertRaisesRegex(ValueError, r'does not fit .*\(5, 2\)'):
        tx.update(
          params['second'],
          tx.init(params),
          energy={'kernel': energy},
        )
    with self.assertRaisesRegex(ValueError, 'takes no projection'):
      tx.update(
        params, tx.init(params), params, energy=params, projection=params
      )


class PrintedTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.3, 1.0)
  def test_capture_adds_the_defined_term(self, erase):
    params, batch = make_mlp()
    loss, gradients, extra = jax.jit(
      optimizers.value_and_delta_grad(mlp_loss, target='printed', erase=erase)
    )(params, batch)
    expected, energy = defined_gradient(params, batch, erase)
    np.testing.assert_allclose(loss, mlp_loss(params, batch), rtol=1e-6)
    assert_close(gradients, expected)
    assert_close(extra['energy'], energy)

  def test_update_is_the_rule(self):
    params, batch = make_mlp()
    value_and_grad, tx = optimizers.dgd_for_model(
      mlp_loss, params, batch, learning_rate=0.5, target='printed'
    )
    _, gradients, extra = value_and_grad(params, batch)
    updates, _ = tx.update(gradients, tx.init(params), params, **extra)
    expected, energy = defined_gradient(params, batch, 1.0)
    for name in ('first', 'second'):
      rate = 0.5 / (1 + 0.5 * energy[name]['kernel'])
      np.testing.assert_allclose(
        updates[name]['kernel'], -rate * expected[name]['kernel'], rtol=1e-5
      )
    # The bias has no captured input: gradient descent by default.
    np.testing.assert_allclose(
      updates['first']['bias'], -0.5 * expected['first']['bias'], rtol=1e-5
    )

  def test_projection_can_be_an_extra_argument(self):
    params, batch = make_mlp()
    value_and_grad, tx = optimizers.dgd_for_model(
      mlp_loss, params, batch, learning_rate=0.5, target='printed', erase=0.7
    )
    _, gradients, extra = value_and_grad(params, batch)
    folded, _ = tx.update(gradients, tx.init(params), params, **extra)
    plain = jax.grad(mlp_loss)(params, batch)
    whole, _ = defined_gradient(params, batch, 1.0)
    projection = jax.tree.map(jnp.subtract, whole, plain)
    updates, _ = tx.update(
      plain, tx.init(params), params, projection=projection, **extra
    )
    assert_close(updates, folded)

  def test_step_contracts_at_any_rate(self):
    x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.arange(1, 9)
    kernel = jax.random.normal(jax.random.key(1), (8, 4))
    # A loss that hardly depends on the map: the erasing term alone acts.
    loss_fn = lambda kernel, x: 1e-20 * jnp.sum(x @ kernel)
    value_and_grad, tx = optimizers.dgd_for_model(
      loss_fn, kernel, x, learning_rate=1e6, target='printed'
    )
    state = tx.init(kernel)
    for _ in range(5):
      _, gradient, extra = value_and_grad(kernel, x)
      updates, state = tx.update(gradient, state, kernel, **extra)
      shorter = kernel + updates
      self.assertLess(jnp.linalg.norm(x @ shorter), jnp.linalg.norm(x @ kernel))
      # No direction is pulled past zero.
      self.assertGreater(jnp.sum(shorter * kernel), 0)
      kernel = shorter

  def test_erase_zero_is_gradient_descent(self):
    params, batch = make_mlp()
    value_and_grad, tx = optimizers.dgd_for_model(
      mlp_loss, params, batch, learning_rate=0.1, target='printed', erase=0.0
    )
    _, gradients, extra = value_and_grad(params, batch)
    updates, _ = tx.update(gradients, tx.init(params), params, **extra)
    expected = jax.tree.map(lambda g: -0.1 * g, jax.grad(mlp_loss)(*make_mlp()))
    assert_close(updates, expected)

  def test_data_in_pieces_counts_as_one_batch(self):
    params, batch = make_mlp()
    batch = jax.tree.map(lambda leaf: leaf[:6], batch)

    def in_pieces(params, batch):
      def body(total, piece):
        return total + mlp_loss(params, piece) / 3, None

      pieces = jax.tree.map(lambda leaf: leaf.reshape(3, 2, -1), batch)
      return jax.lax.scan(body, 0.0, pieces)[0]

    expected = printed_grad(mlp_loss)(params, batch)
    actual = printed_grad(in_pieces)(params, batch)
    assert_close(actual, expected)

  def test_shared_map_sums_its_uses(self):
    kernel = jax.random.normal(jax.random.key(0), (3, 3))
    x = jax.random.normal(jax.random.key(1), (4, 3))
    twice = lambda kernel, x: jnp.sum(jnp.tanh(x @ kernel) @ kernel) / 4
    _, gradient, extra = printed_grad(twice)(kernel, x)
    hidden = jnp.tanh(x @ kernel)
    gram = (x.T @ x + hidden.T @ hidden) / 4
    expected = jax.grad(twice)(kernel, x) + gram @ kernel
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    np.testing.assert_allclose(extra['energy'], jnp.trace(gram), rtol=1e-5)

  def test_linen_stacked_layers_equal_separate_ones(self):
    x = jax.random.normal(jax.random.key(1), (5, 4))
    scanned, separate = Stack(True), Stack(False)
    params = scanned.init(jax.random.key(0), x)['params']
    unstacked = {name: params[name] for name in ('LayerNorm_0', 'head')}
    for i in range(3):
      unstacked[f'layer_{i}'] = jax.tree.map(
        lambda p, i=i: p[i], params['layers']
      )

    def make_loss(model):
      return lambda params, x: jnp.mean(model.apply({'params': params}, x) ** 2)

    outputs = [
      jax.jit(printed_grad(make_loss(model)))(tree, x)
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


class ModelTest(parameterized.TestCase):
  def test_trains_with_a_linen_train_state(self):
    model = Stack(True)
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
    model = Net(nnx.Rngs(0))
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
    model = Net(nnx.Rngs(0))
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
    model = Net(nnx.Rngs(0))
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
    params, batch = make_mlp()
    value_and_grad, dgd = optimizers.dgd_for_model(
      mlp_loss, params, batch, learning_rate=0.5, target='printed'
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
      mlp_loss, params, batch, learning_rate=0.5, fallback=optax.adam(0.1)
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
    params, batch = make_mlp()
    with self.assertRaisesRegex(ValueError, 'learning_rate=-1.0'):
      optimizers.dgd(-1.0)
    with self.assertRaisesRegex(ValueError, 'erase=-0.5 must be'):
      optimizers.dgd(1.0, target='printed', erase=-0.5)
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


if __name__ == '__main__':
  absltest.main()
