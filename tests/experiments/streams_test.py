"""Tests of the experiment on long streams: its controls, and its page."""

import dataclasses
import json
import pathlib

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import cells
from experiments import streams
from experiments import streams_report
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import levels
from nested_learning import models
from nested_learning import parameters
from tests import compiling
from tests.training import tiny

_VOCAB, _SIZE = 5, 4


def make_text(num_tokens=64):
  tokens = np.arange(num_tokens, dtype=np.int32)
  return {'tokens': tokens, 'starts': tokens % 5 == 3}


class StreamsTest(absltest.TestCase):
  def test_models_are_of_one_size_and_share_a_chain(self):
    configs = [
      streams.make_config(name, streams.get_config()) for name in streams.MODELS
    ]
    sizes = [
      parameters.count(models.make_model(x.model).table) for x in configs
    ]
    self.assertLess(max(sizes) / min(sizes), 1.03)
    (chain,) = {tuple(y.name for y in x.model.levels) for x in configs}
    self.assertLen(chain, len(streams.get_config().update_every))
    self.assertLen({(x.data, x.train) for x in configs}, 1)
    other = streams.make_config('hope', streams.get_config(), seed=1)
    self.assertEqual((other.seed, other.data.seed), (1, 1))

  def test_streams_are_the_text_in_pieces(self):
    config = dataclasses.replace(
      streams.get_config(), piece=8, num_tokens=16, search_tokens=8
    )
    make = lambda order: streams.make_batches(
      make_text(), config, num_tokens=16, skip=20, order=order
    )
    join = lambda batches, name: np.concatenate([x[name] for x in batches], 1)
    files, other = make('files'), make('other')
    tokens = join(files, 'tokens')
    np.testing.assert_array_equal(tokens, np.arange(20, 52).reshape(2, 16))
    np.testing.assert_array_equal(join(files, 'targets'), tokens + 1)
    np.testing.assert_array_equal(
      join(files, 'reset'), np.arange(16) == np.zeros((2, 1))
    )
    moved = join(other, 'tokens')
    self.assertFalse(np.array_equal(moved, tokens))
    np.testing.assert_array_equal(np.sort(moved), tokens)
    # Documents stay whole: they begin at 3, 8, 13, ...
    starts = np.flatnonzero(np.diff(moved[0]) != 1) + 1
    self.assertTrue(set(moved[0][starts] % 5) <= {3, 0})
    with self.assertRaisesRegex(errors.UserError, '64 tokens, .* need 69'):
      streams.make_batches(
        make_text(), config, num_tokens=16, skip=36, order='files'
      )

  def test_calibration_is_gradient_descent_on_two_parameters(self):
    logits = jax.random.normal(jax.random.key(0), (2, 12, _VOCAB))
    targets = jax.random.randint(jax.random.key(1), (2, 12), 0, _VOCAB)
    plain = models.make_model(
      dataclasses.replace(tiny.MODEL, vocab_size=_VOCAB)
    )
    forward = lambda params, state, tokens, reset: (logits[:, tokens[0]], state)
    level = levels.InnerLevelConfig(_SIZE, learning_rate=1.0, clip_norm=0.4)
    model = streams.calibrate(plain._replace(forward=forward), level)
    token_loss = optax.softmax_cross_entropy_with_integer_labels
    found, state = [], None
    for piece in (np.arange(8), np.arange(8, 12)):
      tokens = np.stack([piece, piece])
      loss, state = model.losses(
        (None, 0.7), state, tokens, targets[:, piece], token_loss
      )
      found.append(loss)
    expected = []
    for row in range(2):
      scale, bias = 0.0, jnp.zeros(_VOCAB)
      for i in range(0, 12, _SIZE):
        x, y = logits[row, i : i + _SIZE], targets[row, i : i + _SIZE]
        calibrated = lambda s, b, x=x, y=y: token_loss(jnp.exp(s) * x + b, y)
        expected.append(calibrated(scale, bias))
        mean = lambda s, b, f=calibrated: jnp.mean(f(s, b)[:-1])
        gradients = jax.grad(mean, argnums=(0, 1))(scale, bias)
        clip = min(1, 0.4 / optax.tree.norm(gradients))
        scale -= 0.7 * clip * gradients[0]
        bias -= 0.7 * clip * gradients[1]
    np.testing.assert_allclose(
      np.concatenate(found, axis=1),
      np.concatenate(expected).reshape(2, 12),
      rtol=1e-5,
    )

  @pytest.mark.slow
  def test_runs_and_goes_on(self):
    self.enterContext(compiling.quickly())
    root = pathlib.Path(self.create_tempdir().full_path)
    config = streams.StreamsConfig(
      models=('transformer',),
      num_tokens=512,
      num_streams=1,
      piece=128,
      update_every=(64, 128),
      rates=(0.3,),
      search_tokens=128,
      source=tiny.write_corpus(root / 'text'),
      num_steps=1,
      num_seeds=2,
    )
    streams.run(config, str(root / 'run'), 'train')
    summary = json.loads((root / 'run/summary.json').read_text())
    frozen = summary['transformer_nothing_late']
    self.assertBetween(frozen, 4, 10)
    self.assertLess(summary['transformer_levels_late'], frozen)
    before = (root / 'run/cells').stat().st_mtime_ns
    streams.run(config, str(root / 'run'), 'train')
    self.assertEqual((root / 'run/cells').stat().st_mtime_ns, before)


