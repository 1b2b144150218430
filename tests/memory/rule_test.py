"""Custom functions, gradients through the writes, and bad settings."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_learning import errors
from nested_learning import memory
from nested_learning.layers import norm
from tests import compiling
from tests.memory import problems


def run(problem, rule, initial=None, inputs=None, **changes):
  """Returns reads and last memory of a problem with parts replaced."""
  problem = problem._replace(**changes)
  result, state = memory.scan_chunks(
    problem.network,
    rule,
    problem.initial if initial is None else initial,
    None,
    problem.inputs if inputs is None else inputs,
    project=problem.project,
  )
  return result.read, state.memory


class FunctionsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  def test_custom_objective(self):
    problem = problems.make_problem('matrix')
    make = lambda objective: memory.Rule(chunk_size=7, objective=objective)
    # Half the objective is half the step.
    half = lambda p, t: 0.5 * memory.OBJECTIVES['l2'](p, t)

    def l2_by_hand(p, t):
      return jnp.sum(p**2 + t**2 - 2 * p * t, axis=-1) / 2

    def scaled(weights, inputs):
      feed = problem.project(weights, inputs)
      return feed._replace(inner_lr=feed.inner_lr * 0.5)

    @compiling.jit
    def reads():
      no_erase = lambda objective: memory.Rule(
        chunk_size=7, objective=objective, erase='none'
      )
      return {
        'l2': run(problem, make(memory.OBJECTIVES['l2'])),
        'by hand': run(problem, make(l2_by_hand)),
        'half': run(problem, no_erase(half)),
        'half rate': run(
          problem, no_erase(memory.OBJECTIVES['l2']), project=scaled
        ),
      }

    reads = reads()
    for a, b in (('l2', 'by hand'), ('half', 'half rate')):
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, 1e-9, 1e-9),
        reads[a],
        reads[b],
      )
    self.assertGreater(np.abs(reads['half'][0] - reads['l2'][0]).max(), 1e-3)

  def test_custom_activation_and_rates(self):
    problem = problems.make_problem('mlp')
    rule = problems.make_rule('mlp', {'chunk_size': 16})
    silu_by_hand = lambda x: x / (1.0 + jnp.exp(-x))
    by_hand = problems.make_network('mlp', silu_by_hand)
    cubic = problems.make_network('mlp', lambda x: x**3)
    steep = problems.make_project(
      problem.network, lambda x: jax.nn.sigmoid(3.0 * x)
    )

    @compiling.jit
    def reads():
      return (
        run(problem, rule)[0],
        run(problem, rule, network=by_hand)[0],
        run(problem, rule, network=cubic)[0],
        run(problem, rule, project=steep)[0],
      )

    read, same, other, other_rates = reads()
    np.testing.assert_allclose(same, read, 1e-9, 1e-9)
    self.assertGreater(np.abs(other - read).max(), 1e-2)
    self.assertGreater(np.abs(other_rates - read).max(), 1e-3)

  @parameterized.parameters('mlp', 'matrix')
  def test_meta_gradient(self, kind):
    problem = problems.make_problem(kind, momentum=True)
    rule = problems.make_rule(
      kind, {'chunk_size': 7, 'erase': 'every_map', 'momentum': True}
    )
    values = (problem.initial, problem.inputs)
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), values)

    @compiling.jit
    def value_and_grad(values):
      def loss(values):
        read, _ = run(problem, rule, *values)
        return jnp.sum(jnp.sin(3.0 * read))

      return jax.value_and_grad(loss)(values)

    _, grads = value_and_grad(values)
    moved = lambda e: jax.tree.map(lambda x, d: x + e * d, values, direction)
    above, _ = value_and_grad(moved(1e-6))
    below, _ = value_and_grad(moved(-1e-6))
    slope = sum(
      jnp.sum(g * d)
      for g, d in zip(
        jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True
      )
    )
    np.testing.assert_allclose(slope, (above - below) / 2e-6, rtol=1e-6)

    initial = grads[0]
    d, f = problems.DIM, problems.HIDDEN
    sizes = [d, d, 1, 1] if kind == 'matrix' else [f, f, f, f, 1, 1]
    for rows in jnp.split(initial['in'], np.cumsum(sizes)[:-1], axis=1):
      self.assertGreater(jnp.max(jnp.abs(rows)), 1e-4)
    for name in set(initial) - {'in'}:
      for role in jnp.unstack(initial[name], axis=1):
        self.assertGreater(jnp.max(jnp.abs(role)), 1e-4)

  def test_max_norm_bounds_the_departure(self):
    problem = problems.make_problem('mlp')
    rule = lambda bound: problems.make_rule(
      'mlp', {'chunk_size': 11, 'max_norm': bound}
    )
    bounded, free = compiling.jit(
      lambda: (run(problem, rule(0.3))[1], run(problem, rule(None))[1])
    )()
    norms = lambda memory: jax.tree.leaves(
      jax.tree.map(
        lambda w, w0: jnp.linalg.norm(w - w0, axis=(-1, -2)),
        memory,
        problem.initial,
      )
    )
    self.assertGreater(max(jnp.max(n) for n in norms(free)), 0.5)
    self.assertLess(max(jnp.max(n) for n in norms(bounded)), 0.3 + 1e-9)

  @parameterized.parameters(
    ({'chunk_size': 0}, '^chunk_size=0 must be at least 1 token'),
    ({'chunk_size': 4, 'erase': 'all'}, "erase='all' must be one of 'none'"),
    ({'chunk_size': 4, 'learns': 'all'}, "learns='all' must be one of"),
    ({'chunk_size': 4, 'erase_from': 'no'}, "erase_from='no' must be one of"),
    ({'chunk_size': 4, 'retain_to': 'one'}, "retain_to='one' must be one of"),
    ({'chunk_size': 4, 'read': 'never'}, "read='never' must be one of 'token'"),
    ({'chunk_size': 4, 'target': 'key'}, "target='key' must be one of 'own'"),
    (
      {'chunk_size': 4, 'to_weights': abs},
      "use read='chunk' instead of 'token' and erase='none'",
    ),
  )
  def test_bad_rules_name_the_value(self, settings, message):
    with self.assertRaisesRegex(errors.UserError, message):
      memory.Rule(**settings)

  def test_objectives(self):
    p, t = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])
    grad = lambda name: jax.grad(memory.OBJECTIVES[name])(p, t)
    np.testing.assert_allclose(grad('l2'), p - t)
    np.testing.assert_allclose(grad('dot'), -t)


class _LongStream(parameterized.TestCase):
  def check_finite(self, kind, erase, objective='l2', inner_lr=0.5):
    # Heads: retention 1 and 1e-6, momentum 0 and 0.999. Rows: repeated keys and
    # random keys. The inner learning rate is at its bound everywhere.
    num_tokens, chunk_size = 102_400, 64
    network = problems.make_network(kind)
    initial = problems.make_problem(kind).initial
    rule = problems.make_rule(
      kind,
      {
        'erase': erase,
        'objective': objective,
        'momentum': True,
        'chunk_size': chunk_size,
        'max_norm': 8.0,
      },
    )
    initial = jax.tree.map(
      lambda w: jnp.tile(w.astype(jnp.float32)[:1], (4,) + (1,) * (w.ndim - 1)),
      initial,
    )
    retention = jnp.array([1.0, 1.0, 1e-6, 1e-6])
    momentum = jnp.array([0.0, 0.999, 0.0, 0.999])

    def project(weights, inputs):
      made = network.read(weights, inputs['x'], (0, 2), (0, 0))
      full = lambda rates: jnp.broadcast_to(
        rates[:, None, None], (*inputs['x'].shape[:3], 1)
      )
      return memory.WriteInputs(
        key=norm.l2_normalize(made.vectors[:, :, 0]),
        value=norm.l2_normalize(made.vectors[:, :, 1]),
        inner_lr=full(jnp.full((4,), inner_lr)),
        retention=full(retention),
        momentum=full(momentum),
        query=inputs['x'],
      )

    @compiling.jit
    def run(keys):
      def body(state, key):
        x = jax.random.normal(key, (2, 4, chunk_size * 16, problems.DIM))
        x = x.at[0].set(jnp.ones(problems.DIM))
        result, state = memory.scan_chunks(
          network, rule, initial, state, {'x': x}, project=project
        )
        return state, (
          jnp.max(jnp.abs(result.read)),
          jnp.all(jnp.isfinite(result.read)),
        )

      start = memory.init_state(rule, initial, 2)
      return jax.lax.scan(body, start, keys)

    keys = jax.random.split(jax.random.key(0), num_tokens // chunk_size // 16)
    state, (largest, finite) = run(keys)
    self.assertTrue(np.all(finite))
    self.assertGreater(np.max(largest), 0.1)
    # The 64 steps of a chunk share an anchor and overshoot, but do not add up.
    quarter = len(largest) // 4
    self.assertLess(np.max(largest[-quarter:]), 10 * np.max(largest[:quarter]))
    for leaf in jax.tree.leaves(state):
      self.assertTrue(np.all(np.isfinite(leaf)))
    for name, weights in state.memory.items():
      departure = jnp.linalg.norm(weights - initial[name], axis=(-1, -2))
      self.assertLess(jnp.max(departure), 8.0 + 1e-3)


@pytest.mark.slow
class LongStreamTest(_LongStream):
  """Self-modifying memories at the largest rates."""

  @parameterized.parameters(
    ('mlp', 'output', 'dot', 2.0), ('matrix', 'none', 'l2', 0.5)
  )
  def test_finite_over_100_000_tokens(self, kind, erase, objective, inner_lr):
    self.check_finite(kind, erase, objective, inner_lr)


@pytest.mark.slow
class LongStreamSweepTest(_LongStream):
  @parameterized.parameters(
    ('mlp', 'none'),
    ('mlp', 'input'),
    ('matrix', 'input'),
    ('mlp', 'every_map'),
    ('matrix', 'every_map'),
  )
  def test_finite_over_100_000_tokens(self, kind, erase):
    self.check_finite(kind, erase)
