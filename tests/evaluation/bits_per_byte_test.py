import math
import pathlib
import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from tests.training import tiny


class UniformModel:
  """Predicts a distribution that depends on the token alone."""

  losses = reader = None

  def __init__(self, vocab_size):
    # No limit to the length of streams.
    self.config = types.SimpleNamespace(vocab_size=vocab_size, pattern=())
    self.num_traces = 0
    self.table = jax.random.normal(jax.random.key(0), (vocab_size, vocab_size))

  def forward(self, params, state, tokens, *, reset, write):
    del params, reset
    logits = self.table[tokens] * (2.0 if write else 1.0)
    self.num_traces += 1
    return logits + state[:, None, None] * logits, state + 1.0

  def init_state(self, params, batch_size):
    del params
    return jnp.zeros(batch_size)


def make_batch(seed, mask=1.0):
  keys = jax.random.split(jax.random.key(seed), 3)
  draw = lambda key: jax.random.randint(key, (2, 6), 0, 5)
  reset = jnp.zeros((2, 6), bool).at[0, 3].set(True)
  mask = jax.random.bernoulli(keys[2], mask, (2, 6))
  return {
    'tokens': draw(keys[0]),
    'targets': draw(keys[1]),
    'mask': mask,
    'reset': reset,
  }


BYTE_LENGTHS = np.array([1, 2, 3, 4, 0])
# Row 0 starts a document at its fourth token.
POSITION = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])


def make_evaluate(model, lengths=BYTE_LENGTHS, *, write=True, carry=False):
  reading = evaluation.make_reading(model, lengths, write=write)
  return evaluation.make_evaluate(reading, carry=carry)


class EvaluateTest(parameterized.TestCase):
  def losses(self, model, batch, scale):
    log_probs = jax.nn.log_softmax(model.table[batch['tokens']] * scale)
    picked = jnp.take_along_axis(log_probs, batch['targets'][..., None], -1)
    return -np.asarray(picked[..., 0], np.float64)

  @parameterized.parameters((True, 2.0), (False, 1.0))
  def test_counts_bits_bytes_and_positions(self, write, scale):
    model = UniformModel(5)
    batches = [make_batch(seed, mask=0.7) for seed in range(3)]
    evaluate = make_evaluate(model, write=write)
    result = evaluate(None, batches)
    loss, count, size = np.zeros(6), np.zeros(6), np.zeros(6)
    for batch in batches:
      mask = np.asarray(batch['mask'], np.float64)
      np.add.at(loss, POSITION, self.losses(model, batch, scale) * mask)
      np.add.at(count, POSITION, mask)
      np.add.at(size, POSITION, BYTE_LENGTHS[batch['targets']] * mask)
    np.testing.assert_allclose(result.loss_by_position, loss / count, rtol=1e-5)
    np.testing.assert_allclose(result.loss, loss.sum() / count.sum(), rtol=1e-5)
    np.testing.assert_allclose(
      result.bits_per_byte, loss.sum() / math.log(2) / size.sum(), rtol=1e-5
    )
    self.assertEqual(result.num_tokens, count.sum())

  def test_carries_the_state_only_if_asked(self):
    model = UniformModel(5)
    batches = [make_batch(0), make_batch(1)]
    evaluate = make_evaluate(model, carry=True)
    expected = [
      self.losses(model, batch, scale).mean()
      for batch, scale in zip(batches, (2.0, 4.0), strict=True)
    ]
    np.testing.assert_allclose(
      evaluate(None, batches).loss, np.mean(expected), rtol=1e-5
    )
    batches[1]['reset'] = batches[1]['reset'].at[:, 0].set(True)  # new streams
    expected[1] = self.losses(model, batches[1], 2.0).mean()
    np.testing.assert_allclose(
      evaluate(None, batches).loss, np.mean(expected), rtol=1e-5
    )

  def test_rows_and_streams_share_a_program(self):
    model, batches = UniformModel(5), [make_batch(seed) for seed in range(2)]
    reading = evaluation.make_reading(model, BYTE_LENGTHS)
    rows = evaluation.make_evaluate(reading, carry=True)(None, batches)
    streams = evaluation.make_evaluate_streams(reading)(None, batches)
    self.assertEqual(model.num_traces, 1)
    self.assertLen(streams.totals.loss, 12)
    self.assertAlmostEqual(rows.loss, streams.loss, places=5)

  def test_a_real_model_without_memory_ignores_writes(self):
    model = models.make_model(tiny.MODEL)
    params = jax.jit(model.init_params)(jax.random.key(0))
    lengths = np.ones(tiny.MODEL.vocab_size)
    on, off = (
      make_evaluate(model, lengths, write=write)(params, [make_batch(0)])
      for write in (True, False)
    )
    self.assertEqual(on.loss, off.loss)
    self.assertBetween(on.bits_per_byte, 4, 12)

  def test_refuses_a_text_without_targets(self):
    evaluate = make_evaluate(UniformModel(5))
    for batches in ([], [make_batch(0, mask=0.0)]):
      with self.assertRaisesRegex(errors.UserError, 'no target with text'):
        evaluate(None, batches)

  @parameterized.parameters('tokens', 'targets')
  def test_refuses_tokens_that_the_model_does_not_have(self, name):
    batch = make_batch(0)
    batch[name] = batch[name].at[1, 2].set(5)
    evaluate = make_evaluate(UniformModel(5))
    with self.assertRaisesRegex(
      errors.UserError, '1 tokens of a batch .* 5 of'
    ):
      evaluate(None, [batch])

  def test_refuses_a_tokenizer_that_is_larger_than_the_model(self):
    with self.assertRaisesRegex(errors.UserError, 'has 5 tokens, and .*=4;'):
      make_evaluate(UniformModel(4))

  def test_position_counts_from_the_reset(self):
    reset = make_batch(0)['reset']
    np.testing.assert_array_equal(evaluation.context_position(reset), POSITION)

  def test_refuses_no_batches(self):
    with self.assertRaisesRegex(errors.UserError, 'num_batches=0 must be'):
      evaluation.EvaluationConfig(num_batches=0)


