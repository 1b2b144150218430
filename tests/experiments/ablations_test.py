"""Tests of the ablations."""

import pathlib

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from experiments.ablations import small
from launch import sweeps
from nested_learning import configs
from nested_learning import models
from nested_learning import parameters

_FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'experiments/ablations'
_FILES = sorted(
  path.name for path in _FOLDER.glob('*.py') if path.stem != 'small'
)
_HOPE, _NO_CMS = 'hope', 'no_cms'


def _load(name):
  """The sweep of a file, and its configs with the first seed by cell."""
  spec = str(_FOLDER / name)
  sweep = sweeps.load_sweep(spec)
  cells = sweeps.make_cells(spec, sweep)
  loaded = sweeps.load_cells(cells, num_seeds=3, seed_fields=sweep.seed_fields)
  assert all(
    config.seed == config.data.seed == seed
    for (_, seed), (_, config) in loaded.items()
  )
  return sweep, {
    cell: config for (cell, seed), (_, config) in loaded.items() if not seed
  }


class AblationsTest(parameterized.TestCase):
  @parameterized.parameters(*_FILES)
  def test_is_a_sweep_of_small_models_with_a_command(self, name):
    sweep, cells = _load(name)
    self.assertGreater(len(cells), 1)
    self.assertEqual(sweep.metrics, small.METRICS)
    for config in cells.values():
      table = models.make_model(config.model).table
      self.assertLess(parameters.count(table), 600_000)
    base = configs.load(str(_FOLDER / name))
    self.assertEqual(base.name, name.removesuffix('.py'))
    self.assertIn(
      f'python launch/sweep.py --config=experiments/ablations/{name}',
      (_FOLDER / name).read_text(),
    )
    # One of the cells is the model that all of these start from.
    self.assertIn(base, cells.values())

  def test_components_take_one_part_away(self):
    sweep, cells = _load('components.py')
    self.assertLen({row.printed for row in sweep.rows}, len(sweep.rows))
    for name, config in cells.items():
      changed = configs.differences(config, cells[_HOPE])
      part = '.levels.' if name == _NO_CMS else '.mixer.'
      self.assertTrue(all(part in path for path in changed), changed)
      self.assertEqual(bool(changed), name != _HOPE)
    mixers = {name: config.model.mixer for name, config in cells.items()}
    self.assertNotIn('k', mixers['static_k'].adaptive)
    self.assertNotIn('v', mixers['static_v'].adaptive)
    self.assertIn('q', mixers['adaptive_q'].adaptive)

  def test_levels_are_as_wide_together_whatever_their_number(self):
    for file, names in (
      ('levels.py', [f'levels_{n}' for n in range(1, 5)]),
      ('components.py', [_HOPE, _NO_CMS]),
    ):
      _, cells = _load(file)
      widths = [
        sum(level.mlp_dim for level in cells[name].model.levels)
        for name in names
      ]
      self.assertLen(set(widths), 1)
    _, cells = _load('levels.py')
    chunks = [level.train_every for level in cells['levels_4'].model.levels]
    step = cells['levels_4'].batch_tokens
    self.assertEqual(chunks, [None, 2 * step, 4 * step, 8 * step])
    clockless = cells['levels_2_one_clock'].model.levels
    self.assertEqual([level.train_every for level in clockless], [None, None])

  @parameterized.parameters(*_FILES)
  @pytest.mark.slow
  def test_every_cell_is_a_model(self, name):
    for config in _load(name)[1].values():
      model = models.make_model(config.model)
      tokens = jnp.zeros((2, config.data.sequence_length), jnp.int32)
      params = jax.eval_shape(model.init_params, jax.random.key(0))
      logits, _ = jax.eval_shape(model.forward, params, None, tokens)
      self.assertEqual(logits.shape, (*tokens.shape, config.model.vocab_size))
