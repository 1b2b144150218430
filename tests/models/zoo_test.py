"""The named models: what they are called, and how large they are."""

from absl.testing import absltest
from absl.testing import parameterized

from nested_learning import layers
from nested_learning import models
from nested_learning import parameters
from nested_learning.models import zoo


class ZooTest(parameterized.TestCase):
  @parameterized.parameters(
    ('hope_tiny', 37_232),
    ('hope_170m', 175_167_552),
    ('hope_340m', 369_856_512),
    ('hope_760m', 807_228_672),
    ('hope_1p3b', 1_411_079_232),
    ('hope_attention_340m', 293_962_752),
    ('transformer_170m', 153_766_656),
    ('transformer_1p3b', 1_146_169_344),
  )
  def test_parameter_count(self, name, count):
    model = models.make_model(zoo.make_config(name))
    self.assertEqual(parameters.count(model.table), count)

  @parameterized.parameters(*zoo.names())
  def test_families_share_everything_but_their_mixer(self, name):
    config = zoo.make_config(name)
    is_hope = isinstance(config.mixer, layers.SelfModifyingTitansConfig)
    family = name.rsplit('_', 1)[0]
    self.assertEqual(is_hope, family == 'hope')
    self.assertLen(config.levels, 1 if family == 'transformer' else 3)
    size = zoo.SIZES[name.rsplit('_', 1)[1]]
    width = sum(level.mlp_dim for level in config.levels)
    self.assertEqual(width, size.mlp_dim)
    self.assertEqual(config.mixer.num_heads, size.num_heads)

  def test_changes(self):
    config = zoo.make_config('hope_tiny', dtype='bfloat16')
    self.assertEqual(config.dtype, 'bfloat16')

  def test_unknown_name(self):
    with self.assertRaisesRegex(ValueError, "'hope_350m'.*hope_340m"):
      zoo.make_config('hope_350m')


if __name__ == '__main__':
  absltest.main()
