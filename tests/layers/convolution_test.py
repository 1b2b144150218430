"""The causal convolution against a loop, in one call and in several."""

from absl.testing import parameterized
import jax
from jax import test_util
import numpy as np

from nested_learning import parameters
from nested_learning.layers import convolution
from tests import compiling

_WIDTH, _CHANNELS = 4, 3


def convolve_by_loop(kernel, x, reset):
  """Convolves one row, with the taps that lie in the token's document."""
  out = np.zeros_like(x)
  start = 0
  for t in range(len(x)):
    start = t if reset[t] else start
    for back in range(len(kernel)):
      if t - back >= start:
        out[t] += kernel[-1 - back] * x[t - back]
  return out


class ConvolutionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    table = convolution.table(_WIDTH, _CHANNELS, None)
    self.params = parameters.init(jax.random.key(0), table)
    self.x = rng.normal(size=(2, 19, _CHANNELS)).astype(np.float32)
    self.reset = rng.uniform(size=(2, 19)) < 0.2
    self.mask = rng.uniform(size=(2, 19)) < 0.7
    self.apply = compiling.jit(convolution.apply)

  def test_equals_a_loop(self):
    out, _ = self.apply(self.params, None, self.x, reset=self.reset)
    for row in range(2):
      expected = convolve_by_loop(
        self.params['kernel'], self.x[row], self.reset[row]
      )
      np.testing.assert_allclose(out[row], expected, atol=1e-5)

  @parameterized.parameters(False, True)
  def test_gradients_equal_differences(self, marked):
    marks = {'reset': self.reset, 'mask': self.mask} if marked else {}
    there = self.mask[..., None] if marked else 1.0
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
      kernel = rng.normal(size=(_WIDTH, _CHANNELS))
      state = rng.normal(size=(2, _WIDTH - 1, _CHANNELS))
      weights = rng.normal(size=self.x.shape) * there

      def loss(kernel, state, x):
        out, last = convolution.apply({'kernel': kernel}, state, x, **marks)
        return (weights * out**2).sum() + (last**3).sum()

      arguments = kernel, state, self.x.astype(np.float64)
      first = jax.grad(loss, (0, 1, 2))
      test_util.check_grads(loss, arguments, order=1, modes=['rev'])
      # Second derivatives: levels learn through the gradient.
      norm = lambda *x: sum((g**2).sum() for g in jax.tree.leaves(first(*x)))
      test_util.check_grads(norm, arguments, order=1, modes=['rev'])

  def test_padding_is_skipped(self):
    out, _ = self.apply(
      self.params, None, self.x, reset=self.reset, mask=self.mask
    )
    for row in range(2):
      there = self.mask[row]
      expected = convolve_by_loop(
        self.params['kernel'], self.x[row, there], self.reset[row, there]
      )
      np.testing.assert_allclose(out[row, there], expected, atol=1e-5)

  @parameterized.product(
    lengths=((5, 14), (1, 1, 1, 16), (18, 1), (2, 3, 14)),
    marked=(False, True),
  )
  def test_any_split_gives_the_same(self, lengths, marked):
    marks = {'reset': self.reset, 'mask': self.mask} if marked else {}
    whole, last = self.apply(self.params, None, self.x, **marks)
    state = convolution.init_state(_WIDTH, _CHANNELS, 2, np.float32)
    pieces, t = [], 0
    for n in lengths:
      piece = {k: v[:, t : t + n] for k, v in marks.items()}
      out, state = self.apply(self.params, state, self.x[:, t : t + n], **piece)
      pieces.append(out)
      t += n
    there = self.mask[..., None] if marked else True
    np.testing.assert_allclose(
      np.where(there, np.concatenate(pieces, 1), 0),
      np.where(there, whole, 0),
      atol=1e-6,
    )
    np.testing.assert_allclose(state, last)

  def test_no_tokens_leave_the_state(self):
    none = {'reset': self.reset[:, :0], 'mask': self.mask[:, :0]}
    for marks in ({}, none):
      out, after = convolution.apply(
        self.params, self.x[:, :3], self.x[:, :0], **marks
      )
      self.assertEqual(out.shape, (2, 0, _CHANNELS))
      np.testing.assert_array_equal(after, self.x[:, :3])

  def test_padding_leaves_the_state(self):
    state = self.x[:, :3]
    _, after = self.apply(
      self.params, state, self.x, mask=np.zeros((2, 19), bool)
    )
    np.testing.assert_array_equal(after, state)
