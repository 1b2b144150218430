"""Tests of bits per byte of streams with carried state."""

import math
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import optax
import pytest

from nested_learning import errors
from nested_learning import evaluation
from nested_learning import inference
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from tests import compiling

_VOCAB, _ROWS, _TOKENS, _PIECE = 11, 2, 32, 8
_LEVELS = (
  models.LevelConfig('fast', mlp_dim=6),
  models.LevelConfig('slow', mlp_dim=6),
)
_MEMORY = layers.MemoryMixerConfig(
  num_heads=1, head_dim=4, kind='matrix', adaptive=(), chunk_size=4
)
_INNER = levels.make_inner((4, 8), learning_rate=0.3, depth=1.0)


def make_model(mixer, inner=None, max_length=_TOKENS):
  config = models.ModelConfig(
    vocab_size=_VOCAB,
    num_layers=1,
    embed_dim=8,
    mixer=mixer,
    levels=_LEVELS,
    max_length=max_length,
    dtype='float64',
  )
  return models.make_model(config, inner)


def make_stream(num_tokens=_TOKENS):
  rng = np.random.default_rng(0)
  tokens = rng.integers(_VOCAB, size=(_ROWS, num_tokens + 1)).astype(np.int32)
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'mask': rng.random((_ROWS, num_tokens)) < 0.8,
    'reset': np.arange(num_tokens) == np.zeros((_ROWS, 1)),
  }


def cut(stream, size=_PIECE):
  for i in range(0, stream['tokens'].shape[1], size):
    yield {name: x[:, i : i + size] for name, x in stream.items()}


def make_evaluate(model, byte_lengths):
  reading = evaluation.make_reading(model, byte_lengths)
  return evaluation.make_evaluate_streams(reading)


class StreamsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    self.enterContext(compiling.quickly())

  def params(self, model):
    params = jax.jit(model.init_params)(jax.random.key(0))
    return jax.tree.map(lambda x: 1.5 * x.astype('float64'), params)

  def test_pieces_are_one_stream(self):
    self.check_pieces(_MEMORY, None)

  @pytest.mark.slow
  def test_pieces_are_one_stream_of_levels(self):
    self.check_pieces(layers.AttentionConfig(1, 1, head_dim=4), _INNER)

  def check_pieces(self, mixer, inner):
    model, stream = make_model(mixer, inner), make_stream()
    params, lengths = self.params(model), np.arange(_VOCAB)
    tokens, targets = stream['tokens'], stream['targets']
    logits, _ = jax.jit(model.forward)(
      params, None, tokens, reset=stream['reset']
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    loss = np.asarray(loss) * stream['mask']
    size = lengths[targets] * stream['mask']
    evaluate = make_evaluate(model, lengths)
    found = evaluate(params, cut(stream))
    # Sums of a position are float32.
    np.testing.assert_allclose(found.totals.loss, loss.sum(0), rtol=1e-6)
    np.testing.assert_array_equal(found.totals.num_bytes, size.sum(0))
    self.assertAlmostEqual(
      found.bits_per_byte, loss.sum() / size.sum() / math.log(2), places=5
    )

  @pytest.mark.slow
  def test_attention_begins_anew_and_levels_go_on(self):
    attention = layers.AttentionConfig(1, 1, head_dim=4)
    plain = make_model(attention, max_length=2 * _PIECE)
    stream, params = make_stream(), self.params(plain)
    stream['mask'][:] = True
    session = inference.Session(plain, params, _INNER, num_rows=_ROWS)
    losses = session.feed(stream['tokens'])  # of each token, given those before
    model = models.make_model(plain.config, _INNER)
    evaluate = make_evaluate(model, np.ones(_VOCAB))
    found = evaluate(params, cut(stream)).totals.loss
    np.testing.assert_allclose(found[:-1], losses[:, 1:].sum(0), rtol=1e-5)

  def test_refuses_a_stream_without_text(self):
    evaluate = make_evaluate(make_model(_MEMORY), np.ones(_VOCAB))
    with self.assertRaisesRegex(errors.UserError, 'no target with text'):
      evaluate(None, [])


class CurvesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    size = np.arange(1.0, 201)
    nats = lambda bits: size * bits * math.log(2)
    make = lambda x: evaluation.Evaluation(
      evaluation.Totals(x, np.ones(200), size)
    )
    bits = np.where(np.arange(200) < 64, 3.0, 2.0)
    self.curves = {'off': make(nats(bits)), 'on': make(nats(bits - 1))}
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_bins_weigh_bytes(self):
    found = evaluation.bits_per_byte_over_bins(
      self.curves['off'], np.array([0, 63, 65, 200])
    )
    middle = (64 * 3 + 65 * 2) / (64 + 65)
    np.testing.assert_allclose(found, [3.0, middle, 2.0])

  def test_table_and_plot(self):
    path = self.root / 'stream.csv'
    evaluation.write_curves(path, self.curves)
    lines = path.read_text().splitlines()
    self.assertEqual(lines[0], 'begin,end,num_bytes,off,on')
    self.assertEqual(lines[1], f'0,64,{64 * 65 // 2},3.000000,2.000000')
    self.assertStartsWith(lines[2], '64,91,')
    self.assertStartsWith(lines[-1], '181,200,')
    evaluation.plot_curves(self.root / 'stream.png', self.curves)
    self.assertEqual((self.root / 'stream.png').read_bytes()[1:4], b'PNG')
