"""Tests of the experiments that train a language model."""

import pathlib

from absl.testing import absltest
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
    'hope_170m.py',
    'hope_340m.py',
    'hope_760m.py',
    'hope_1p3b.py',
    'hope_7b.py',
    'hope_70b.py',
  )
  def test_repeats_from_json_and_is_described(self, spec):
    config = configs.load(str(_FOLDER / spec))
    self.assertEqual(configs.from_json(configs.to_json(config)), config)
    if config.data.batch_size < 8:  # a row for each of the devices here
      config = configs.override(config, ['data.batch_size=8'])
    count = parameters.count(models.make_model(config.model).table)
    self.assertIn(f'{count:,} parameters', training.describe(config))

  @parameterized.parameters(
    ('hope_170m.py', 169_859_136),
    ('hope_340m.py', 341_544_960),
    ('hope_760m.py', 759_452_928),
    ('hope_1p3b.py', 1_304_910_912),
    ('hope_7b.py', 7_012_366_336),
    ('hope_70b.py', 69_984_622_592),
  )
  def test_is_as_large_as_its_name(self, spec, count):
    config = configs.load(str(_FOLDER / spec))
    self.assertEqual(
      parameters.count(models.make_model(config.model).table), count
    )

  def test_quickstart_refuses_another_mixer(self):
    with self.assertRaisesRegex(ValueError, "'mamba' must be 'hope' or"):
      configs.load(str(_FOLDER / 'quickstart.py:mamba'))


if __name__ == '__main__':
  absltest.main()
