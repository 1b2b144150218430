"""Tests levels on clocks of their own against plain loops."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import optimizers

Level = optimizers.Level
multi_timescale = optimizers.multi_timescale

LABELS = {'fast': 'fast', 'slow': {'kernel': 'slow', 'bias': 'slow'}}


def make_params(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'fast': jax.random.normal(keys[0], (8, 4)),
    'slow': {
      'kernel': jax.random.normal(keys[1], (8, 8)),
      'bias': jax.random.normal(keys[2], (8,)),
    },
  }
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def make_gradients(params, step):
  rng = np.random.default_rng(step)
  return jax.tree.map(
    lambda leaf: jnp.array(rng.normal(size=leaf.shape), leaf.dtype), params
  )


def run(tx, params, num_steps):
  """Returns the parameters after every step, and the last state."""

  @jax.jit
  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  history = []
  for index in range(num_steps):
    params, state = step(params, state, make_gradients(params, index))
    history.append(params)
  return history, state


def make_regression():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    'first': jax.random.normal(keys[0], (3, 5)),
    'second': jax.random.normal(keys[1], (5, 2)),
  }
  scale = jnp.array([1.0, 2.0, 5.0])[:, None, None]  # of three batches
  x = scale * jax.random.normal(keys[2], (3, 4, 3))
  return params, (x, jax.random.normal(keys[3], (3, 4, 2)))


def regression_loss(params, batch):
  x, y = batch
  hidden = jnp.tanh(x @ params['first'])
  return jnp.mean(jnp.sum((hidden @ params['second'] - y) ** 2, -1))


class MultiTimescaleTest(parameterized.TestCase):
  @parameterized.parameters(
    (optax.adamw(1e-2, weight_decay=0.1),),
    (optax.sgd(optax.linear_schedule(0.1, 0.0, 5), momentum=0.9),),
  )
  def test_period_of_one_step_is_the_plain_optimiser(self, optimizer):
    params = make_params()
    tx = multi_timescale(
      [Level('fast', 64, optimizer), Level('slow', 64, optimizer)],
      LABELS,
      tokens_per_step=64,
    )
    # Op by op: XLA fuses the two programs differently.
    with jax.disable_jit():
      plain, _ = run(optimizer, params, 2)
      ours, state = run(tx, params, 2)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)
    self.assertEqual(state.levels['slow'].accumulated, ())

  @parameterized.product(reduce=('mean', 'sum'))
  def test_slow_level_takes_one_step_per_period(self, reduce):
    params = make_params()
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    tx = multi_timescale(
      [Level('fast', 1, optax.sgd(0.1)), Level('slow', 3, optimizer)],
      LABELS,
      reduce=reduce,
      phases='aligned',
    )
    history, state = run(tx, params, 7)

    expected, inner = params['slow'], optimizer.init(params['slow'])
    total = jax.tree.map(jnp.zeros_like, expected)
    for step in range(7):
      gradients = make_gradients(params, step)['slow']
      total = jax.tree.map(jnp.add, total, gradients)
      if step % 3 == 2:
        if reduce == 'mean':
          total = jax.tree.map(lambda g: g / 3, total)
        updates, inner = optimizer.update(total, inner, expected)
        expected = optax.apply_updates(expected, updates)
        total = jax.tree.map(jnp.zeros_like, expected)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        history[step]['slow'],
        expected,
      )
    self.assertEqual(state.levels['slow'].num_updates, 2)
    self.assertEqual(state.levels['slow'].num_accumulated, 1)
    self.assertEqual(state.levels['fast'].num_updates, 7)

  def test_no_gradient_is_lost_or_used_twice(self):
    # With SGD and sums, the distance travelled is the sum of all gradients.
    params = make_params(jnp.float32)
    tx = multi_timescale(
      [Level('fast', 2, optax.sgd(1.0)), Level('slow', 4, optax.sgd(1.0))],
      LABELS,
      reduce='sum',
    )
    history, state = run(tx, params, 9)
    for name in ('fast', 'slow'):
      travelled = jax.tree.map(
        lambda a, b: a - b, params[name], history[-1][name]
      )
      rest = jax.tree.leaves(state.levels[name].accumulated)
      for moved, left, *gradients in zip(
        jax.tree.leaves(travelled),
        rest,
        *(jax.tree.leaves(make_gradients(params, i)[name]) for i in range(9)),
        strict=True,
      ):
        np.testing.assert_allclose(moved + left, sum(gradients), atol=1e-5)

  def test_bfloat16_gradients_are_summed_in_float32(self):
    params = make_params(jnp.bfloat16)
    tx = multi_timescale(
      [Level('fast', 1, optax.sgd(1.0)), Level('slow', 512, optax.sgd(1.0))],
      LABELS,
      phases='aligned',
    )
    state = tx.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.lax.fori_loop(
      0, 512, lambda _, carry: tx.update(gradients, carry[1]), (params, state)
    )
    # In bfloat16 the sum would have stopped growing at 256.
    self.assertEqual(updates['slow']['bias'].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(updates['slow']['bias'], -1.0)

  def test_staggered_levels_do_not_update_together(self):
    names = ('every', 'four', 'eight', 'sixteen')
    params = {name: jnp.ones(2) for name in names}
    sizes = (1, 4, 8, 16)
    tx = multi_timescale(
      [
        Level(n, size, optax.sgd(1e-3))
        for n, size in zip(names, sizes, strict=True)
      ],
      {name: name for name in names},
    )
    history, _ = run(tx, params, 64)
    moved = np.array(
      [
        [float(a[name][0] != b[name][0]) for name in names]
        for a, b in zip([params, *history[:-1]], history, strict=True)
      ]
    )
    np.testing.assert_array_equal(moved.sum(0), [64, 16, 8, 4])
    self.assertEqual(moved[:, 1:].sum(1).max(), 1)
    # First chunks are nearly whole: the phases are the latest that do this.
    np.testing.assert_array_equal(moved.argmax(0), [0, 3, 6, 13])

  def test_aligned_levels_update_together(self):
    tx = multi_timescale(
      [Level('fast', 2, optax.sgd(1.0)), Level('slow', 4, optax.sgd(1.0))],
      LABELS,
      phases='aligned',
    )
    _, state = run(tx, make_params(), 4)
    self.assertEqual(state.levels['fast'].num_accumulated, 0)
    self.assertEqual(state.levels['slow'].num_accumulated, 0)

  def test_optimiser_work_is_inside_a_cond(self):
    params = make_params()
    calls = []

    def update(updates, state, params=None):
      jax.debug.callback(lambda: calls.append(1))
      return updates, state

    spy = optax.GradientTransformation(optax.init_empty_state, update)
    tx = multi_timescale(
      [Level('fast', 1, optax.sgd(0.1)), Level('slow', 4, spy)], LABELS
    )
    run(tx, params, 8)
    jax.effects_barrier()
    self.assertLen(calls, 2)

  def test_telemetry(self):
    params = make_params()
    tx = optax.chain(
      optax.clip_by_global_norm(1e9),
      multi_timescale(
        [Level('fast', 1, optax.sgd(0.1)), Level('slow', 2, optax.sgd(0.1))],
        LABELS,
        phases='aligned',
      ),
    )
    history, state = run(tx, params, 3)
    report = optimizers.telemetry(state)
    mean = jax.tree.map(
      lambda a, b: (a + b) / 2,
      make_gradients(params, 0)['slow'],
      make_gradients(params, 1)['slow'],
    )
    norm = optax.tree.norm(mean)
    self.assertEqual(report['fast/num_updates'], 3)
    self.assertEqual(report['slow/num_updates'], 1)
    np.testing.assert_allclose(report['slow/gradient_norm'], norm, rtol=1e-6)
    np.testing.assert_allclose(report['slow/update_norm'], norm / 10, rtol=1e-6)
    np.testing.assert_allclose(
      report['slow/update_ratio'],
      norm / 10 / optax.tree.norm(params['slow']),
      rtol=1e-6,
    )

  def test_extra_arguments_shaped_like_params_are_cut_to_the_level(self):
    params = make_params()

    def update(updates, state, params=None, *, scale, factor):
      return jax.tree.map(lambda g, s: g * s * factor, updates, scale), state

    scaled = optax.GradientTransformationExtraArgs(
      optax.init_empty_state, update
    )
    tx = multi_timescale(
      [Level('fast', 1, scaled), Level('slow', 2, scaled)],
      LABELS,
      phases='aligned',
      accumulate={'scale': params},
    )
    state = tx.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    for _ in range(2):
      updates, state = tx.update(
        gradients, state, params, scale=params, factor=2.0
      )
    jax.tree.map(
      lambda u, p: np.testing.assert_allclose(u, 2 * p, rtol=1e-6),
      updates,
      params,
    )

  @parameterized.parameters('mean', 'sum')
  def test_delta_gradient_descent_sees_the_inputs_of_all_steps(self, reduce):
    # Three batches between two updates are one batch of all of them; 'sum' is
    # the same with a loss that is a sum over the three.
    params, (x, y) = make_regression()
    value_and_grad, dgd = optimizers.dgd_for_model(
      regression_loss, params, (x[0], y[0]), learning_rate=0.5
    )
    extra = jax.eval_shape(value_and_grad, params, (x[0], y[0]))[2]
    tx = multi_timescale(
      [Level('fast', 1, dgd), Level('slow', 3, dgd)],
      {'first': 'slow', 'second': 'fast'},
      reduce=reduce,
      phases='aligned',
      accumulate=extra,
    )

    @jax.jit
    def step(params, state, batch):
      _, gradients, extra = value_and_grad(params, batch)
      updates, state = tx.update(gradients, state, params, **extra)
      # The fast level stays where it is, so that the batches can be joined.
      updates['second'] = jnp.zeros_like(updates['second'])
      return optax.apply_updates(params, updates), state

    ours, state = params, tx.init(params)
    for batch in zip(x, y, strict=True):
      ours, state = step(ours, state, batch)

    num_samples = 12 if reduce == 'mean' else 4
    loss = lambda params, batch: (
      12 / num_samples * regression_loss(params, batch)
    )
    value_and_grad = optimizers.value_and_delta_grad(
      loss, num_samples=num_samples
    )
    joined = (x.reshape(12, -1), y.reshape(12, -1))
    _, gradients, extra = value_and_grad(params, joined)
    updates, _ = dgd.update(gradients, dgd.init(params), params, **extra)
    np.testing.assert_allclose(
      ours['first'], params['first'] + updates['first'], atol=1e-6
    )
    # The last batch alone would give another step.
    energies = jnp.sum(x**2, (1, 2)) / 4
    self.assertGreater(energies[-1], 2 * jnp.mean(energies))
    optax.tree.map_params(tx, lambda leaf: leaf, state)

  def test_rejects_extra_arguments_that_would_be_lost(self):
    params, batch = make_regression()
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    value_and_grad, dgd = optimizers.dgd_for_model(
      regression_loss, params, batch, learning_rate=0.5
    )
    _, gradients, extra = value_and_grad(params, batch)
    levels = [Level('fast', 1, dgd), Level('slow', 2, dgd)]
    labels = {'first': 'slow', 'second': 'fast'}
    tx = multi_timescale(levels, labels)
    with self.assertRaisesRegex(ValueError, "energy .* accumulate={'energy'"):
      tx.update(gradients, tx.init(params), params, **extra)
    tx = multi_timescale(levels, labels, accumulate=extra)
    with self.assertRaisesRegex(ValueError, r"\['energy'\], which update was"):
      tx.update(gradients, tx.init(params), params)
    tx = multi_timescale(levels, labels, accumulate={'energy': {'first': 1.0}})
    with self.assertRaisesRegex(ValueError, '1 leaves for 2 parameters'):
      tx.init(params)

  def test_label_function_and_prefix_give_the_same_result(self):
    params = make_params()
    levels = [Level('fast', 1, optax.sgd(0.1)), Level('slow', 2, optax.adam(1))]

    def by_path(tree):
      return jax.tree_util.tree_map_with_path(
        lambda path, _: 'fast' if path[0].key == 'fast' else 'slow', tree
      )

    results = [
      run(multi_timescale(levels, labels), params, 2)
      for labels in (LABELS, {'fast': 'fast', 'slow': 'slow'}, by_path)
    ]
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    jax.tree.map(np.testing.assert_array_equal, results[0], results[2])

  def test_composes_with_other_wrappers(self):
    params = make_params()
    levels = [
      Level('fast', 1, optax.adam(0.1)),
      Level('slow', 2, optax.inject_hyperparams(optax.adamw)(0.1)),
    ]
    tx = multi_timescale(levels, LABELS)
    jax.tree.map(
      np.testing.assert_array_equal,
      optax.tree.map_params(tx, lambda leaf: leaf, tx.init(params)),
      tx.init(params),
    )
    # Two micro steps on the same gradient are one step on it.
    steps = optax.MultiSteps(tx, 2)
    state, reference = steps.init(params), tx.init(params)
    micro_update, update = jax.jit(steps.update), jax.jit(tx.update)
    for index in range(3):
      gradients = make_gradients(params, index)
      for _ in range(2):
        updates, state = micro_update(gradients, state, params)
      expected, reference = update(gradients, reference, params)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        updates,
        expected,
      )

  @parameterized.parameters(
    (jax.sharding.AxisType.Auto,), (jax.sharding.AxisType.Explicit,)
  )
  def test_state_follows_the_shardings_of_the_parameters(self, axis_type):
    mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(axis_type,) * 2)
    spec = jax.P('data', 'model')
    shardings = jax.tree.map(
      lambda leaf: jax.NamedSharding(mesh, spec if leaf.ndim == 2 else jax.P()),
      make_params(),
    )
    tx = multi_timescale(
      [Level('fast', 1, optax.adam(0.1)), Level('slow', 2, optax.adam(0.1))],
      LABELS,
    )
    expected, _ = run(tx, make_params(), 5)
    with jax.set_mesh(mesh):
      params = jax.device_put(make_params(), shardings)
      state = tx.init(params)
      update = jax.jit(tx.update)
      for index in range(5):
        gradients = jax.device_put(make_gradients(params, index), shardings)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      params,
      expected[-1],
    )
    slow = state.levels['slow']
    for tree in (slow.accumulated, slow.inner[0].mu, slow.inner[0].nu):
      self.assertEqual(tree['slow']['kernel'].sharding.spec, spec)

  @parameterized.named_parameters(
    ('bad_multiple', 'every=100 is not a multiple of tokens_per_step=64',
     [Level('fast', 64, optax.sgd(1.0)), Level('slow', 100, optax.sgd(1.0))]),
    ('too_small', 'set every to 64 or 128',
     [Level('fast', 64, optax.sgd(1.0)), Level('slow', 16, optax.sgd(1.0))]),
    ('zero', 'every=0 must be',
     [Level('fast', 0, optax.sgd(1.0)), Level('slow', 64, optax.sgd(1.0))]),
    ('twice', "Two levels are named 'fast'",
     [Level('fast', 64, optax.sgd(1.0)), Level('fast', 64, optax.sgd(1.0))]),
    ('none', 'levels is empty', []),
    ('unmatched', r"Levels \['slowest'\] match no parameter",
     [Level(name, 64, optax.sgd(1.0)) for name in ('fast', 'slow', 'slowest')]),
    ('unlabelled', r"Labels \['slow'\] name no level",
     [Level('fast', 64, optax.sgd(1.0))]),
  )  # fmt: skip
  def test_rejects_bad_arguments(self, message, levels):
    with self.assertRaisesRegex(ValueError, message):
      multi_timescale(levels, LABELS, tokens_per_step=64).init(make_params())

  def test_rejects_integer_parameters_and_unknown_settings(self):
    levels = [Level('fast', 1, optax.sgd(1.0))]
    with self.assertRaisesRegex(ValueError, r"\['n'\] has dtype int32"):
      multi_timescale(levels, 'fast').init({'n': jnp.zeros(2, jnp.int32)})
    for labels in ({'slow': 'fast'}, ['fast'], {'n': {'m': 'fast'}}):
      with self.assertRaisesRegex(ValueError, r'no prefix .*\[') as caught:
        multi_timescale(levels, labels).init(
          {'n': jnp.zeros(2), 'm': jnp.ones(2)}
        )
      self.assertNotIn('\n', str(caught.exception))
    with self.assertRaisesRegex(ValueError, "reduce='max'"):
      multi_timescale(levels, 'fast', reduce='max')
    with self.assertRaisesRegex(ValueError, "phases='random'"):
      multi_timescale(levels, 'fast', phases='random')
    with self.assertRaisesRegex(ValueError, 'tokens_per_step=0'):
      multi_timescale(levels, 'fast', tokens_per_step=0)
