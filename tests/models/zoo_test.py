"""Tests of the zoo."""

from absl.testing import absltest
from absl.testing import parameterized

from nested_learning import models
from nested_learning import parameters


class ZooTest(parameterized.TestCase):
  @parameterized.parameters(
    ('hope_tiny', 37_232),
    ('hope_170m', 169_859_136),
    ('hope_340m', 341_544_960),
    ('hope_760m', 759_452_928),
    ('hope_1p3b', 1_304_910_912),
    ('hope_attention_tiny', 23_872),
    ('hope_attention_170m', 148_476_672),
    ('hope_attention_340m', 265_651_200),
    ('hope_attention_760m', 588_989_952),
    ('hope_attention_1p3b', 1_040_074_752),
    ('transformer_tiny', 23_744),
    ('transformer_170m', 148_458_240),
    ('transformer_340m', 265_602_048),
    ('transformer_760m', 588_916_224),
    ('transformer_1p3b', 1_040_001_024),
  )
  def test_parameter_count(self, name, count):
    config = models.zoo.make_config(name)
    self.assertEqual(parameters.count(models.make_model(config).table), count)

  def test_sets_fields(self):
    config = models.zoo.make_config('hope_tiny', dtype='bfloat16')
    self.assertEqual(config.dtype, 'bfloat16')

  def test_names_the_nearest(self):
    with self.assertRaisesRegex(ValueError, "no model 'hope_17m'.*hope_170m"):
      models.zoo.make_config('hope_17m')


if __name__ == '__main__':
  absltest.main()
