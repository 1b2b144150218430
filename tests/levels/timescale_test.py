"""Tests of the time that levels retain a fact."""

from absl.testing import absltest
import jax
import numpy as np
import optax

from nested_learning import levels
from tests import compiling

_ROWS, _VOCAB, _SIZE, _SLOW = 2, 7, 4, 8  # tokens of the periods
_RATES = {'fast': 4.0, 'slow': 1.0}


def measure(*, nested=False, num_tokens=32):
  """Measures levels that are tables of logits, which the model adds up."""
  params = {
    name: 0.1 * jax.random.normal(jax.random.key(i), (_VOCAB, _VOCAB))
    for i, name in enumerate(_RATES)
  }

  def forward(params, state, tokens, *, reset=None, mask=None, write=True):
    return sum(params[name][tokens] for name in _RATES), state + 1

  learning = [
    levels.LearningLevel('fast', _SIZE, optax.sgd(_RATES['fast'])),
    levels.LearningLevel('slow', _SLOW, optax.sgd(_RATES['slow'])),
  ]
  labels = {name: name for name in _RATES}
  spec = levels.ReaderSpec(
    forward,
    lambda params, batch_size: jax.numpy.zeros((batch_size,)),
    levels.StepSpec(learning, labels, nested=nested, max_drift=1e6),
  )
  reader = levels.make_reader(spec)
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(_VOCAB, size=(_ROWS, n)).astype(np.int32)
  fact = np.tile(np.array([0, 3, 1, 5], np.int32), (_ROWS, 1))
  return levels.measure_readability(
    reader, params, fact, instead=draw(_SIZE), filler=draw(num_tokens)
  )


class TimescaleTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())

  def test_a_fact_is_found_in_the_level_that_learned_it(self):
    found = measure()
    np.testing.assert_array_equal(found.tokens, np.arange(9) * _SIZE)
    fast, slow = found.gains['fast'], found.gains['slow']
    self.assertEqual(fast.shape, (9, _ROWS))
    # The fast level learns it at once, the slow one at the end of its period.
    self.assertGreater(fast[0].min(), 0.1)
    np.testing.assert_array_equal(slow[0], [0, 0])
    self.assertGreater(slow[1].min(), 0.05)
    np.testing.assert_allclose(found.together[0], fast[0], rtol=1e-5)
    self.assertGreater(found.together[1].min(), slow[1].max())

  def test_a_nested_level_retains_nothing_beyond_the_slower_period(self):
    found = measure(nested=True)
    fast = found.gains['fast']
    self.assertGreater(fast[0].min(), 0.1)
    np.testing.assert_array_equal(fast[1::2], np.zeros((4, _ROWS)))  # restarts
    np.testing.assert_allclose(fast[1:], 0.0, atol=0.02)
    scale = levels.effective_timescale(found.tokens, fast)
    self.assertTrue(np.all((scale > 0) & (scale <= _SIZE)))
    slow = levels.effective_timescale(found.tokens, found.gains['slow'])
    self.assertGreater(slow.min(), scale.max())

  def test_the_timescale_is_from_the_peak_to_its_half(self):
    tokens = np.array([0, 10, 20, 30, 40])
    gain = np.array(
      [
        [8.0, 0.0, 1.0, 0.0],
        [6.0, 8.0, 1.0, -1.0],
        [2.0, 5.0, 0.9, 0.0],
        [4.0, 3.0, 0.8, 0.0],
        [0.0, 1.0, 0.7, -2.0],
      ]
    )
    np.testing.assert_allclose(
      levels.effective_timescale(tokens, gain), [15, 15, np.inf, 0]
    )
