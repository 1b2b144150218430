"""Tests delta and preconditioned momentum against their objectives."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers


def make_gradients(num_steps, shape=(4, 3), scale=1.0):
  return scale * jax.random.normal(jax.random.key(0), (num_steps, *shape))


def run(tx, gradients):
  """Returns the updates of every step, [step, ...]."""

  def body(state, g):
    updates, state = tx.update({'w': g}, state)
    return state, updates['w']

  return jax.lax.scan(body, tx.init({'w': gradients[0]}), gradients)[1]


class DeltaMomentumTest(parameterized.TestCase):
  def test_without_erasing_is_averaged_momentum(self):
    gradients = make_gradients(5)
    average = optax.chain(optax.ema(0.8, debias=False), optax.scale(-0.1))
    np.testing.assert_allclose(
      run(optimizers.delta_momentum(0.1, decay=0.8, erase=0.0), gradients),
      run(average, gradients),
      rtol=1e-5,
      atol=1e-6,
    )

  def test_paper_form_descends_its_objective(self):
    gradients = make_gradients(4, scale=0.3)
    tx = optimizers.delta_momentum(0.1, form='paper', decay=0.9)
    history = run(tx, gradients)
    m, value = jnp.zeros((4, 3)), 0.1 * jnp.eye(3)
    for g, update in zip(gradients, history, strict=True):
      # Keys: columns of g; values: -lr times unit vectors (P is the identity).
      objective = lambda m, g=g: 0.5 * jnp.sum((g.T @ m + value) ** 2)
      m = 0.9 * m - jax.grad(objective)(m)
      np.testing.assert_allclose(update, m, rtol=1e-4, atol=1e-6)

  def test_stable_form_is_its_equation(self):
    gradients = make_gradients(4)
    tx = optimizers.delta_momentum(0.1, decay=0.9, erase=0.5)
    m = jnp.zeros((4, 3))
    for g, update in zip(gradients, run(tx, gradients), strict=True):
      m = 0.9 * m - 0.5 * g @ g.T @ m / jnp.sum(g**2) + 0.1 * g
      np.testing.assert_allclose(update, -0.1 * m, rtol=1e-4, atol=1e-6)

  @parameterized.parameters(1e-25, 1e-3, 1.0, 1e3, 1e13, 1e20)
  def test_stable_form_is_bounded_at_every_scale(self, scale):
    gradients = make_gradients(300, scale=scale)
    stable = optimizers.delta_momentum(1.0, erase=1.0)
    steps = jnp.linalg.norm(run(stable, gradients) / scale, axis=(1, 2))
    self.assertLess(steps.max(), 4)
    if scale == 1e3:
      literal = optimizers.delta_momentum(1.0, form='paper')
      self.assertFalse(jnp.all(jnp.isfinite(run(literal, gradients))))

  def test_erases_along_the_gradient_only(self):
    tx = optimizers.delta_momentum(1.0, decay=0.9, erase=0.9)
    first, second = jnp.array([3.0, 0.0]), jnp.array([0.0, 2.0])
    again, turned = (
      run(tx, jnp.stack([first, first])),
      run(tx, jnp.stack([first, second])),
    )
    np.testing.assert_allclose(again[1], -0.1 * first, atol=1e-6)
    np.testing.assert_allclose(
      turned[1], -(0.09 * first + 0.1 * second), atol=1e-6
    )

  @parameterized.product(
    ({'share': 0.9, 'converges': True}, {'share': 1.1, 'converges': False}),
    erase=(0.0, 0.2),
  )
  def test_is_stable_up_to_its_rate(self, share, converges, erase):
    curvature, decay = 1000.0, 0.9
    limit = 2 * (1 + decay - erase) / ((1 - decay) * curvature)
    tx = optimizers.delta_momentum(share * limit, decay=decay, erase=erase)

    def body(_, carry):
      x, state = carry
      updates, state = tx.update(curvature * x, state)
      return x + updates, state

    x, _ = jax.lax.fori_loop(0, 500, body, (jnp.ones(1), tx.init(jnp.ones(1))))
    self.assertEqual(bool(jnp.abs(x[0]) < 1), converges)

  def test_rates_of_the_paper_form_are_inside_or_outside(self):
    gradients = make_gradients(4, scale=0.3)
    m = jnp.zeros((4, 3))
    tx = optimizers.delta_momentum(0.1, form='paper', decay=0.9)
    for g, update in zip(gradients, run(tx, gradients), strict=True):
      m = 0.9 * m - g @ g.T @ m - 0.1 * g
      np.testing.assert_allclose(update, m, rtol=1e-4, atol=1e-6)

  def test_values_come_from_the_preconditioner(self):
    gradients = make_gradients(3)
    tx = optimizers.delta_momentum(
      1.0, decay=0.0, erase=0.0, preconditioner=optax.scale_by_sign()
    )
    np.testing.assert_allclose(run(tx, gradients), -jnp.sign(gradients))

  def test_stack_is_kernel_by_kernel(self):
    gradients = make_gradients(3, (2, 4, 3))
    tx = optimizers.delta_momentum(0.1)
    whole = run(tx, gradients)
    for i in range(2):
      np.testing.assert_allclose(
        whole[:, i], run(tx, gradients[:, i]), rtol=1e-5, atol=1e-6
      )

  def test_rejects_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, 'erase=2.5 is above 1 . decay'):
      optimizers.delta_momentum(0.1, erase=2.5)
    with self.assertRaisesRegex(ValueError, 'decay=1'):
      optimizers.delta_momentum(0.1, decay=1.0)
    with self.assertRaisesRegex(ValueError, "form='printed'"):
      optimizers.delta_momentum(0.1, form='printed')

  @parameterized.named_parameters(
    ('attention', (6, 2, 3), optax.contrib.MuonDimensionNumbers((0,), (1, 2))),
    ('output', (2, 3, 6), optax.contrib.MuonDimensionNumbers((0, 1), (2,))),
    ('transposed', (5, 4), optax.contrib.MuonDimensionNumbers(1, 0)),
    ('stacked', (4, 3, 5), optax.contrib.MuonDimensionNumbers(2, 0)),
  )
  def test_dimension_numbers_are_those_of_a_matrix(self, shape, numbers):
    gradients = make_gradients(3, shape)
    tx = optimizers.delta_momentum(1.0, dimension_numbers={'w': numbers})
    axes = [(a,) if isinstance(a, int) else a for a in numbers]
    stack = tuple(set(range(len(shape))) - {*axes[0], *axes[1]})
    order = stack + axes[0] + axes[1]

    def to_matrices(x):  # [step, *shape] to [step, *stack, in, out]
      sizes = [shape[axis] for axis in stack]
      rows = int(np.prod([shape[axis] for axis in axes[0]]))
      x = jnp.transpose(x, (0, *(axis + 1 for axis in order)))
      return x.reshape(len(x), *sizes, rows, -1)

    np.testing.assert_allclose(
      to_matrices(run(tx, gradients)),
      run(optimizers.delta_momentum(1.0), to_matrices(gradients)),
      rtol=1e-4,
      atol=1e-6,
    )

  def test_parameters_that_are_no_maps_have_plain_momentum(self):
    # Biases of scanned layers are like those of unrolled ones.
    gradients = make_gradients(3, (2, 4))
    tx = optimizers.delta_momentum(1.0, dimension_numbers={'w': None})
    expected = run(optimizers.delta_momentum(1.0, erase=0.0), gradients)
    np.testing.assert_allclose(run(tx, gradients), expected, rtol=1e-5)
    with self.assertRaisesRegex(ValueError, r"no entry for .*\['v'\]"):
      tx.init({'v': gradients[0]})
    bad = optax.contrib.MuonDimensionNumbers(0, 2)
    tx = optimizers.delta_momentum(1.0, dimension_numbers={'w': bad})
    with self.assertRaisesRegex(ValueError, r"\['w'\] of shape \(2, 4\)"):
      tx.init({'w': gradients[0]})

  def test_rejects_gradients_of_other_parameters(self):
    tx = optimizers.delta_momentum(0.1)
    state = tx.init({'w': jnp.ones((2, 2)), 'b': jnp.ones(2)})
    with self.assertRaisesRegex(ValueError, r"\['b'\] is missing in the grad"):
      tx.update({'w': jnp.ones((2, 2))}, state)
    with self.assertRaisesRegex(ValueError, r"\['b'\] is \(3,\) in .* \(2,\)"):
      tx.update({'w': jnp.ones((2, 2)), 'b': jnp.ones(3)}, state)


class PreconditionedMomentumTest(parameterized.TestCase):
  def test_preconditioner_descends_its_own_objective(self):
    gradients = make_gradients(5)
    tx = optimizers.preconditioned_momentum(
      0.1, decay=0.8, preconditioner_decay=0.9
    )
    m = v = jnp.zeros((4, 3))
    updates = run(tx, gradients)
    for t, g in enumerate(gradients, 1):
      objective = lambda v, g=g: 0.5 * jnp.sum((v - g**2) ** 2)
      v = v - 0.1 * jax.grad(objective)(v)
      m = 0.8 * m + 0.2 * g / jnp.sqrt(v / (1 - 0.9**t))
      np.testing.assert_allclose(updates[t - 1], -0.1 * m, rtol=1e-4)

  def test_paper_form_forgets_nothing(self):
    gradients = make_gradients(5)
    tx = optimizers.preconditioned_momentum(
      0.1, form='paper', preconditioner=optax.identity()
    )
    np.testing.assert_allclose(
      run(tx, gradients), -0.1 * jnp.cumsum(gradients, 0), rtol=1e-5, atol=1e-6
    )

  def test_rejects_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, 'preconditioner_decay=2'):
      optimizers.preconditioned_momentum(0.1, preconditioner_decay=2)
