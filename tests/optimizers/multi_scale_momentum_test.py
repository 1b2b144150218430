"""Tests M3 against Muon, against plain loops, and across devices."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers
from nested_learning.optimizers import placement
from tests import compiling


def make_params():
  keys = jax.random.split(jax.random.key(0), 3)
  return {
    'tall': jax.random.normal(keys[0], (12, 5)),
    'wide': jax.random.normal(keys[1], (4, 9)),
    'bias': jax.random.normal(keys[2], (9,)),
  }


def make_gradients(params, step, scale=1.0):
  rng = np.random.default_rng(step)
  return jax.tree.map(
    lambda leaf: jnp.array(scale * rng.normal(size=leaf.shape), leaf.dtype),
    params,
  )


def run(tx, params, num_steps):
  """Returns the updates of every step."""
  state, history = tx.init(params), []
  update = jax.jit(tx.update)
  for step in range(num_steps):
    updates, state = update(make_gradients(params, step), state, params)
    history.append(updates)
  return history


def assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
    actual,
    expected,
  )


class M3Test(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_one_clock_without_second_moment_is_muon(self, nesterov):
    params = make_params()
    ours = optimizers.m3(
      1e-2,
      slow_every=(),
      second_decay=None,
      nesterov=nesterov,
      weight_decay=0.1,
      adam_decays=(0.9, 0.999),
    )
    muon = optax.contrib.muon(
      1e-2,
      nesterov=nesterov,
      weight_decay=0.1,
      adam_weight_decay=0.1,
      consistent_rms=0.2,
    )
    ours, expected = run(ours, params, 4), run(muon, params, 4)
    for name in ('tall', 'wide'):
      assert_close([u[name] for u in ours], [u[name] for u in expected])
    if not nesterov:  # optax's Muon gives Adam Nesterov's momentum as well.
      assert_close(ours, expected)

  @parameterized.parameters(0.0, 1.0)
  def test_ema_form_is_its_equations(self, damping):
    params = {'w': jnp.ones((6, 4))}
    every, weight, decay, slow_decay, second_decay = 3, 0.5, 0.9, 0.7, 0.8
    tx = optimizers.m3(
      0.1,
      decay=decay,
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
      expected = -0.1 * 0.2 * 6**0.5 * divided * rms(o) / rms(divided)
      np.testing.assert_allclose(history[t - 1]['w'], expected, atol=1e-5)
      if t % every == 0:
        mean = sum(gradients[-every:]) / every
        s = slow_decay * s + (1 - slow_decay) * mean
        direction = optimizers.orthogonalize(s)

  def test_paper_form_is_algorithm_1(self):
    params = {'w': jnp.ones((6, 4))}
    tx = optimizers.m3(
      0.1,
      form='paper',
      decay=0.9,
      second_decay=0.8,
      slow_decay=0.7,
      slow_every=3,
      slow_weight=0.5,
      coefficients='cubic',
      num_steps=3,
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
        expected = -0.1 * (o1 + 0.5 * o2) / (jnp.sqrt(v) + 1e-8)
        np.testing.assert_allclose(
          history[t]['w'], expected, rtol=1e-4, atol=1e-5
        )

  def test_step_size_does_not_grow_as_gradients_shrink(self):
    params = {'w': jnp.zeros((16, 16))}

    def rms_of_step(form):
      tx = optimizers.m3(1.0, form=form)
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
      tx = optimizers.m3(1.0, damping=damping, slow_every=())
      gradients = make_gradients(params, 0)['w'].at[0].multiply(1e-4)
      updates, _ = tx.update({'w': gradients}, tx.init(params), params)
      squares = jnp.sum(updates['w'] ** 2, axis=1)
      return float(squares[0] / jnp.sum(squares))

    self.assertGreater(share_of_silent_input(0.0), 0.5)
    self.assertLess(share_of_silent_input(1.0), 0.15)

  def test_two_slow_clocks(self):
    params = {'w': jnp.zeros((4, 4))}
    tx = optimizers.scale_by_m3(
      slow_every=(2, 4), slow_weight=(0.5, 0.25), num_steps=2
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
    tx = optimizers.scale_by_m3(num_steps=2)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params))
    text = str(jaxpr.jaxpr)
    outside = [
      eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == 'dot_general'
    ]
    self.assertGreater(text.count('dot_general'), len(outside))
    self.assertIn('cond', text)

  def test_adam_updates_leaves_that_are_not_matrices(self):
    params = {
      'embedding': jnp.ones((5, 4)),
      'mlp': {'kernel': jnp.ones((4, 4)), 'bias': jnp.ones(4)},
      'scale': jnp.ones(()),
    }
    tx = optimizers.m3(1e-2, adam_learning_rate=3e-3)
    adam = optax.adamw(3e-3, 0.9, 0.95, weight_decay=0.0)
    ours, expected = run(tx, params, 3), run(adam, params, 3)
    for u, e in zip(ours, expected, strict=True):
      assert_close(u['embedding'], e['embedding'])
      assert_close(u['mlp']['bias'], e['mlp']['bias'])
      assert_close(u['scale'], e['scale'])
      self.assertGreater(
        jnp.max(jnp.abs(u['mlp']['kernel'] - e['mlp']['kernel'])), 1e-4
      )
    only = optimizers.m3(1e-2, matrices=lambda path, _: 'embedding' in path)
    state = only.init(params).inner_states['m3'].inner_state[0]
    self.assertLen(jax.tree.leaves(state.momentum), 1)

  @parameterized.product(
    spec=(jax.P(None, 'x', None), jax.P(None, None, 'x')),
    axis_type=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit),
  )
  def test_sharded_equals_unsharded(self, spec, axis_type):
    params = {'stack': jax.random.normal(jax.random.key(0), (3, 8, 16))}
    tx = optimizers.m3(1e-2, slow_every=2, num_steps=2)
    expected = run(tx, params, 3)
    mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
      sharding = jax.NamedSharding(mesh, spec)
      params = jax.device_put(params, sharding)
      state, update = tx.init(params), jax.jit(tx.update)
      for step in range(3):
        gradients = jax.device_put(make_gradients(params, step), sharding)
        updates, state = update(gradients, state, params)
        assert_close(updates, expected[step])
    momentum = state.inner_states['m3'].inner_state[0].momentum['stack']
    self.assertEqual(momentum.sharding.spec, spec)

  @parameterized.product(
    spec=(jax.P(), jax.P('x'), jax.P(None, 'x'), jax.P(None, None, 'x')),
    axis_type=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit),
  )
  def test_no_device_orthogonalises_the_whole_stack(self, spec, axis_type):
    mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
      sharding = jax.NamedSharding(mesh, spec)
      params = {'stack': jax.device_put(jnp.ones((16, 8, 24)), sharding)}
      tx = optimizers.m3(1e-2)
      program = compiling.jit(tx.update).lower(params, tx.init(params), params)
    # What one device multiplies: two matrices of the sixteen, never more.
    shapes = re.findall(
      r'f32\[([\d,]+)\]\S* dot\(', program.compile().as_text()
    )
    self.assertNotEmpty(shapes)
    self.assertEqual({shape.split(',')[0] for shape in shapes}, {'2'})

  def test_mesh_can_be_given(self):
    mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((8, 4, 6)), jax.NamedSharding(mesh, jax.P()))
    orthogonalize = optimizers.orthogonalize
    whole = jax.jit(orthogonalize)
    spread = jax.jit(lambda x: placement.map_stack(orthogonalize, x, mesh))
    flops = [
      f.lower(x).compile().cost_analysis()['flops'] for f in (whole, spread)
    ]
    self.assertLess(flops[1], flops[0] / 4)

  @parameterized.named_parameters(
    ('rate', 'learning_rate=-1', {'learning_rate': -1}),
    ('period', 'slow_every=0', {'slow_every': 0}),
    ('fraction', 'slow_every=2.5', {'slow_every': 2.5}),
    ('form', "form='adam'", {'form': 'adam'}),
    ('decay', 'decay=1.0', {'decay': 1.0}),
    ('second', 'second_decay=1.5', {'second_decay': 1.5}),
    ('steps', 'num_steps=0', {'num_steps': 0}),
    ('name', "coefficients='linear'", {'coefficients': 'linear'}),
    ('weights', 'one per clock', {'slow_weight': (1.0, 2.0)}),
  )
  def test_rejects_bad_arguments(self, message, settings):
    with self.assertRaisesRegex(ValueError, message):
      optimizers.m3(**{'learning_rate': 1e-3, **settings})

  def test_rejects_integer_and_complex_parameters(self):
    for dtype in (jnp.int32, jnp.complex64):
      with self.assertRaisesRegex(ValueError, "'n'.*dtype"):
        optimizers.m3(1e-3).init({'n': jnp.zeros((2, 2), dtype)})


if __name__ == '__main__':
  absltest.main()
