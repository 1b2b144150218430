"""Tests of the zoo."""

from absl.testing import parameterized

from nested_learning import configs
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters


class ZooTest(parameterized.TestCase):
  @parameterized.parameters(
    ('hope_tiny', 33_128),
    ('hope_170m', 168_347_328),
    ('hope_340m', 335_940_864),
    ('hope_760m', 762_253_824),
    ('hope_1p3b', 1_299_454_752),
    ('hope_70b', 69_352_850_432),
    ('tnt_340m', 335_498_496),
    ('sliding_window_340m', 265_602_048),
    ('samba_small', 873_800),
    ('samba_340m', 297_404_352),
    ('linear_attention_340m', 328_813_056),
    ('retnet_340m', 328_813_056),
    ('gated_linear_attention_340m', 329_206_656),
    ('deltanet_340m', 329_206_656),
    ('gated_deltanet_340m', 329_600_256),
    ('ttt_linear_340m', 330_828_672),
    ('ttt_mlp_340m', 341_838_720),
    ('yaad_340m', 342_232_320),
    ('titans_340m', 333_139_584),
    ('omeganet_340m', 342_184_320),
    ('atlas_340m', 342_971_520),
    ('deltattt_340m', 332_745_984),
    ('titans_mac_340m', 396_177_024),
    ('titans_mag_340m', 396_152_448),
    ('titans_mal_340m', 396_127_872),
    ('hope_attention_tiny', 23_872),
    ('hope_attention_170m', 148_476_672),
    ('hope_attention_340m', 265_651_200),
    ('hope_attention_760m', 604_915_200),
    ('hope_attention_1p3b', 1_071_925_248),
    ('transformer_tiny', 23_744),
    ('transformer_170m', 148_458_240),
    ('transformer_340m', 265_602_048),
    ('transformer_760m', 604_841_472),
    ('transformer_1p3b', 1_071_851_520),
  )
  def test_parameter_count(self, name, count):
    config = models.zoo.make_config(name)
    self.assertEqual(parameters.count(models.make_model(config).table), count)

  def test_every_name_makes_a_config_that_can_be_written(self):
    for name in models.zoo.names():
      config = models.zoo.make_config(name)
      self.assertEqual(configs.from_json(configs.to_json(config)), config, name)

  def test_levels_of_a_chain_learn_inside_a_stream(self):
    for name in models.zoo.names():
      config, inner = models.zoo.make_config(name), models.zoo.make_inner(name)
      self.assertEqual(inner.is_on, len(config.levels) > 1, name)
      models.make_model(config, inner)  # refuses clocks that do not fit
      self.assertEqual(configs.from_json(configs.to_json(inner)), inner, name)
    of = lambda name: models.zoo.make_inner(name).update_every
    self.assertEqual(of('hope_170m'), (512, 2048, 8192))
    self.assertEqual(of('hope_attention_small'), (64, 256, 1024))
    self.assertEqual(of('transformer_170m'), ())

  def test_mixers_of_a_pattern_are_changed_by_their_index(self):
    config = models.zoo.make_config('samba_tiny')
    changed = configs.override(config, ['mixer.1.window=8'])
    self.assertEqual(changed.mixer[1].window, 8)
    self.assertEqual(changed.mixer[0], config.mixer[0])

  def test_a_name_may_begin_with_another_family(self):
    plain, gated = (
      models.zoo.make_config(f'{family}_tiny').mixer
      for family in ('titans', 'titans_mag')
    )
    self.assertEqual(gated.memory, plain)

  def test_sets_fields(self):
    config = models.zoo.make_config('hope_tiny', dtype='bfloat16')
    self.assertEqual(config.dtype, 'bfloat16')

  @parameterized.parameters('num_heads', 'embed_dim', 'num_layers', 'mlp_dim')
  def test_sizes_are_positive(self, name):
    sizes = {'num_layers': 1, 'embed_dim': 8, 'num_heads': 2, 'mlp_dim': 8}
    message = f'{name}=0 must be at least 1'
    with self.assertRaisesRegex(errors.UserError, message):
      models.zoo.Size(**(sizes | {name: 0}))

  def test_names_the_nearest(self):
    with self.assertRaisesRegex(ValueError, "no model 'hope_17m'.*hope_170m"):
      models.zoo.make_config('hope_17m')
    with self.assertRaisesRegex(ValueError, "no model 'hope_17m'.*hope_170m"):
      models.zoo.make_inner('hope_17m')
