"""Rules that newer papers add: chunks, tokens and streams give the same."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import memory
from tests import compiling

_BATCH, _HEADS, _DIM, _TOKENS = 2, 2, 4, 23

# A rule's settings, and which more the feed has.
_RULES = {
  'window': ({'erase': 'none', 'window': 4}, ()),
  'window_with_momentum': (
    {'erase': 'none', 'window': 9, 'momentum': True, 'chunk_size': 5},
    ('momentum',),
  ),
  'orthogonal': (
    {
      'erase': 'none',
      'window': 3,
      'momentum': True,
      'step': 'orthogonal',
      'max_norm': 0.5,
    },
    ('momentum', 'weight'),
  ),
  'orthogonal_alone': (
    {'erase': 'none', 'momentum': True, 'step': 'orthogonal'},
    ('momentum', 'weight'),
  ),
  'local': ({'erase': 'every_map', 'errors': 'local'}, ('hidden_lr',)),
}


def make_feed(extra):
  """A feed of random tokens."""
  rng = np.random.default_rng(0)
  shape = (_BATCH, _HEADS, _TOKENS)
  k, v, q = (rng.normal(size=(*shape, _DIM)) for _ in range(3))
  rates = {name: rng.uniform(size=(*shape, 1)) for name in extra}
  feed = memory.Feed(
    key=k / np.linalg.norm(k, axis=-1, keepdims=True),
    value=v,
    query=q,
    inner_lr=0.3 * rng.uniform(size=(*shape, 1)),
    retention=rng.uniform(0.9, 1.0, size=(*shape, 1)),
    **rates,
  )
  return jax.tree.map(jnp.asarray, feed)


class OptionsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(*_RULES)
  def test_streams(self, name):
    settings, extra = _RULES[name]
    rule = memory.Rule(
      **{'chunk_size': 8, 'target': 'value', **settings},
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
    feed = make_feed(extra)
    start = memory.init_state(
      initial, _BATCH, momentum=rule.momentum, window=rule.window
    )

    def call(engine, state, mask=None):
      result, state = engine(
        network,
        rule,
        initial,
        state,
        feed,
        project=None,
        reset=reset,
        mask=mask,
      )
      return result.read, state

    @compiling.jit
    def run():
      return [
        call(memory.token_loop, start),
        call(memory.chunk_scan, None),
      ]

    part = compiling.jit(
      lambda state, mask: call(memory.chunk_scan, state, mask)
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
    """The state without what nothing reads again."""
    tail = state.tail
    if tail is not None:
      hide = lambda x: jnp.where(tail.valid, x, 0.0)
      tail = tail._replace(
        key=hide(tail.key), value=hide(tail.value), weight=hide(tail.weight)
      )
    return state._replace(anchor=None, tail=tail)

  @parameterized.parameters(
    ({'window': 0}, 'window=0 must be at least 1'),
    (
      {'window': 2, 'erase': 'input'},
      "window=2 .* erase='input'; set .*'none'",
    ),
    ({'step': 'newton'}, "step='newton' must be one of gradient, orthogonal"),
    (
      {'step': 'orthogonal', 'erase': 'none'},
      "step='orthogonal' .* momentum=False; set it to True",
    ),
    ({'errors': 'mine'}, "errors='mine' must be one of propagated"),
    (
      {'errors': 'local', 'erase': 'every_map'},
      "errors='local' .* target='own'; set it to 'value'",
    ),
  )
  def test_bad_rules_name_the_value(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      memory.Rule(chunk_size=4, **settings)


if __name__ == '__main__':
  absltest.main()
