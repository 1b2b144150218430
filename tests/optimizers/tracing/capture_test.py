"""Tests the capture of inputs through every transformation that it enters."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import optimizers
from tests import compiling

# The form that adds a term to the gradients, so that both can be seen.
printed_grad = functools.partial(
  optimizers.value_and_delta_grad, target='printed'
)


def apply_plainly(kernel, x):
  return x @ kernel


def apply_jitted(kernel, x):
  return jax.jit(lambda w, x: jnp.einsum('bi,io->bo', x, w))(kernel, x)


def apply_rematerialised(kernel, x):
  return jax.checkpoint(lambda w, x: x @ w)(kernel, x)


def apply_in_a_branch(kernel, x):
  return jax.lax.cond(
    x[0, 0] < 99, lambda w: x @ w, lambda w: 0 * (x @ w), kernel
  )


def apply_transposed(kernel, x):
  return jnp.einsum('oi,bi->bo', kernel.T, x)


def apply_reshaped(kernel, x):
  heads = kernel.reshape(4, 3, 2)
  return jnp.einsum('bi,ihd->bhd', x, heads).reshape(x.shape[0], 6)


def apply_in_half_precision_types(kernel, x):
  return x.astype(jnp.float32) @ kernel.astype(jnp.float32)


def apply_in_a_loop(kernel, x):
  step = lambda carry, row: (carry, row @ kernel)
  return jax.lax.scan(step, 0.0, x[:, None])[1][:, 0]


def apply_in_halves(kernel, x):
  left, right = jnp.split(kernel, 2, axis=1)
  return jnp.concatenate([x @ left, x @ right], axis=1)


def apply_sliced(kernel, x):
  return jnp.concatenate([x @ kernel[:, :1], x @ kernel[:, 1:]], axis=1)


def apply_by_layer(kernel, x):
  layers = kernel.reshape(4, 2, 3).transpose(1, 0, 2)
  return jnp.concatenate([x @ layers[0], x @ layers[1]], axis=1)


def apply_scanned_columns(kernel, x):
  step = lambda carry, column: (carry, x @ column)
  return jax.lax.scan(step, 0.0, kernel.T)[1].T


def apply_behind_a_barrier(kernel, x):
  return x @ jax.lax.optimization_barrier(kernel)


def apply_moved(kernel, x):
  """As `sharding.gather` does: the gradient moves back by a rule of its own."""
  move = jax.custom_vjp(lambda w: jax.lax.reduce_precision(w, 8, 23))
  move.defvjp(lambda w: (move(w), None), lambda _, g: (2 * g,))
  return x @ move(kernel)


def apply_as_a_convolution(kernel, x):
  return jax.lax.conv_general_dilated(
    x[:, None],
    kernel[None],
    (1,),
    'SAME',
    dimension_numbers=('NWC', 'WIO', 'NWC'),
  )[:, 0]


def apply_stacked(kernel, x):
  columns = jnp.unstack(kernel, axis=1)
  return jnp.einsum('bi,oi->bo', x, jnp.stack(columns))


class CaptureTest(parameterized.TestCase):
  @parameterized.parameters(
    apply_plainly,
    apply_jitted,
    apply_rematerialised,
    apply_in_a_branch,
    apply_transposed,
    apply_reshaped,
    apply_in_half_precision_types,
    apply_in_a_loop,
    apply_in_halves,
    apply_sliced,
    apply_stacked,
    apply_by_layer,
    apply_scanned_columns,
    apply_behind_a_barrier,
    apply_as_a_convolution,
  )
  def test_finds_the_map(self, apply):
    kernel = jax.random.normal(jax.random.key(0), (4, 6))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    loss_fn = lambda kernel, x: jnp.sum(jnp.sin(apply(kernel, x))) / 5
    loss, gradient, extra = jax.jit(printed_grad(loss_fn, erase=0.5))(kernel, x)
    expected = jax.grad(loss_fn)(kernel, x) + 0.5 * x.T @ x @ kernel / 5
    np.testing.assert_allclose(loss, loss_fn(kernel, x), rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(extra['energy'], jnp.sum(x**2) / 5, rtol=1e-5)

  def test_follows_a_move_with_its_own_gradient(self):
    kernel, x = jnp.arange(6.0).reshape(3, 2), jnp.ones((4, 3))
    loss = lambda kernel, x: jnp.mean(jnp.sum(apply_moved(kernel, x), 1))
    self.assertTrue(optimizers.find_maps(loss, kernel, x))
    _, gradient, extra = optimizers.value_and_delta_grad(loss)(kernel, x)
    np.testing.assert_allclose(extra['energy'], 3)
    np.testing.assert_allclose(gradient, 2)  # twice 1, by its own rule

  def test_joined_kernels_are_the_same_map(self):
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [jax.random.normal(key, (4, 3)) for key in keys[:2]]
    x = jax.random.normal(keys[2], (5, 4))
    loss_fn = lambda kernel, x: jnp.mean(jnp.sin(x @ kernel))
    joined_loss = lambda kernels, x: loss_fn(jnp.concatenate(kernels, 1), x)
    _, gradients, extra = printed_grad(joined_loss)(kernels, x)
    _, expected, _ = printed_grad(loss_fn)(jnp.concatenate(kernels, 1), x)
    np.testing.assert_allclose(
      jnp.concatenate(gradients, 1), expected, rtol=1e-5
    )
    for energy in extra['energy']:
      np.testing.assert_allclose(energy, jnp.sum(x**2) / 5, rtol=1e-5)

  def test_layers_by_index_have_their_own_energies(self):
    layers = jax.random.normal(jax.random.key(0), (2, 4, 4))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    stacked_loss = lambda w, x: jnp.mean(jnp.tanh(x @ w[0]) @ w[1])
    listed_loss = lambda w, x: jnp.mean(jnp.tanh(x @ w[0]) @ w[1])
    _, gradients, extra = printed_grad(stacked_loss)(layers, x)
    _, expected, expected_extra = printed_grad(listed_loss)(list(layers), x)
    for i in range(2):
      np.testing.assert_allclose(gradients[i], expected[i], rtol=1e-5)
      np.testing.assert_allclose(
        extra['energy'][i],
        jnp.broadcast_to(expected_extra['energy'][i], (4, 4)),
        rtol=1e-5,
      )

  @parameterized.parameters(
    ((3, 3), 1, (1, 1), 'SAME'),
    ((3, 2), 2, (2, 1), 'VALID'),
    ((2, 2), 4, (1, 1), 'SAME'),  # depthwise
  )
  def test_convolution_is_a_map_of_patches(self, size, groups, stride, padding):
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jax.random.normal(keys[0], (*size, 4 // groups, 8))
    x = jax.random.normal(keys[1], (2, 5, 6, 4))
    names = ('NHWC', 'HWIO', 'NHWC')

    def loss_fn(kernel, x):
      y = jax.lax.conv_general_dilated(
        x,
        kernel,
        stride,
        padding,
        dimension_numbers=names,
        feature_group_count=groups,
      )
      return jnp.mean(jnp.sin(y))

    # [b, h, w, in * kernel size], the channel changing slowest.
    patches = jax.lax.conv_general_dilated_patches(
      x, size, stride, padding, dimension_numbers=names
    )
    patches = patches.reshape(-1, groups, 4 // groups * size[0] * size[1])
    matrices = jnp.moveaxis(kernel, 2, 0).reshape(patches.shape[-1], groups, -1)
    gram = jnp.einsum('ngi,ngj->gij', patches, patches) / len(patches)
    pull = jnp.einsum('gij,jgo->igo', gram, matrices)
    pull = jnp.moveaxis(pull.reshape(4 // groups, *size, 8), 0, 2)
    expected = jax.grad(loss_fn)(kernel, x) + pull
    _, gradient, extra = printed_grad(loss_fn)(kernel, x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    energies = jnp.trace(gram, axis1=1, axis2=2)
    np.testing.assert_allclose(extra['energy'], jnp.max(energies), rtol=1e-5)

  @parameterized.product(fill=(0.0, 1.0, 100.0), looped=(False, True))
  def test_masked_padding_is_not_a_sample(self, fill, looped):
    kernels = jax.random.normal(jax.random.key(0), (2, 4, 4)) / 2
    kernels = {'first': kernels[0], 'second': kernels[1]}
    x = jax.random.normal(jax.random.key(1), (3, 7, 4))
    real = jnp.arange(7) < 4

    def rows_loss(kernels, x, mask):
      y = jnp.tanh(x @ kernels['first']) @ kernels['second']
      return jnp.sum(jnp.sum((y - 1) ** 2, -1) * mask) / 12

    def loss_fn(kernels, x, mask):
      if not looped:
        return rows_loss(kernels, x, mask)
      body = lambda sum_, row: (sum_ + rows_loss(kernels, row, mask), None)
      return jax.lax.scan(body, 0.0, x)[0]

    count = lambda x, mask: x.shape[0] * jnp.sum(mask)
    num_samples = count if looped else None
    padded = jnp.where(real[:, None], x, fill)
    actual = printed_grad(loss_fn, num_samples=num_samples)(
      kernels, padded, real
    )
    expected = printed_grad(rows_loss)(kernels, x[:, :4], jnp.ones(4))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      actual,
      expected,
    )

  def test_gradient_upstream_is_untouched(self):
    # The term holds x fixed: what made x must not feel it.
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
      'scale': jax.random.normal(keys[0], (4,)),
      'kernel': jax.random.normal(keys[1], (4, 6)),
    }
    x = jax.random.normal(keys[2], (5, 4))
    loss_fn = lambda p, x: jnp.mean(jnp.sin((x * p['scale']) @ p['kernel']))
    _, gradients, extra = printed_grad(loss_fn)(params, x)
    expected = jax.grad(loss_fn)(params, x)
    np.testing.assert_allclose(
      gradients['scale'], expected['scale'], rtol=1e-5, atol=1e-6
    )
    self.assertEqual(extra['energy']['scale'], 0)
    self.assertEqual(
      optimizers.find_maps(loss_fn, params, x), {'scale': False, 'kernel': True}
    )

  def test_number_of_samples_can_be_given(self):
    kernel = jnp.ones((2, 3))
    x = jax.random.normal(jax.random.key(0), (4, 5, 2))  # 4 samples of 5 tokens
    loss_fn = lambda kernel, x: jnp.sum(jnp.sin(x @ kernel)) / 4
    grad = printed_grad(loss_fn, num_samples=4)
    _, gradient, extra = grad(kernel, x)
    gram = jnp.einsum('bti,btj->ij', x, x) / 4
    expected = jax.grad(loss_fn)(kernel, x) + gram @ kernel
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    np.testing.assert_allclose(extra['energy'], jnp.trace(gram), rtol=1e-5)

  @parameterized.product(
    axis=(0, 1),
    axis_type=(jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit),
  )
  def test_sharded_equals_unsharded(self, axis, axis_type):
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = {
      'first': jax.random.normal(keys[0], (8, 16)),
      'second': jax.random.normal(keys[1], (16, 8)),
    }
    x = jax.random.normal(keys[2], (6, 8))
    explicit = axis_type == jax.sharding.AxisType.Explicit

    def loss_fn(kernels, x, where):
      hidden = jnp.sin(jnp.einsum('bi,io->bo', x, kernels['first'], **where))
      y = jnp.einsum('bi,io->bo', hidden, kernels['second'], **where)
      return jnp.sum(y**2) / 6

    def run(kernels, x, where):
      loss = lambda kernels, x: loss_fn(kernels, x, where)
      return compiling.jit(printed_grad(loss))(kernels, x)

    expected = run(kernels, x, {})
    mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
    spec = (jax.P('x', None), jax.P(None, 'x'))[axis]
    with jax.set_mesh(mesh):
      kernels = jax.device_put(kernels, jax.NamedSharding(mesh, spec))
      x = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
      where = {'out_sharding': jax.P()} if explicit else {}
      actual = run(kernels, x, where)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      actual,
      expected,
    )
    if explicit:
      self.assertEqual(actual[1]['first'].sharding.spec, spec)

  def test_parameters_may_have_targets_of_their_own(self):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
      'fast': (jax.random.normal(keys[0], (2, 3)), None),
      'middle': [jax.random.normal(keys[1], (3, 3))],
      'slow': jax.random.normal(keys[2], (3, 2)),
    }
    x = jax.random.normal(keys[3], (5, 2))

    def loss_fn(params):
      hidden = jnp.sin(x @ params['fast'][0])
      hidden = jnp.sin(hidden @ params['middle'][0])
      return jnp.mean(jnp.sum(jnp.square(hidden @ params['slow']), axis=1))

    grad = optimizers.value_and_delta_grad(
      loss_fn,
      target={'fast': 'printed', 'middle': None, 'slow': 'corrected'},
      erase={'fast': 0.5, 'middle': 1.0, 'slow': 1.0},
    )
    _, gradients, extra = grad(params)
    _, printed, energies = printed_grad(loss_fn, erase=0.5)(params)
    plain = jax.grad(loss_fn)(params)
    expected = plain | {'fast': printed['fast']}
    energies['energy']['middle'] = [jnp.zeros(())]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      (gradients, extra),
      (expected, energies),
    )
    self.assertFalse(np.allclose(printed['fast'][0], plain['fast'][0]))
    with self.assertRaisesRegex(ValueError, "target='print' is not one of"):
      optimizers.value_and_delta_grad(loss_fn, target='print')
    with self.assertRaisesRegex(ValueError, 'weighs the erasing term'):
      mixed = {'fast': 'printed', 'middle': None, 'slow': 'corrected'}
      grad = optimizers.value_and_delta_grad(loss_fn, target=mixed, erase=2.0)
      grad(params)

  @parameterized.product(
    apply=(apply_plainly, apply_in_a_loop, apply_in_halves, apply_in_a_branch),
    target=('printed', 'corrected'),
  )
  def test_rows_with_their_own_parameters(self, apply, target):
    # As levels do that learn inside a sequence, every row by itself.
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = jax.random.normal(keys[0], (3, 4, 6))
    shared = jax.random.normal(keys[1], (6, 2))
    x = jax.random.normal(keys[2], (3, 5, 4)) * jnp.arange(1, 4)[:, None, None]

    def loss_fn(params, x, mask):
      y = jnp.tanh(apply(params['own'], x)) @ params['shared']
      return jnp.sum(jnp.sin(y) * mask[:, None]) / jnp.sum(mask)

    mask = jnp.arange(5) < jnp.arange(3, 6)[:, None]
    grad = optimizers.value_and_delta_grad(
      loss_fn, target=target, num_samples=lambda x, mask: jnp.sum(mask)
    )
    axes = ({'own': 0, 'shared': None}, 0, 0)
    params = {'own': kernels, 'shared': shared}
    actual = compiling.jit(jax.vmap(grad, axes))(params, x, mask)
    for i in range(3):
      row = {'own': kernels[i], 'shared': shared}
      expected = compiling.jit(grad)(row, x[i], mask[i])
      jax.tree.map(
        lambda a, b, i=i: np.testing.assert_allclose(a[i], b, 1e-5, 1e-6),
        actual,
        expected,
      )

  def test_gradient_through_a_step_of_a_row(self):
    # The outer gradient passes through gradients and energies.
    keys = jax.random.split(jax.random.key(0), 2)
    kernels = jax.random.normal(keys[0], (2, 4, 3), jnp.float32)
    x = jax.random.normal(keys[1], (2, 5, 4), jnp.float32)
    inner_loss = lambda kernel, x: jnp.mean(jnp.sin(x @ kernel))
    grad = optimizers.value_and_delta_grad(inner_loss, target='printed')

    def captured(kernel, x):
      _, gradient, extra = grad(kernel, x)
      return kernel - gradient / (1 + extra['energy'])

    def defined(kernel, x):
      gram = x.T @ x / len(x)
      gradient = jax.grad(inner_loss)(kernel, x) + gram @ kernel
      return kernel - gradient / (1 + jnp.trace(gram))

    outer = lambda step: jax.grad(
      lambda kernels, x: jnp.sum(jnp.cos(jax.vmap(step)(kernels, x))), (0, 1)
    )
    actual = compiling.jit(outer(captured))(kernels, x)
    expected = compiling.jit(outer(defined))(kernels, x)
    for a, b in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

  @parameterized.product(
    apply=(apply_plainly, apply_in_a_loop, apply_in_halves),
    target=('printed', 'corrected'),
  )
  def test_samples_spread_by_a_shard_map(self, apply, target):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
      'own': jax.random.normal(keys[0], (4, 6)),
      'shared': jax.random.normal(keys[1], (6, 2)),
    }
    x = jax.random.normal(keys[2], (8, 4))
    # One device has more padding than the other. A loop counts padding.
    masked = apply is not apply_in_a_loop
    mask = (jnp.arange(8) < 5).astype(jnp.float32) if masked else jnp.ones(8)

    def make(add):
      def loss_fn(params, x, mask):
        y = jnp.tanh(apply(params['own'], x)) @ params['shared']
        total = add(jnp.sum(jnp.sin(y) * mask[:, None]))
        return total / add(jnp.sum(mask))

      return optimizers.value_and_delta_grad(loss_fn, target=target)

    expected = compiling.jit(make(lambda total: total))(params, x, mask)
    rows = jax.P('i')
    spread = jax.shard_map(
      make(lambda total: jax.lax.psum(total, 'i')),
      mesh=jax.make_mesh(
        (2,), ('i',), axis_types=(jax.sharding.AxisType.Auto,)
      ),
      in_specs=(jax.P(), rows, rows),
      out_specs=jax.P(),
    )
    actual = compiling.jit(spread)(params, x, mask)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5),
      actual,
      expected,
    )

  def test_rejects_bad_arguments(self):
    x = jnp.ones((4, 2))
    loss_fn = lambda params, x: jnp.mean(x @ params['w']) * params['n']
    params = {'w': jnp.ones((2, 3)), 'n': jnp.ones(())}
    for message, settings, changes in (
      (r"\['n'\] has dtype int32", {}, {'n': jnp.int32(1)}),
      (r"\['w'\] has dtype complex", {}, {'w': jnp.ones((2, 3), complex)}),
      ('num_samples=0 must be above 0', {'num_samples': 0}, {}),
      (r"target, with \['v'\], is no prefix", {'target': {'v': None}}, {}),
    ):
      grad = optimizers.value_and_delta_grad(loss_fn, **settings)
      with self.assertRaisesRegex(ValueError, message) as caught:
        grad({**params, **changes}, x)
      self.assertNotIn('\n', str(caught.exception))

  def test_returns_auxiliary_outputs(self):
    loss_fn = lambda kernel, x: (jnp.sum(x @ kernel), {'x': x})
    grad = printed_grad(loss_fn, has_aux=True)
    (loss, aux), _, _ = grad(jnp.ones((2, 3)), jnp.ones((4, 2)))
    self.assertEqual(loss, 24)
    np.testing.assert_array_equal(aux['x'], 1)
