import dataclasses
import os
import pathlib
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import sharding
from nested_learning.training import checkpoints
from tests.training import tiny


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.config = tiny.experiment(self.root)
    mesh = sharding.make_mesh()
    state = {
      'params': {'b': jnp.arange(3.0)},
      'optimizer': {'count': jnp.int32(7), 'on': jnp.array([True, False])},
    }
    self.state = jax.device_put(state, sharding.replicated(mesh))
    self.state['params']['w'] = jax.device_put(
      jax.random.normal(jax.random.key(0), (16, 8)),
      sharding.batch_sharding(mesh),
    )
    self.abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      self.state,
    )

  def save(self, *steps, state=None, **changes):
    with checkpoints.open_manager(self.root, keep=9) as manager:
      for step in steps:
        checkpoints.save(
          manager,
          step,
          state or self.state,
          data={'step': step},
          config=changes.get('config', self.config),
          tokenizer_fingerprint='bytes-1',
          train_seconds=2.5,
        )

  def restore(self, **changes):
    arguments = {'config': self.config, 'tokenizer_fingerprint': 'bytes-1'}
    with checkpoints.open_manager(self.root, read_only=True) as manager:
      return checkpoints.restore(manager, self.abstract, **arguments | changes)

  def files(self, step, pattern):
    folder = self.root / 'checkpoints' / str(step)
    found = [path for path in folder.glob(pattern) if path.is_file()]
    self.assertNotEmpty(found)
    return found

  def test_gives_back_what_was_saved_where_it_was(self):
    self.save(3)
    restored = self.restore()
    jax.tree.map(np.testing.assert_array_equal, self.state, restored.state)
    jax.tree.map(
      lambda a, b: self.assertEqual(a.sharding, b.sharding),
      self.state,
      restored.state,
    )
    self.assertEqual(restored.step, 3)
    self.assertEqual(restored.data, {'step': 3})
    self.assertEqual(restored.manifest['train_seconds'], 2.5)

  def test_without_a_checkpoint(self):
    (self.root / 'checkpoints').mkdir()
    with self.assertRaisesRegex(errors.UserError, 'holds no checkpoint'):
      self.restore()

  @parameterized.parameters(
    'params/**/d/*', 'params/_METADATA', 'manifest/metadata', 'data/metadata'
  )
  def test_truncated(self, pattern):
    self.save(3, 6)
    for path in self.files(6, pattern):
      os.truncate(path, path.stat().st_size // 2)
    with self.assertRaisesRegex(
      errors.UserError, 'checkpoints/6 cannot be read .*go on from step 3'
    ):
      self.restore()

  def test_foreign(self):
    self.save(3)
    folder = self.root / 'checkpoints' / '3'
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / 'model.pt').write_text('weights of another program')
    with self.assertRaisesRegex(
      errors.UserError, 'checkpoints/3 cannot be read .*another --workdir'
    ):
      self.restore()
    self.assertTrue((folder / 'model.pt').exists())

  def test_changed_values_are_noticed(self):
    self.save(3)
    manifest = self.files(3, 'manifest/metadata')[0]
    checksum = checkpoints.inspect(self.state)['params/w'][0]
    text = manifest.read_text()
    self.assertIn(f'"params/w": {checksum}', text)
    manifest.write_text(text.replace(str(checksum), str(checksum ^ 1)))
    with self.assertRaisesRegex(
      errors.UserError, 'is damaged: the checksum of params/w differs'
    ):
      self.restore()

  def test_another_tokenizer(self):
    self.save(3)
    with self.assertRaisesRegex(
      errors.UserError,
      r'other tokens \(fingerprint bytes-1\) .*\(sentencepiece-2\)',
    ):
      self.restore(tokenizer_fingerprint='sentencepiece-2')

  def test_another_model(self):
    self.save(3)
    wide = dataclasses.replace(self.config.model, embed_dim=32)
    config = dataclasses.replace(self.config, model=wide)
    with self.assertRaisesRegex(
      errors.UserError, 'model.embed_dim=16, and this config has 32'
    ):
      self.restore(config=config)

  def test_a_longer_model_is_the_same_model(self):
    self.save(3)
    long = dataclasses.replace(self.config.model, max_length=4096)
    config = dataclasses.replace(self.config, model=long)
    self.assertEqual(self.restore(config=config).step, 3)

  def test_a_state_that_is_not_finite_is_not_saved(self):
    bad = {'params': {'w': jnp.array([1.0, jnp.inf])}}
    with self.assertRaisesRegex(
      FloatingPointError, 'params/w is not finite after step 4'
    ):
      self.save(4, state=bad)
    self.assertEmpty(list((self.root / 'checkpoints').iterdir()))


class ChecksumTest(parameterized.TestCase):
  @parameterized.parameters('float32', 'bfloat16', 'int32', 'uint8', 'bool')
  def test_any_changed_element_changes_it(self, dtype):
    x = jax.random.bernoulli(jax.random.key(0), shape=(7, 5)).astype(dtype)
    expected = checkpoints.inspect({'x': x})['x'][0]
    changed = {
      checkpoints.inspect(
        {'x': x.at[i, j].set((x[i, j] == 0).astype(x.dtype))}
      )['x'][0]
      for i in range(7)
      for j in range(5)
    }
    self.assertNotIn(expected, changed)
    self.assertGreater(len(changed), 20)  # and depends on the place

  def test_is_the_same_on_any_mesh(self):
    x = jax.random.normal(jax.random.key(0), (16, 8))
    sharded = jax.device_put(x, sharding.batch_sharding(sharding.make_mesh()))
    self.assertEqual(
      checkpoints.inspect({'x': x}), checkpoints.inspect({'x': sharded})
    )


if __name__ == '__main__':
  absltest.main()
