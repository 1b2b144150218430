"""Tests of the experiments that train a language model."""

import dataclasses
import pathlib

from absl.testing import parameterized

from nested_learning import configs
from nested_learning import models
from nested_learning import parameters
from nested_learning import training

_FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'experiments'


class SizesTest(parameterized.TestCase):
  @parameterized.parameters(
    'quickstart.py',
    'quickstart.py:transformer',
    'hope.py:170m',
    'hope.py:340m',
    'hope.py:760m',
    'hope.py:1p3b',
    'hope.py:7b',
    'hope.py:70b',
    'hope.py:transformer_340m',
    'pretrained/llama.py:8b',
  )
  def test_repeats_from_json_and_is_described(self, spec):
    config = configs.load(str(_FOLDER / spec))
    self.assertEqual(configs.from_json(configs.to_json(config)), config)
    if config.data.batch_size < 8:  # a row for each of the devices here
      config = configs.override(config, ['data.batch_size=8'])
    count = parameters.count(models.make_model(config.model).table)
    self.assertIn(f'{count:,} parameters', training.describe(config))

  @parameterized.parameters(
    ('hope.py:170m', 168_347_328),
    ('hope.py:340m', 335_940_864),
    ('hope.py:760m', 762_253_824),
    ('hope.py:1p3b', 1_299_454_752),
    ('hope.py:7b', 6_995_063_808),
    ('hope.py:70b', 69_352_850_432),
  )
  def test_is_as_large_as_its_name(self, spec, count):
    config = configs.load(str(_FOLDER / spec))
    self.assertEqual(
      parameters.count(models.make_model(config.model).table), count
    )

  def test_llama_without_memories_is_the_imported_one(self):
    config = configs.load(str(_FOLDER / 'pretrained/llama.py:8b')).model
    plain = dataclasses.replace(config, placement=models.PlacementConfig())
    count = lambda x: parameters.count(models.make_model(x).table)
    self.assertEqual(count(plain), 8_030_261_248)
    self.assertBetween(count(config) / count(plain), 1.03, 1.06)
    self.assertLen(config.blocks, 4)

  @parameterized.parameters('hope.py', 'hope.py:2b', 'hope.py:mamba_7b')
  def test_hope_needs_a_size(self, spec):
    with self.assertRaisesRegex(ValueError, 'must name a size, one of 170m'):
      configs.load(str(_FOLDER / spec))

  def test_quickstart_refuses_another_mixer(self):
    with self.assertRaisesRegex(ValueError, "'mamba' must be 'hope' or"):
      configs.load(str(_FOLDER / 'quickstart.py:mamba'))
