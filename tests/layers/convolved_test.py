"""Attention to tokens that are convolved first."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import parameters

_ATTENTION = layers.AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
_SIZES = {'embed_dim': 8, 'max_length': 16, 'dtype': jnp.float32}


class ConvolvedAttentionTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.layer = layers.ConvolvedAttentionConfig(_ATTENTION, 3).make(**_SIZES)
    self.params = parameters.init(jax.random.key(0), self.layer.table)
    self.inputs = jax.random.normal(jax.random.key(1), (2, 12, 8))

  def test_is_attention_to_weighted_sums_of_the_last_tokens(self):
    kernel = np.asarray(self.params['conv']['kernel'])
    x, start = np.asarray(self.inputs), 5
    mixed = np.zeros_like(x)
    for t in range(x.shape[1]):
      for back in range(3):
        # The second document begins at `start` and does not see the first one.
        if 0 <= t - back and (t - back >= start or t < start):
          mixed[:, t] += kernel[2 - back] * x[:, t - back]
    info = layers.TokenInfo(
      reset=jnp.zeros((2, 12), bool).at[:, start].set(True)
    )
    attend = _ATTENTION.make(**_SIZES)
    expected, _ = attend.apply(self.params, None, jnp.asarray(mixed), info)
    found, _ = self.layer.apply(self.params, None, self.inputs, info)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  def test_pieces_equal_the_whole(self):
    info = layers.TokenInfo()
    whole, _ = self.layer.apply(self.params, None, self.inputs, info)
    state, parts = self.layer.init_state(self.params, 2), []
    for begin, end in ((0, 1), (1, 3), (3, 12)):
      part = self.inputs[:, begin:end]
      out, state = self.layer.apply(self.params, state, part, info)
      parts.append(out)
    np.testing.assert_allclose(
      np.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-6
    )

  def test_a_width_of_one_mixes_nothing(self):
    with self.assertRaisesRegex(errors.UserError, 'width=1 must be at least 2'):
      layers.ConvolvedAttentionConfig(_ATTENTION, 1)
