from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from nested_learning.training import guard as guard_lib


def check_all(norms, *, losses=None, spike_factor=None):
  """Checks steps one after the other."""
  guard, taken = guard_lib.init_guard(), []
  for loss, norm in zip(losses or [1.0] * len(norms), norms, strict=True):
    sound, guard = guard_lib.check_step(
      guard,
      loss=jnp.float32(loss),
      gradient_norm=jnp.float32(norm),
      spike_factor=spike_factor,
    )
    taken.append(bool(sound))
  return taken, guard


class GuardTest(parameterized.TestCase):
  def test_takes_what_is_finite(self):
    taken, guard = check_all([1.0, 3.0, 1e30])
    self.assertEqual(taken, [True] * 3)
    self.assertEqual(guard.num_taken, 3)
    self.assertEqual(guard.num_skipped, 0)
    np.testing.assert_allclose(guard.usual_norm, np.mean([1, 3, 1e30]), 1e-6)

  @parameterized.parameters(
    (np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)
  )
  def test_leaves_out_what_is_not(self, loss, norm):
    taken, guard = check_all(
      [2.0, norm, norm, 4.0, norm], losses=[1.0, loss, loss, 1.0, loss]
    )
    self.assertEqual(taken, [True, False, False, True, False])
    self.assertEqual(guard.num_taken, 2)
    self.assertEqual(guard.num_skipped, 3)
    self.assertEqual(guard.num_in_a_row, 1)
    self.assertEqual(guard.usual_norm, 3.0)

  def test_leaves_out_spikes_once_the_norm_is_known(self):
    before = [9.0] + [1.0] * (guard_lib.NUM_STEPS - 1)
    usual = np.mean(before)
    taken, guard = check_all(
      [*before, 3.01 * usual, 2.99 * usual], spike_factor=3.0
    )
    self.assertEqual(taken, [True] * len(before) + [False, True])
    self.assertEqual(guard.num_skipped, 1)
    # From here on the mean forgets; the spike does not enter it.
    mean = usual + 1.99 * usual / guard_lib.NUM_STEPS
    np.testing.assert_allclose(guard.usual_norm, mean, rtol=1e-5)

  def test_is_no_spike_before(self):
    norms = [1.0] * (guard_lib.NUM_STEPS - 1) + [1e6]
    self.assertTrue(all(check_all(norms, spike_factor=2.0)[0]))
