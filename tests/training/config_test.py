import dataclasses
import pathlib

from absl.testing import parameterized

from nested_learning import configs
from nested_learning import data
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning import training
from tests.training import tiny


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'num_steps': 0}, 'train.num_steps=0 must be at least 1'),
    ({'accumulate': 0}, 'train.accumulate=0 must be at least 1'),
    ({'learning_rate': 0.0}, 'train.learning_rate=0.0 must be above 0'),
    ({'learning_rate': float('inf')}, 'train.learning_rate=inf must be above'),
    ({'learning_rate': float('nan')}, 'train.learning_rate=nan must be above'),
    ({'weight_decay': float('inf')}, 'train.weight_decay=inf must be'),
    ({'spike_factor': float('inf')}, 'train.spike_factor=inf must be above 1'),
    ({'weight_decay': -1.0}, 'train.weight_decay=-1.0 must be at least 0'),
    ({'final_fraction': 2.0}, 'train.final_fraction=2.0 must be between'),
  )
  def test_refuses_a_number_out_of_range(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      training.TrainConfig(**fields)

  @parameterized.named_parameters(
    (
      'too_long',
      {'data': {'sequence_length': 256}},
      'data.sequence_length=256 is longer than model.max_length=128',
    ),
    (
      'accumulate',
      {'train': {'accumulate': 3}},
      'data.batch_size=8 is not a multiple of train.accumulate=3',
    ),
    (
      'train_every',
      {'data': {'batch_size': 12}},
      "level 'slow' has train_every=512, .* 384 tokens .* set it to 768",
    ),
    (
      'endless_stream',
      {'data': {'reset': 'never'}},
      "data.reset='never' makes a stream of 192 tokens per row",
    ),
  )
  def test_refuses_parts_that_do_not_fit(self, changes, message):
    root = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(errors.UserError, message):
      tiny.experiment(root, **changes)

  def test_pretrained_levels_take_smaller_steps(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    plain = tiny.experiment(root).default_inner
    based = tiny.experiment(root, base='folder').default_inner
    for config, every, rate, rule in (
      (plain, 128, 1.0, optimizers.configs.Sgd()),
      (based, 256, 3e-4, optimizers.configs.AdamW()),
    ):
      fast, slow = config.levels
      clocks = fast.update_every, slow.update_every
      self.assertEqual(clocks, (every, 4 * every))
      self.assertEqual((fast.learning_rate, fast.optimizer), (rate, rule))

  def test_levels_of_streams_are_the_first_that_learn(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    make, inner = levels.make_inner, levels.make_inner((16, 32))
    default = tiny.experiment(root).stream_inner
    self.assertEqual(default, make((128, 512)))  # as in a session
    short = tiny.experiment(root, model={'max_length': 64})
    self.assertFalse(short.stream_inner.is_on)  # holds no segment of it
    both = tiny.experiment(root, inner=inner)
    self.assertEqual(both.stream_inner, inner)
    both = dataclasses.replace(
      both, evaluation=evaluation.EvaluationConfig(inner=make((8, None)))
    )
    self.assertEqual(both.stream_inner, make((8, None)))

  @parameterized.parameters(
    ((16,), 'one entry for each of the 2 levels'),
    ((32, 16), 'a slower level before a faster'),
    ((15, 32), 'no common divisor'),
    ((256, 512), r'a segment of 256 .*evaluation.inner.*max_length=128'),
  )
  def test_refuses_levels_of_streams_that_do_not_fit(self, clocks, message):
    root = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(errors.UserError, message) as caught:
      tiny.experiment(root, evaluation={'inner': levels.make_inner(clocks)})
    self.assertNotIn('\n', str(caught.exception))

  def test_refuses_levels_of_a_model_without_a_chain(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    config = tiny.experiment(root, model={'levels': ()})
    self.assertFalse(config.stream_inner.is_on)
    for name in ('inner', 'evaluation.inner'):
      with self.assertRaisesRegex(
        errors.UserError, 'without a chain'
      ) as caught:
        configs.override(config, [f'{name}.levels=8,16'])
      self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(-1, 2**32, 10**20)
  def test_refuses_a_seed_that_makes_no_key(self, seed):
    root = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(errors.UserError, f'seed={seed} must be at le'):
      tiny.experiment(root, seed=seed)

  def test_a_level_at_every_step_fits_any_batch(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    levels = (models.LevelConfig('only', mlp_dim=16),)
    config = tiny.experiment(
      root, model={'levels': levels}, data={'batch_size': 12}
    )
    self.assertEqual(config.batch_tokens, 12 * 32)


def _experiment(name):
  return training.ExperimentConfig(
    name=name,
    model=models.zoo.make_config(name),
    data=data.DataConfig(source='none', sequence_length=256, batch_size=8),
  )


class ContextTest(parameterized.TestCase):
  @parameterized.parameters(
    'hope_tiny', 'transformer_tiny', 'titans_mag_tiny', 'tnt_tiny'
  )
  def test_whole_chunks_on_each_device(self, name):
    config = configs.override(_experiment(name), ['mesh.context=2'])
    self.assertEqual(config.mesh.context, 2)

  @parameterized.parameters(
    ('transformer_tiny', 3, 'length=256 .* into mesh.context=3 .* of 3'),
    ('hope_tiny', 8, 'into chunks of 64 .* mesh.context=8 .* of 512'),
    ('titans_mal_tiny', 8, 'into chunks of 64 .* multiple of 512'),
    ('tnt_tiny', 4, 'into chunks of 128 .* multiple of 512'),
  )
  def test_refuses_a_device_with_a_part_of_a_chunk(self, name, size, message):
    with self.assertRaisesRegex(errors.UserError, message):
      configs.override(_experiment(name), [f'mesh.context={size}'])

  def test_refuses_what_reads_a_row_in_one_piece(self):
    with self.assertRaisesRegex(errors.UserError, "reset='never'.*context=2"):
      configs.override(
        _experiment('hope_tiny'), ['data.reset=never', 'mesh.context=2']
      )
    learning = levels.make_inner((64, 128, 256))
    message = r'inner.levels with update_every=\(64.*to 1'
    with self.assertRaisesRegex(errors.UserError, message):
      config = dataclasses.replace(_experiment('hope_tiny'), inner=learning)
      configs.override(config, ['mesh.context=2'])
