"""Extensions: whole calls, any split and single tokens give the same."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import memory
from nested_learning.memory import extensions
from tests import compiling

_BATCH, _HEADS, _DIM, _TOKENS = 2, 2, 4, 23

_PLAIN = {'erase': 'none'}
_TRACE = {'erase': 'none', 'momentum': True}
_RULES = {
  'window': (extensions.Omega(4), _PLAIN),
  'window_with_momentum': (extensions.Omega(9), _TRACE | {'chunk_size': 5}),
  'window_of_one': (extensions.Omega(1), _PLAIN),
  'orthogonal': (
    extensions.Omega(3, step='orthogonal'),
    _TRACE | {'max_norm': 0.5},
  ),
  'orthogonal_alone': (extensions.Omega(1, step='orthogonal'), _TRACE),
  'local': (extensions.LocalTargets(), {'erase': 'every_map'}),
}


def make_inputs(rule):
  """Draws random `WriteInputs` with all that the rule needs."""
  rng = np.random.default_rng(0)
  shape = (_BATCH, _HEADS, _TOKENS)
  k, v, q = (rng.normal(size=(*shape, _DIM)) for _ in range(3))
  rate = lambda: rng.uniform(size=(*shape, 1))
  inputs = memory.WriteInputs(
    key=k / np.linalg.norm(k, axis=-1, keepdims=True),
    value=v,
    query=q,
    inner_lr=0.3 * rng.uniform(size=(*shape, 1)),
    retention=rng.uniform(0.9, 1.0, size=(*shape, 1)),
    momentum=rate() if rule.momentum else None,
    extra={name: rate() for name in rule.extension.inputs},
  )
  return jax.tree.map(jnp.asarray, inputs)


class ExtensionsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(*_RULES)
  def test_streams(self, name):
    extension, settings = _RULES[name]
    rule = memory.Rule(
      **{'chunk_size': 8, 'target': 'value', **settings}, extension=extension
    )
    network = memory.make_mlp(
      num_heads=_HEADS,
      dim=_DIM,
      num_vectors=1,
      hidden_dim=_DIM,
      activation=jax.nn.silu,
    )
    rng = np.random.default_rng(1)
    initial = {
      name: jnp.asarray(0.5 * rng.normal(size=param.shape))
      for name, param in network.table.items()
    }
    reset = jnp.asarray(rng.uniform(size=(_BATCH, _TOKENS)) < 0.1)
    inputs = make_inputs(rule)
    start = memory.init_state(rule, initial, _BATCH)

    def call(engine, state, mask=None):
      result, state = engine(
        network,
        rule,
        initial,
        state,
        inputs,
        project=None,
        reset=reset,
        mask=mask,
      )
      return result.read, state

    @compiling.jit
    def run():
      return [
        call(memory.scan_tokens, start),
        call(memory.scan_chunks, None),
      ]

    part = compiling.jit(
      lambda state, mask: call(memory.scan_chunks, state, mask)
    )
    (expected, last), (read, after) = run()
    close = lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-9)
    close(read, expected)
    jax.tree.map(close, self.comparable(after), self.comparable(last))
    self.assertGreater(np.abs(expected).max(), 0.1)
    for map_name, weights in last.memory.items():
      moved = np.abs(weights - initial[map_name])
      self.assertGreater(moved.max(), 0.01)

    cuts = np.sort(rng.integers(4, size=(_BATCH, _TOKENS)), axis=1)
    state, total = start, 0.0
    for i in range(4):
      read, state = part(state, jnp.asarray(cuts == i))
      total += np.where((cuts == i)[:, None, :, None], read, 0.0)
    close(total, expected)
    jax.tree.map(close, self.comparable(state), self.comparable(last))

    _, padded = part(state, jnp.zeros((_BATCH, _TOKENS), bool))
    jax.tree.map(
      np.testing.assert_array_equal,
      self.comparable(padded),
      self.comparable(state),
    )

  def comparable(self, state):
    """Returns the state without values that nothing reads again."""
    tail = state.extra
    if tail is not None:
      hide = lambda x: jnp.where(tail.valid, x, 0.0)
      tail = tail._replace(
        key=hide(tail.key), value=hide(tail.value), weight=hide(tail.weight)
      )
    return state._replace(anchor=None, extra=tail)

  @parameterized.parameters(
    (lambda: extensions.Omega(0), 'window=0 must be at least 1'),
    (lambda: extensions.Omega(step='newton'), "step='newton' must be one of"),
    (
      lambda: memory.Rule(4, extension=extensions.Omega(2)),
      "Omega.window=2.* erase='input'; set it to 'none'",
    ),
    (
      lambda: memory.Rule(
        4, erase='none', extension=extensions.Omega(step='orthogonal')
      ),
      "step='orthogonal'.* momentum=False; set it to True",
    ),
    (
      lambda: memory.Rule(
        4, erase='every_map', extension=extensions.LocalTargets()
      ),
      "LocalTargets .* target='own'; set it to 'value'",
    ),
  )
  def test_settings_that_do_not_fit_name_the_way_out(self, make, message):
    with self.assertRaisesRegex(errors.UserError, message):
      make()

  def test_local_targets_need_an_mlp_as_wide_as_its_values(self):
    size = {'num_heads': 1, 'dim': 4, 'num_vectors': 1}
    check = extensions.LocalTargets().check_network
    with self.assertRaisesRegex(errors.UserError, "use kind='mlp'"):
      check(memory.make_matrix(**size))
    wide = memory.make_mlp(**size, hidden_dim=6, activation=jax.nn.silu)
    with self.assertRaisesRegex(errors.UserError, 'hidden_dim=6 must be .*=4'):
      check(wide)
