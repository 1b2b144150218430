"""Tests the rule of M3 against plain loops."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers
from tests import compiling


def make_gradients(params, step, scale=1.0):
  rng = np.random.default_rng(step)
  return jax.tree.map(
    lambda leaf: jnp.array(scale * rng.normal(size=leaf.shape), leaf.dtype),
    params,
  )


def run(tx, params, num_steps, scale=1.0):
  """Returns the updates of every step."""
  state, history = tx.init(params), []
  update = compiling.jit(tx.update)
  for step in range(num_steps):
    updates, state = update(make_gradients(params, step, scale), state, params)
    history.append(updates)
  return history


def assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
    actual,
    expected,
  )


class ScaleByM3Test(parameterized.TestCase):
  @parameterized.parameters(0.0, 1.0)
  def test_ema_form_is_its_equations(self, damping):
    params = {'w': jnp.ones((6, 4))}
    every, weight, decay, slow_decay, second_decay = 3, 0.5, 0.9, 0.7, 0.8
    tx = optimizers.scale_by_m3(
      beta=decay,
      slow_decay=slow_decay,
      second_decay=second_decay,
      damping=damping,
      slow_every=every,
      slow_weight=weight,
      nesterov=False,
    )
    history = run(tx, params, 7)
    m = v = s = jnp.zeros((6, 4))
    direction, gradients = 0.0, []
    for t in range(1, 8):
      g = make_gradients(params, t - 1)['w']
      gradients.append(g)
      m = decay * m + (1 - decay) * g
      v = second_decay * v + (1 - second_decay) * g**2
      total = 1 + weight * (t > every)
      o = (optimizers.orthogonalize(m) + weight * direction) / total
      rms = lambda x: jnp.sqrt(jnp.mean(x**2))
      root = jnp.sqrt(v / (1 - second_decay**t))
      divided = o / (root + damping * rms(root) + 1e-8)
      expected = 0.2 * 6**0.5 * divided * rms(o) / rms(divided)
      np.testing.assert_allclose(history[t - 1]['w'], expected, atol=1e-4)
      if t % every == 0:
        mean = sum(gradients[-every:]) / every
        s = slow_decay * s + (1 - slow_decay) * mean
        direction = optimizers.orthogonalize(s)

  def test_paper_form_is_algorithm_1(self):
    params = {'w': jnp.ones((6, 4))}
    tx = optimizers.scale_by_m3(
      form='paper',
      beta=0.9,
      second_decay=0.8,
      slow_decay=0.7,
      slow_every=3,
      slow_weight=0.5,
      ns_coeffs='cubic',
      ns_steps=3,
    )
    history = run(tx, params, 9)
    newton_schulz = lambda x: optimizers.orthogonalize(
      x, coefficients='cubic', num_steps=3
    )
    m1 = m2 = v = jnp.zeros((6, 4))
    g = [make_gradients(params, i)['w'] for i in range(9)]
    for k in range(3):
      if k:
        m2 = m2 + 0.7 * sum(g[3 * (k - 1) : 3 * k])
      o2 = newton_schulz(m2)
      for t in range(3 * k, 3 * (k + 1)):
        m1 = m1 + 0.9 * g[t]
        v = v + 0.8 * g[t] ** 2
        o1 = newton_schulz(m1)
        expected = (o1 + 0.5 * o2) / (jnp.sqrt(v) + 1e-8)
        np.testing.assert_allclose(
          history[t]['w'], expected, rtol=1e-4, atol=1e-4
        )

  def test_step_size_does_not_grow_as_gradients_shrink(self):
    params = {'w': jnp.zeros((16, 16))}

    def rms_of_step(form):
      tx = optimizers.scale_by_m3(form=form)
      updates, _ = tx.update(
        make_gradients(params, 0, scale=1e-4), tx.init(params), params
      )
      return float(jnp.sqrt(jnp.mean(updates['w'] ** 2)))

    self.assertBetween(rms_of_step('ema'), 0.1, 0.3)
    self.assertGreater(rms_of_step('paper'), 100)

  def test_damping_limits_the_update_of_inactive_inputs(self):
    # One input is almost always zero: its gradients are 1e-4 of the others'.
    params = {'w': jnp.zeros((8, 8))}

    def share_of_silent_input(damping):
      tx = optimizers.scale_by_m3(damping=damping, slow_every=None)
      gradients = make_gradients(params, 0)['w'].at[0].multiply(1e-4)
      updates, _ = tx.update({'w': gradients}, tx.init(params), params)
      squares = jnp.sum(updates['w'] ** 2, axis=1)
      return float(squares[0] / jnp.sum(squares))

    self.assertGreater(share_of_silent_input(0.0), 0.5)
    self.assertLess(share_of_silent_input(1.0), 0.15)

  def test_two_slow_clocks(self):
    params = {'w': jnp.zeros((4, 4))}
    tx = optimizers.scale_by_m3(
      slow_every=(2, 4), slow_weight=(0.5, 0.25), ns_steps=2
    )
    state, changes = tx.init(params), []
    for step in range(8):
      _, new = tx.update(make_gradients(params, step), state)
      changes.append(
        [
          bool(jnp.any(a.direction['w'] != b.direction['w']))
          for a, b in zip(state.slow, new.slow, strict=True)
        ]
      )
      state = new
    self.assertEqual([c[0] for c in changes], [False, True] * 4)
    self.assertEqual([c[1] for c in changes], [False, False, False, True] * 2)

  def test_slow_direction_is_computed_inside_a_cond(self):
    params = {'w': jnp.zeros((4, 6))}
    tx = optimizers.scale_by_m3(ns_steps=2)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params))
    text = str(jaxpr.jaxpr)
    outside = [
      eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == 'dot_general'
    ]
    self.assertGreater(text.count('dot_general'), len(outside))
    self.assertIn('cond', text)

  @parameterized.parameters(None, 'bfloat16')
  def test_is_the_same_for_gradients_of_any_size(self, mu_dtype):
    params = {'w': jnp.zeros((8, 6))}
    tx = optimizers.scale_by_m3(slow_every=2, mu_dtype=mu_dtype)
    histories = [run(tx, params, 5, scale) for scale in (2.0**-9, 1.0, 2.0**50)]
    for history in histories:
      assert_close(history, histories[1], 1e-3)

  def test_gradients_that_overflow_or_vanish_give_no_nan(self):
    params = {'w': jnp.zeros((8, 6))}
    tx = optimizers.scale_by_m3(slow_every=2)
    for scale in (0.0, 1e-30, 1e19, 1e30):
      for updates in run(tx, params, 5, scale):
        self.assertTrue(jnp.all(jnp.isfinite(updates['w'])), scale)

  def test_derivative_at_a_gradient_of_zero_is_finite(self):
    params = {'w': jnp.zeros((4, 3))}
    tx = optimizers.scale_by_m3(slow_every=2, ns_steps=2)

    def two_steps(gradients):
      state, total = tx.init(params), 0.0
      for _ in range(2):
        updates, state = tx.update(gradients, state)
        total += jnp.sum(updates['w'])
      return total

    derive = compiling.jit(jax.grad(two_steps))
    for gradients in (params, {'w': jnp.zeros((4, 3)).at[0].set(1.0)}):
      derivative = derive(gradients)['w']
      self.assertTrue(jnp.all(jnp.isfinite(derivative)))

  def test_bfloat16_keeps_what_small_gradients_add_up_to(self):
    # A large gradient, then many that point elsewhere with 1 % of its size.
    params = {'w': jnp.zeros((16, 8))}
    first, rest = [make_gradients(params, i)['w'] for i in range(2)]
    wide, narrow = [
      optimizers.scale_by_m3(slow_every=4, ns_steps=1, mu_dtype=dtype)
      for dtype in (None, jnp.bfloat16)
    ]

    @compiling.jit_static('tx')
    def train(tx):
      def step(state, i):
        gradients = {'w': jnp.where(i == 0, first, 0.01 * rest)}
        updates, state = tx.update(gradients, state)
        return state, updates['w']

      return jax.lax.scan(step, tx.init(params), jnp.arange(60))

    (expected, directions), (actual, others) = train(tx=wide), train(tx=narrow)
    error = lambda a, b: float(
      jnp.linalg.norm(a.astype(b.dtype) - b) / jnp.linalg.norm(b)
    )
    self.assertEqual(actual.slow[0].momentum['w'].dtype, jnp.float32)
    for dtype in (
      actual.momentum['w'].dtype,
      actual.slow[0].direction['w'].dtype,
      actual.second_moment['w'].dtype,
    ):
      self.assertEqual(dtype, jnp.bfloat16)
    slow, moments = actual.slow[0].momentum['w'], expected.slow[0].momentum['w']
    self.assertLess(error(slow, moments), 1e-6)
    moments = expected.momentum['w']
    self.assertLess(error(actual.momentum['w'], moments), 0.05)
    self.assertLess(error(others[-1], directions[-1]), 0.03)

  def test_dimension_numbers_are_matrices_computed_by_hand(self):
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = {'query': (8, 2, 3), 'experts': (2, 4, 6)}
    params = {
      name: jax.random.normal(key, shape)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    numbers = {
      'query': optax.contrib.MuonDimensionNumbers(0, (-2, -1)),
      'experts': optax.contrib.MuonDimensionNumbers((2,), (1,)),
    }
    tx = optimizers.scale_by_m3(slow_every=2, dimension_numbers=numbers)
    flatten = lambda tree: {
      'query': tree['query'].reshape(8, 6),
      'first': tree['experts'][0].T,
      'second': tree['experts'][1].T,
    }
    plain = optimizers.scale_by_m3(slow_every=2)
    update, plain_update = compiling.jit(tx.update), compiling.jit(plain.update)
    state, flat_state = tx.init(params), plain.init(flatten(params))
    for step in range(4):
      gradients = make_gradients(params, step)
      updates, state = update(gradients, state)
      expected, flat_state = plain_update(flatten(gradients), flat_state)
      assert_close(flatten(updates), expected)
    self.assertEqual(state.momentum['query'].shape, (8, 2, 3))

  @parameterized.named_parameters(
    ('period', 'slow_every=0', {'slow_every': 0}),
    ('fraction', 'slow_every=2.5', {'slow_every': 2.5}),
    ('form', "form='adam'", {'form': 'adam'}),
    ('decay', 'beta=1.0', {'beta': 1.0}),
    ('second', 'second_decay=1.5', {'second_decay': 1.5}),
    ('steps', 'ns_steps=0', {'ns_steps': 0}),
    ('name', "ns_coeffs='linear'", {'ns_coeffs': 'linear'}),
    ('weights', 'one per clock', {'slow_weight': (1.0, 2.0)}),
  )
  def test_rejects_bad_arguments(self, message, settings):
    with self.assertRaisesRegex(ValueError, message):
      optimizers.scale_by_m3(**settings)

  def test_rejects_parameters_that_are_no_matrices(self):
    with self.assertRaisesRegex(ValueError, r"\['b'\] of shape \(3,\)"):
      optimizers.scale_by_m3().init({'b': jnp.ones(3)})
    tx = optimizers.scale_by_m3(dimension_numbers={'w': None})
    with self.assertRaisesRegex(ValueError, r"\['w'\] is no matrix.*use m3"):
      tx.init({'w': jnp.ones((2, 2))})

  def test_rejects_integer_and_complex_parameters(self):
    for dtype in (jnp.int32, jnp.complex64):
      with self.assertRaisesRegex(ValueError, "'n'.*dtype"):
        optimizers.scale_by_m3().init({'n': jnp.zeros((2, 2), dtype)})