def make_evaluation(losses, counts):
  losses, counts = np.array(losses), np.array(counts, float)
  return evaluation.Evaluation(
    evaluation.Totals(losses * counts, counts, counts)
  )


class ByPositionTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    counts = [4, 2, 1, 0]
    self.on = make_evaluation([3.0, 2.0, 1.0, 0.0], counts)
    self.off = make_evaluation([3.0, 2.5, 2.0, 0.0], counts)
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_gain(self):
    gain = evaluation.gain_by_position(self.on, self.off)
    np.testing.assert_allclose(gain, [0.0, 0.5, 1.0, np.nan])

  def test_bins_weigh_tokens(self):
    edges = np.array([0, 1, 3, 4])
    means = evaluation.mean_over_bins(self.on, edges)
    np.testing.assert_allclose(means, [3.0, 5.0 / 3.0, np.nan])

  def test_edges_cover_every_position_once(self):
    for num_positions in (1, 2, 3, 64, 100, 1024):
      edges = evaluation.bin_edges(num_positions)
      self.assertEqual((edges[0], edges[-1]), (0, num_positions))
      self.assertTrue(np.all(np.diff(edges) > 0))
    self.assertLess(len(edges), 25)

  def test_table_has_a_line_per_position(self):
    path = self.root / 'table.csv'
    evaluation.write_by_position(path, self.on, self.off)
    self.assertEqual(
      path.read_text().splitlines(),
      [
        'position,num_tokens,loss,loss_writes_off,gain',
        '0,4,3.000000,3.000000,0.000000',
        '1,2,2.000000,2.500000,0.500000',
        '2,1,1.000000,2.000000,1.000000',
      ],
    )

  def test_plot_is_an_image(self):
    path = self.root / 'plot.png'
    evaluation.plot_by_position(path, self.on, self.off)
    self.assertEqual(path.read_bytes()[1:4], b'PNG')
