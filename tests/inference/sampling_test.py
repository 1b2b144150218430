from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import inference

# Probabilities 0.5, 0.3, 0.15, 0.05 in a shuffled order.
PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3])
LOGITS = jnp.log(PROBABILITIES)[None]


def kept(logits):
  return set(np.flatnonzero(np.isfinite(np.asarray(logits)[0])).tolist())


class SamplingTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})
  )
  def test_top_k(self, k, expected):
    self.assertEqual(kept(inference.keep_top_k(LOGITS, k)), expected)

  @parameterized.parameters(
    (0.01, {1}),
    (0.49, {1}),
    (0.51, {1, 3}),
    (0.79, {1, 3}),
    (0.81, {0, 1, 3}),
    (0.96, {0, 1, 2, 3}),
  )
  def test_top_p(self, p, expected):
    self.assertEqual(kept(inference.keep_top_p(LOGITS, p)), expected)

  def test_filters_leave_kept_logits_unchanged(self):
    for filtered in (
      inference.keep_top_k(LOGITS, 2),
      inference.keep_top_p(LOGITS, 0.6),
    ):
      np.testing.assert_array_equal(filtered[0, [1, 3]], LOGITS[0, [1, 3]])

  def test_greedy_at_temperature_zero(self):
    token = inference.sample(jax.random.key(0), LOGITS, temperature=0)
    self.assertEqual(token.tolist(), [1])

  @parameterized.parameters(1e-3, 1e-30, 1e-38, 1e-39, 1e-300)
  def test_a_tiny_temperature_draws_the_most_likely(self, temperature):
    logits = jnp.array([[1.0, 2.0, 12.0, 9.0]])
    for seed in range(4):
      token = inference.sample(
        jax.random.key(seed), logits, temperature=temperature
      )
      self.assertEqual(token.tolist(), [2])

  @parameterized.parameters(
    ({'temperature': -1.0}, 'temperature=-1.0 must'),
    ({'temperature': float('nan')}, 'temperature=nan must'),
    ({'top_k': 0}, 'top_k=0 must'),
    ({'top_p': 2.0}, 'top_p=2.0 must'),
  )
  def test_refuses_settings_out_of_range(self, settings, message):
    with self.assertRaisesRegex(errors.UserError, message):
      inference.sample(jax.random.key(0), LOGITS, **settings)

  @parameterized.parameters(
    ({}, PROBABILITIES),
    ({'temperature': 0.5}, PROBABILITIES**2),
    ({'top_k': 2}, PROBABILITIES * [0, 1, 0, 1]),
    ({'top_p': 0.7}, PROBABILITIES * [0, 1, 0, 1]),
    # At temperature 1/2 the first two make 0.93, and are enough.
    ({'top_p': 0.9, 'temperature': 0.5}, PROBABILITIES**2 * [0, 1, 0, 1]),
  )
  def test_draws_from_the_distribution(self, settings, weights):
    logits = jnp.broadcast_to(LOGITS, (20_000, 4))
    tokens = inference.sample(jax.random.key(0), logits, **settings)
    counts = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.015)
    self.assertTrue(np.all(counts[weights == 0] == 0))


class SampleRowsTest(parameterized.TestCase):
  def test_equals_sample_row_by_row(self):
    settings = [
      (0.0, None, 1.0),
      (1.0, None, 1.0),
      (0.5, 3, 1.0),
      (2.0, None, 0.3),
      (1.2, 5, 0.7),
      (1e-38, 100, 1.0),
    ]
    logits = 3 * jax.random.normal(jax.random.key(0), (len(settings), 40))
    keys = jax.random.split(jax.random.key(1), (50, len(settings)))
    temperature, top_k, top_p = zip(*settings, strict=True)
    found = jax.jit(jax.vmap(inference.sample_rows, (0, None)))(
      keys,
      logits,
      temperature=jnp.broadcast_to(jnp.array(temperature), keys.shape),
      top_k=jnp.broadcast_to(jnp.array([k or 40 for k in top_k]), keys.shape),
      top_p=jnp.broadcast_to(jnp.array(top_p), keys.shape),
    )
    for row, (temperature, top_k, top_p) in enumerate(settings):
      sample = lambda key, row=row, t=temperature, k=top_k, p=top_p: (
        inference.sample(
          key, logits[row][None], temperature=t, top_k=k, top_p=p
        )[0]
      )
      expected = jax.vmap(sample)(keys[:, row])
      np.testing.assert_array_equal(found[:, row], expected)
