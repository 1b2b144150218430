"""Tests of the health of levels: measurements and warnings."""

from absl.testing import absltest
import jax
import numpy as np
import optax

from nested_learning import levels
from tests import compiling

_ROWS, _VOCAB, _SIZE = 2, 7, 4


def make_reader(rates):
  """Makes a reader whose levels are tables of logits, which it adds up."""
  params = {
    name: jax.random.normal(jax.random.key(i), (_VOCAB, _VOCAB))
    for i, name in enumerate(rates)
  }

  def forward(params, state, tokens, *, reset=None, mask=None, write=True):
    return sum(params[name][tokens] for name in rates), state + 1

  learning = [
    levels.LearningLevel(name, _SIZE * 2**i, optax.sgd(rate))
    for i, (name, rate) in enumerate(rates.items())
  ]
  spec = levels.ReaderSpec(
    forward,
    lambda params, batch_size: jax.numpy.zeros((batch_size,)),
    levels.StepSpec(learning, {name: name for name in rates}),
  )
  return levels.make_reader(spec), params


def read(rates, num_tokens=32):
  reader, params = make_reader(rates)
  rng = np.random.default_rng(0)
  tokens = rng.integers(_VOCAB, size=(_ROWS, num_tokens)).astype(np.int32)
  step = compiling.jit(lambda params: reader.read(params, None, tokens)[1])
  return levels.measure_health(step(params))


class HealthTest(absltest.TestCase):
  def test_measures_steps(self):
    measured = read({'fast': 0.1, 'slow': 0.2})
    np.testing.assert_array_equal(measured['fast'].num_updates, [8, 8])
    np.testing.assert_array_equal(measured['slow'].num_updates, [4, 4])
    for name, rate in (('fast', 0.1), ('slow', 0.2)):
      level = measured[name]
      np.testing.assert_allclose(
        level.update_norm, rate * level.gradient_norm, rtol=1e-5
      )
      self.assertGreater(level.drift.min(), level.update_ratio.max() / 10)
      self.assertFalse(level.frozen.any() or level.dead.any())
    self.assertEqual(levels.health_warnings(measured), [])

  def test_a_level_that_does_not_learn_is_dead(self):
    measured = read({'fast': 0.1, 'slow': 1e-9})
    self.assertTrue(measured['slow'].dead.all())
    self.assertFalse(measured['fast'].dead.any())
    (warning,) = levels.health_warnings(measured)
    self.assertRegex(warning, "'slow' is dead in 2 of 2 .* after 4 updates")

  def test_a_level_at_rest_is_not_dead(self):
    measured = read({'fast': 0.1, 'slow': 0.0})
    np.testing.assert_array_equal(measured['slow'].num_updates, [4, 4])
    np.testing.assert_array_equal(measured['slow'].update_norm, [0, 0])
    self.assertEqual(levels.health_warnings(measured), [])

  def test_a_level_with_few_updates_is_not_dead(self):
    measured = read({'fast': 0.1, 'slow': 1e-9}, num_tokens=8)
    self.assertEqual(levels.health_warnings(measured), [])

  def test_a_level_that_diverged_is_named(self):
    measured = read({'fast': 1e6, 'slow': 0.1})
    (warning,) = levels.health_warnings(measured)
    self.assertRegex(warning, "'fast' diverged in 2 of 2 .* frozen")
