"""Experiments whose rows are shared among devices, and those that cannot be."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

from nested_learning import configs
from nested_learning import data
from nested_learning import errors
from nested_learning import models
from nested_learning import training


def _config(name):
  return training.ExperimentConfig(
    name=name,
    model=models.zoo.make_config(name),
    data=data.DataConfig(source='none', sequence_length=256, batch_size=8),
  )


class LongRowsTest(parameterized.TestCase):
  @parameterized.parameters(
    'hope_tiny', 'transformer_tiny', 'titans_mag_tiny', 'tnt_tiny'
  )
  def test_whole_chunks_on_each_device(self, name):
    config = configs.override(_config(name), ['mesh.context=2'])
    self.assertEqual(config.mesh.context, 2)

  @parameterized.parameters(
    ('transformer_tiny', 3, 'length=256 .* into mesh.context=3 .* of 3'),
    ('hope_tiny', 8, 'into chunks of 64 .* mesh.context=8 .* of 512'),
    ('titans_mal_tiny', 8, 'into chunks of 64 .* multiple of 512'),
    ('tnt_tiny', 4, 'into chunks of 128 .* multiple of 512'),
  )
  def test_refuses_a_device_with_a_part_of_a_chunk(self, name, size, message):
    with self.assertRaisesRegex(errors.UserError, message):
      configs.override(_config(name), [f'mesh.context={size}'])

  def test_refuses_what_reads_a_row_in_one_piece(self):
    with self.assertRaisesRegex(errors.UserError, "reset='never'.*context=2"):
      configs.override(
        _config('hope_tiny'), ['data.reset=never', 'mesh.context=2']
      )
    learning = dataclasses.replace(
      _config('hope_tiny').inner, update_every=(64, 128, 256)
    )
    with self.assertRaisesRegex(errors.UserError, 'inner.update_every=.*to 1'):
      config = dataclasses.replace(_config('hope_tiny'), inner=learning)
      configs.override(config, ['mesh.context=2'])


if __name__ == '__main__':
  absltest.main()
