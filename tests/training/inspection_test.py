import os
import pathlib

from absl.testing import absltest
import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import models
from nested_learning import training
from nested_learning.training import checkpoints
from tests.training import tiny


class InspectionTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    config = tiny.experiment(self.root)
    model = models.make_model(config.model)
    optimizer = training.make_optimizer(config, model.table)
    shapes = jax.eval_shape(
      training.make_init(config, model, optimizer), jax.random.key(0)
    )
    state = jax.tree.map(lambda x: jnp.full(x.shape, 3, x.dtype), shapes)
    items = {k: v for k, v in state._asdict().items() if v is not None}
    with checkpoints.open_manager(self.root, keep=9) as manager:
      for step in (4, 1000):
        checkpoints.save(
          manager,
          step,
          items,
          data={'step': step},
          config=config,
          tokenizer_fingerprint='bytes-1',
        )

  def test_says_what_is_there(self):
    text, damaged = training.inspect(self.root)
    self.assertEqual(damaged, {})
    for line in (
      r'\| 4 +\| 20\d\d-.*\| good +\|',
      r'\| 1,000 +\| 20\d\d-.*\| good +\|',
      '## Step 1,000, the newest good one',
      r'\| experiment +\| tiny +\|',
      r'\| written by +\| nested_learning .*JAX \d',
      r'\| steps skipped +\| 3 +\|',
      r'\| slow +\| 3 +\| 3 +\| 3 +\|',  # updates, steps since, norm
      # 260 x 16 numbers of 4 bytes, each of them 3
      r'\| embed\w* +\| 260x16 +\| float32 +\| 193.494 +\| 16,640 +\|',
    ):
      self.assertRegex(text, line)

  def test_finds_damage_and_describes_what_is_good(self):
    folder = self.root / 'checkpoints' / '1000'
    for path in folder.glob('optimizer/**/d/*'):
      os.truncate(path, path.stat().st_size // 2)
    text, damaged = training.inspect(self.root)
    self.assertEqual(list(damaged), [1000])
    self.assertRegex(text, r'\| 1,000 .*DAMAGED: .*/1000 cannot be read')
    self.assertIn('## Step 4, the newest good one', text)

  def test_without_checkpoints(self):
    with self.assertRaisesRegex(errors.UserError, 'holds no checkpoint; give'):
      training.inspect(self.root / 'other')