def make_values(bits_per_byte, num_tokens=2**15):
  edges = evaluation.stream_edges(num_tokens)
  size = np.diff(edges).astype(float)
  return {
    'edges': edges.tolist(),
    'bits': (bits_per_byte * size).tolist(),
    'bytes': size.tolist(),
    'bits_per_byte': bits_per_byte,
  }


class ReportTest(absltest.TestCase):
  def test_page_says_what_comes_out(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    store = cells.open_store(root)
    settings = {'streams': {'num_tokens': 2**15}, 'search': {'rates': [1.0]}}

    def put(name, values, seed=0, **more):
      name = streams_report.cell_name('hope', seed, name)
      cells.measure(store, 'streams', name, settings | more, lambda: values)

    put('trained', {'bits_per_byte': 2.1, 'steps': 1})
    put('nothing files', make_values(3.0), rate=0.0)
    put('memories files', make_values(2.0), rate=0.0)
    put('levels files', make_values(1.9), rate=1.0)
    put('levels search 1', make_values(1.95))
    put('calibration files', make_values(1.98), rate=0.3)
    put('calibration search 0.3', make_values(1.99))
    # Another training, whose rates are those of the first one.
    put('trained', {'bits_per_byte': 2.1, 'steps': 1}, 1)
    for name, value in zip(
      ('nothing', 'memories', 'levels', 'calibration'),
      (3, 2.2, 2.0, 2.18),
      strict=True,
    ):
      put(f'{name} files', make_values(value), 1, rate=1.0)
    # One that is not finished does not count.
    put('nothing files', make_values(9.0), 2, rate=0.0)
    summary = streams_report.write_page(store, root / 'page', streams.MODELS)
    text = (root / 'page' / 'README.md').read_text()
    self.assertIn('(seeds: 2): from token 8,192 on, levels', text)
    self.assertIn('give 0.150 ± 0.071 bits per byte, at least the 0.05', text)
    self.assertIn('calibration alone gives 0.020 ± 0.000, 13% of it', text)
    self.assertIn('2.100 ± 0.141', text)
    self.assertRegex(text, r'0-4K +\| 4K-8K +\| 8K-16K +\| 16K-32K')
    self.assertAlmostEqual(summary['hope_levels_late'], 1.95)
    self.assertAlmostEqual(summary['hope_nothing_late'], 3)
    self.assertTrue((root / 'page' / 'streams.png').is_file())
    self.assertTrue((root / 'page' / 'streams.json').is_file())
