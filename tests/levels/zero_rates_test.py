"""Tests that levels with learning rates of zero equal the model bit for bit.

Equal bits need equal operations on arrays of equal shapes, so the model reads
the same segments, mapped over rows as levels of each row are. Without that map,
XLA adds the products of a memory's maps in another order, and a Hope of one
block differs by 1.2e-6.
"""

import dataclasses

from absl.testing import absltest
import jax
import numpy as np
import pytest

from nested_learning import levels
from nested_learning import models
from nested_learning.levels import trees
from tests import compiling

_ROWS, _SIZE, _SEGMENTS, _VOCAB = 2, 8, 3, 17


def make(name, **mixer):
  """Makes a model of one block with short chunks, and its parameters."""
  config = models.zoo.make_config(name, vocab_size=_VOCAB, max_length=64)
  config = dataclasses.replace(
    config, num_layers=1, mixer=dataclasses.replace(config.mixer, **mixer)
  )
  model = models.make_model(config)
  return model, compiling.jit(model.init_params)(jax.random.key(0))


def draw():
  shape = _ROWS, _SIZE * _SEGMENTS
  return np.random.default_rng(0).integers(_VOCAB, size=shape).astype(np.int32)


class ZeroRatesTest(absltest.TestCase):
  def check(self, model, params):
    """Compares every way of reading with the model."""
    inner = levels.make_inner(
      (_SIZE,) * len(model.config.levels), learning_rate=0.0
    )
    reader, tokens = models.make_model(model.config, inner).reader, draw()
    axes = trees.row_axes(model.init_state, params)

    def row(state, tokens, marks):
      logits, state = model.forward(
        params,
        trees.add_row_axis(axes, state),
        tokens[None],
        **jax.tree.map(lambda x: x[None], marks),
      )
      return logits[0], trees.drop_row_axis(axes, state)

    plain = compiling.jit(jax.vmap(row))
    nothing = np.zeros((_ROWS, _SIZE), bool)

    def expect(read, learn):
      """Returns logits of one kind of call, and states of another."""
      state, outputs = model.init_state(params, _ROWS), []
      state = trees.rows_first(axes, state)
      for part in np.split(tokens, _SEGMENTS, axis=1):
        outputs.append(plain(state, part, read)[0])
        state = plain(state, part, learn)[1]
      return np.concatenate(outputs, axis=1), state

    start = reader.init_state(params, _ROWS)
    whole = compiling.jit(lambda s: reader.read_segments(params, s, tokens))
    logits, state = whole(start)
    expected, after = expect({}, {})
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, state.model, (after,))
    marked = {'reset': nothing, 'mask': ~nothing}
    pieces = compiling.jit(lambda s: reader.read(params, s, tokens))
    logits, state = pieces(start)
    expected, after = expect(marked, {'reset': nothing})
    np.testing.assert_array_equal(logits, expected)
    jax.tree.map(np.testing.assert_array_equal, state.model, (after,))
    forward = compiling.jit(lambda: model.forward(params, None, tokens)[0])
    np.testing.assert_allclose(logits, forward(), rtol=1e-5, atol=1e-5)

  def test_deltanet(self):
    self.check(*make('deltanet_tiny', chunk_size=4))

  @pytest.mark.slow
  def test_hope(self):
    self.check(*make('hope_tiny', chunk_size=4, chunk_size_others=4))
