"""Tests of the mixture of a nested chain's members, against a loop."""

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning.levels import mixture

_ROWS, _MEMBERS, _LENGTH, _VOCAB = 2, 3, 24, 5


def mix_loop(logits, tokens, reset):
  """Runs the definition in probabilities, on logits [t, v] of each member."""
  switch, number = mixture.SWITCH, len(logits)
  said = np.exp(np.asarray(logits, np.float64))
  said /= said.sum(axis=-1, keepdims=True)  # [k, t, v]
  weights, mixed = np.full(number, 1 / number), []
  for t, token in enumerate(tokens):
    if t and not reset[t]:
      weights = weights * said[:, t - 1, token]
      weights = weights / weights.sum()
    weights = (1 - switch) * weights + switch / number
    mixed.append(weights @ said[:, t])
  return np.log(mixed)


def draw(scale=2.0):
  rng = np.random.default_rng(0)
  shape = _MEMBERS, _ROWS, _LENGTH, _VOCAB
  tokens = rng.integers(_VOCAB, size=(_ROWS, _LENGTH)).astype(np.int32)
  reset = rng.uniform(size=tokens.shape) < 0.15
  return list(scale * rng.normal(size=shape)), tokens, reset


def losses(mixed, tokens):
  """Returns the losses [b, t - 1] of all tokens but the first."""
  return -np.take_along_axis(mixed[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]


class MixtureTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  def test_equals_the_loop(self):
    logits, tokens, reset = draw()
    start = mixture.init(_ROWS, _MEMBERS, _VOCAB, np.float64)
    mixed, _ = mixture.mix(start, logits, tokens, reset=reset)
    for row in range(_ROWS):
      expected = mix_loop([x[row] for x in logits], tokens[row], reset[row])
      np.testing.assert_allclose(mixed[row], expected, atol=1e-9)

  def test_padding_and_splits_change_nothing(self):
    logits, tokens, reset = draw()
    start = mixture.init(_ROWS, _MEMBERS, _VOCAB, np.float64)
    whole, after = mixture.mix(start, logits, tokens, reset=reset)
    rng = np.random.default_rng(1)
    call = np.sort(rng.integers(4, size=tokens.shape), axis=1)
    state, total = start, 0.0
    for i in range(4):
      said, state = mixture.mix(
        state, logits, tokens, reset=reset, mask=call == i
      )
      total += np.where((call == i)[..., None], said, 0.0)
    np.testing.assert_allclose(total, whole, atol=1e-9)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-9), state, after
    )

  @parameterized.parameters(0.5, 2.0, 20.0)
  def test_loses_no_more_than_the_bound_to_any_choice_of_members(self, scale):
    logits, tokens, _ = draw(scale)
    start = mixture.init(_ROWS, _MEMBERS, _VOCAB, np.float64)
    found = losses(mixture.mix(start, logits, tokens)[0], tokens)
    each = np.stack([losses(jax.nn.log_softmax(x), tokens) for x in logits])
    count, stay = _LENGTH - 1, -np.log1p(-mixture.SWITCH)
    comes = np.log(_MEMBERS / mixture.SWITCH)
    first = np.log(_MEMBERS)
    single = each.sum(axis=2).min(axis=0) + first + (count - 1) * stay
    self.assertTrue(np.all(found.sum(axis=1) <= single))
    half = count // 2  # one member, and from the middle on another one
    parts = each[..., :half].sum(axis=2), each[..., half:].sum(axis=2)
    double = sum(x.min(axis=0) for x in parts) + first + comes
    double = double + (count - 2) * stay
    self.assertTrue(np.all(found.sum(axis=1) <= double))

  def test_a_certain_member_that_is_wrong_does_no_harm(self):
    tokens = np.zeros((1, _LENGTH), np.int32)
    right = np.zeros((1, _LENGTH, _VOCAB))
    right[..., 0] = 30.0
    wrong = -1e6 * right
    start = mixture.init(1, 2, _VOCAB, np.float64)
    for members in ([right, wrong], [wrong, right]):
      found = losses(mixture.mix(start, members, tokens)[0], tokens)
      self.assertTrue(np.all(np.isfinite(found)))
      self.assertLess(found[0, 5:].max(), 0.02)
