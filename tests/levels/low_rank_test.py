"""Tests of levels that learn changes of low rank."""

import dataclasses
import functools

from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from tests import compiling

_VOCAB, _RANK = 11, 2
_CONFIG = dataclasses.replace(
  models.zoo.make_config('hope_attention_tiny', vocab_size=_VOCAB), num_layers=3
)
_TOKENS = np.random.default_rng(0).integers(_VOCAB, size=(2, 24))


@functools.cache
def params():
  model = models.make_model(_CONFIG)
  return compiling.jit(model.init_params)(jax.random.key(0))


def read(rate, **settings):
  """Returns logits and levels after three segments."""
  inner = levels.make_inner(
    (8,) * len(_CONFIG.levels),
    learning_rate=rate,
    clip_norm=None,
    depth=0.6,
    **settings,
  )
  model = models.make_model(_CONFIG, inner)
  tokens = _TOKENS if rate == 0 else _TOKENS[:, :8]
  return compiling.jit(model.forward)(params(), None, tokens)


class LowRankTest(parameterized.TestCase):
  def test_begins_with_the_model(self):
    low, whole = (
      read(0.0, learns=learns)[0] for learns in ('low_rank', 'every_map')
    )
    np.testing.assert_allclose(low, whole, rtol=1e-5, atol=1e-6)

  def test_a_step_is_that_of_the_matrix_seen_through_a(self):
    _, low = read(0.1, learns='low_rank', rank=_RANK)
    _, whole = read(0.1)
    for name, level in low.levels.items():
      stacks = level.params.changes['blocks']
      wholes = whole.levels[name].params['blocks']
      for part in ('first', 'rest'):
        changed = getattr(stacks, part)['levels'][name]
        full = getattr(wholes, part)['levels'][name]
        start = getattr(params_split(), part)['levels'][name]
        self.assertEqual(set(leaves(changed)), {'gate', 'up', 'down'})
        for matrix, (a, b) in leaves(changed).items():
          self.assertEqual(b.shape[2], _RANK)
          step = full[matrix] - start[matrix]  # -rate * gradient
          expected = np.einsum('blir,blio->blro', a, step)
          np.testing.assert_allclose(b, expected, rtol=1e-3, atol=1e-7)
          self.assertGreater(np.abs(b).max(), 1e-4)

  def test_the_state_is_small_and_the_matrices_are_not_in_it(self):
    size = lambda x: sum(leaf.size for leaf in jax.tree.leaves(x))
    adam = optimizers.configs.AdamW()
    sizes = {
      learns: size(read(0.01, learns=learns, optimizer=adam, rank=1)[1].levels)
      for learns in ('low_rank', 'every_map')
    }
    self.assertLess(10 * sizes['low_rank'], sizes['every_map'])

  def test_learns_what_repeats(self):
    inner = levels.make_inner(
      (8,) * len(_CONFIG.levels),
      learning_rate=3e-3,
      optimizer=optimizers.configs.AdamW(),
      learns='low_rank',
      depth=1.0,
    )
    model = models.make_model(_CONFIG, inner)
    tokens = np.tile(_TOKENS[:1, :8], 24)
    logits, state = compiling.jit(model.forward)(params(), None, tokens)
    logs = jax.nn.log_softmax(logits[0, :-1])
    losses = -np.take_along_axis(np.asarray(logs), tokens[0, 1:, None], axis=1)
    self.assertLess(losses[-8:].mean(), 0.5 * losses[:16].mean())
    for level in state.levels.values():
      self.assertFalse(level.frozen.any())

  @parameterized.parameters(
    ({'objective': 'dot'}, 'objective=dot needs the inputs'),
    ({'optimizer': optimizers.configs.Dgd()}, 'optimizer=dgd needs the inputs'),
    ({'rank': 0}, 'rank=0 must be at least 1'),
  )
  def test_refuses(self, settings, message):
    with self.assertRaisesRegex(errors.UserError, message):
      levels.make_inner((8,), learns='low_rank', **settings)


def leaves(changed):
  return {name: change for name, change in changed.items() if change}


def params_split():
  """Returns the stacks of the model's blocks as levels start with them."""
  reader = models.make_model(
    _CONFIG, levels.make_inner((8,) * len(_CONFIG.levels), depth=0.6)
  ).reader
  return reader.prepare(params())['blocks']
