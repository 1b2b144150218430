"""Embeddings, heads and learned positions of a model."""

import dataclasses

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from tests import compiling

_CONFIG = models.ModelConfig(
  vocab_size=11,
  num_layers=2,
  embed_dim=8,
  mixer=layers.AttentionConfig(2, 1, head_dim=4),
  levels=(models.LevelConfig('mlp', 12),),
  max_length=16,
)
_TOKENS = np.arange(20).reshape(2, 10) * 7 % 11


def make(mixer=None, **settings):
  """Returns a model, its parameters and its compiled forward pass."""
  config = dataclasses.replace(
    _CONFIG, embedding=models.EmbeddingConfig(**settings)
  )
  if mixer is not None:
    config = dataclasses.replace(config, mixer=mixer)
  model = models.make_model(config)
  return (
    model,
    model.init_params(jax.random.key(0)),
    compiling.jit(model.forward),
  )


class EmbeddingTest(parameterized.TestCase):
  def test_scale_of_one_is_the_default_divided_away(self):
    _, params, forward = make()
    _, _, unscaled = make(scale=1.0, head='own')
    expected, _ = forward(params, None, _TOKENS)
    other = {**params, 'embedding': params['embedding'] * 8**0.5}
    logits, _ = unscaled(other | {'head': params['embedding']}, None, _TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5)

  def test_cap_bounds_the_logits(self):
    _, params, forward = make()
    _, _, capped = make(logit_cap=0.7)
    logits, _ = forward(params, None, _TOKENS)
    np.testing.assert_allclose(
      capped(params, None, _TOKENS)[0], 0.7 * np.tanh(logits / 0.7), atol=1e-6
    )

  @parameterized.parameters(
    (None,), ((_CONFIG.mixer, dataclasses.replace(_CONFIG.mixer, window=4)),)
  )
  def test_positions_are_those_in_the_document(self, mixer):
    model, params, forward = make(mixer, positions='learned')
    reset = np.zeros(_TOKENS.shape, bool)
    reset[:, 0] = reset[1, 6] = True
    whole, _ = forward(params, None, _TOKENS, reset=reset)
    alone, _ = forward(params, None, _TOKENS[1:, 6:])
    np.testing.assert_allclose(whole[1, 6:], alone[0], atol=1e-5)
    moved = {**params, 'positions': params['positions'][::-1]}
    other, _ = forward(moved, None, _TOKENS, reset=reset)
    self.assertGreater(np.abs(other - whole).max(), 1e-2)
    for split in (False, True):
      state, parts = model.init_state(params, 2), []
      for t in range(10):
        given = params
        if split:
          given, state = model.to_layers(params, state)
        logits, state = forward(
          given, state, _TOKENS[:, t : t + 1], reset=reset[:, t : t + 1]
        )
        if split:
          state = model.from_layers(state)
        parts.append(logits)
      np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)

  def test_padding_has_no_position(self):
    _, params, forward = make(positions='learned')
    mask = np.ones(_TOKENS.shape, bool)
    mask[0, :3] = mask[1, 4:6] = False
    logits, _ = forward(params, None, _TOKENS, mask=mask)
    for row in range(2):
      alone, _ = forward(params, None, _TOKENS[row, mask[row]][None])
      np.testing.assert_allclose(logits[row, mask[row]], alone[0], atol=1e-5)

  def test_refuses_positions_without_a_count(self):
    window = dataclasses.replace(_CONFIG.mixer, window=4)
    with self.assertRaisesRegex(errors.UserError, "positions='learned' needs"):
      make(window, positions='learned')
