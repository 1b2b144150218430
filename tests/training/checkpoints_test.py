import dataclasses
import errno
import json
import os
import pathlib
import shutil
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

import nested_learning
from nested_learning import configs
from nested_learning import distributed
from nested_learning import errors
from nested_learning import sharding
from nested_learning import training
from nested_learning.training import checkpoint_files
from nested_learning.training import checkpoint_restore
from nested_learning.training import checkpoints
from tests.training import tiny


def damage(path, how):
  """Cuts a file, flips a bit of its middle, zeros its end, or deletes it."""
  if how == 'delete':
    path.unlink()
  elif how == 'cut':
    os.truncate(path, path.stat().st_size // 2)
  else:
    content = bytearray(path.read_bytes())
    if how == 'zero':  # with its checksum
      content[-20:] = bytes(20)
    else:
      content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(checkpoints, '_END_SECONDS', 0))
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
      return checkpoint_restore.restore(
        manager, self.abstract, **arguments | changes
      )

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
    ('train.optimizer', 'adamw', 'm3'),
    ('model.levels.1.optimizer', 'adamw', 'dgd'),
  )
  def test_of_another_optimizer(self, field, saved, wanted):
    self.save(3)
    config = configs.override(self.config, [f'{field}={wanted}'])
    with self.assertRaisesRegex(
      errors.UserError, f'with {field}={saved}, and this config has {wanted}; '
    ):
      self.restore(config=config)
    self.abstract = {'params': self.abstract['params']}
    self.assertEqual(self.restore(config=config).step, 3)

  @parameterized.parameters(
    ('cut', 'params/**/d/*'),
    ('flip', 'params/**/d/*'),
    ('delete', 'params/**/d/*'),
    ('zero', 'params/manifest.ocdbt'),
    ('flip', 'manifest/metadata'),
    ('delete', 'manifest/metadata'),
    ('flip', 'data/metadata'),
  )
  def test_damaged_files_are_passed_over(self, how, pattern):
    self.save(3, 6)
    for path in self.files(6, pattern):
      damage(path, how)
    with self.assertLogs(level='WARNING') as logs:
      restored = self.restore()
    self.assertEqual(restored.step, 3)
    jax.tree.map(np.testing.assert_array_equal, self.state, restored.state)
    self.assertLen(logs.output, 1, logs.output)
    (line,) = logs.output
    self.assertRegex(line, r'checkpoints/6 (is|cannot be).*on from step 3\.')
    self.assertTrue((self.root / 'checkpoints' / '6').exists())  # read only

  def test_changed_values_are_passed_over(self):
    self.save(3)
    self.save_changed(6)
    with self.assertLogs(level='WARNING') as logs:
      self.assertEqual(self.restore().step, 3)
    self.assertIn('checksum of params/w differs', logs.output[0])

  def test_a_run_moves_the_damaged_one_and_saves_its_step_again(self):
    for moved in ('6', '6-2'):
      self.save(3)
      self.save_changed(6)
      with (
        checkpoints.open_manager(self.root, keep=9) as manager,
        self.assertLogs(level='WARNING') as logs,
      ):
        restored = checkpoint_restore.restore(
          manager,
          self.abstract,
          config=self.config,
          tokenizer_fingerprint='bytes-1',
        )
        self.assertEqual(manager.latest_step(), 3)
      self.assertEqual(restored.step, 3)
      place = self.root / 'checkpoints_damaged' / moved
      self.assertIn(f'moved to {place}. G', logs.output[0])
      self.assertTrue(place.exists())
    self.save(6)
    self.assertEqual(self.restore().step, 6)

  def test_all_are_damaged(self):
    self.save_changed(3, 6)
    with self.assertRaisesRegex(
      errors.UserError,
      'checkpoints/6 is damaged.*all 2 checkpoints are damaged',
    ):
      self.restore()
    with self.assertRaisesRegex(errors.UserError, '/3 is.*read another step'):
      self.restore(step=3)

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

  def save_changed(self, *steps):
    """Saves w with a manifest of other values, as after bit rot."""
    found = checkpoint_files.tree_checksums(self.state)
    checksum, finite = found['params/w']
    found['params/w'] = checksum ^ 1, finite
    with mock.patch.object(checkpoint_files, 'tree_checksums', lambda _: found):
      self.save(*steps)

  @parameterized.parameters('_METADATA', '_sharding', 'array_metadatas/*')
  def test_files_without_values_may_be_damaged(self, pattern):
    self.save(6)
    for path in self.files(6, f'params/{pattern}'):
      damage(path, 'cut')
    restored = self.restore()
    jax.tree.map(np.testing.assert_array_equal, self.state, restored.state)
    self.assertEqual(training.inspect(self.root).damaged, {})

  @parameterized.parameters(
    (MemoryError('out of memory'), MemoryError),
    (ValueError('UNAVAILABLE: the network is down'), ValueError),
    (ValueError('PERMISSION_DENIED: no'), errors.UserError),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED'), RuntimeError),
  )
  def test_an_error_that_is_no_damage_is_raised(self, error, expected):
    self.save(3, 6)
    with (
      checkpoints.open_manager(self.root, keep=9) as manager,
      mock.patch.object(manager, 'restore', side_effect=error),
      mock.patch.object(tensorstore, 'open', side_effect=error),
      self.assertRaises(expected),
    ):
      checkpoint_restore.restore(
        manager,
        self.abstract,
        config=self.config,
        tokenizer_fingerprint='bytes-1',
      )
    self.assertTrue((self.root / 'checkpoints' / '6').exists())
    self.assertEqual(self.restore().step, 6)

  @parameterized.parameters(
    (['', 'damage:it is cut'], checkpoint_files.Damaged, 'it is cut'),
    (['', 'damage:cut', 'error:no'], RuntimeError, 'process 2 cannot .*: no'),
  )
  def test_processes_decide_alike(self, said, kind, message):
    self.save(3)
    with (
      mock.patch.object(distributed, 'is_together', lambda: True),
      mock.patch.object(distributed, 'gather', lambda *_: said),
      self.assertRaisesRegex(kind, message),
    ):
      checkpoint_restore._look_together(lambda: 'fine')

  def test_a_folder_under_another_number_is_damaged(self):
    self.save(3, 6)
    folder = self.root / 'checkpoints'
    shutil.copytree(folder / '6', folder / '9')
    damaged = training.inspect(self.root).damaged
    self.assertEqual(list(damaged), [9])
    self.assertRegex(damaged[9], '/9 is damaged: .* checkpoint of step 6')
    with self.assertLogs(level='WARNING'):
      self.assertEqual(self.restore().step, 6)
    shutil.rmtree(folder / '9')
    for name, other in (('3', 'x'), ('6', '3'), ('x', '6')):
      (folder / name).rename(folder / other)
    with self.assertRaisesRegex(errors.UserError, 'all 2 checkpoints are'):
      self.restore()

  def edit_manifest(self, step, change, *, sign):
    path = self.root / 'checkpoints' / str(step) / 'manifest' / 'metadata'
    manifest = json.loads(path.read_text())
    del manifest['manifest_checksum']
    checksum = checkpoint_files.json_checksum(manifest)
    manifest |= change
    if sign:
      checksum = checkpoint_files.json_checksum(manifest)
    path.write_text(json.dumps({**manifest, 'manifest_checksum': checksum}))

  @parameterized.parameters('nested_learning 1', 'nested_learning 2', 7)
  def test_a_changed_format_is_damage(self, value):
    self.save(3, 6)
    self.edit_manifest(6, {'format': value}, sign=False)
    self.assertEqual(list(training.inspect(self.root).damaged), [6])
    with self.assertLogs(level='WARNING'):
      self.assertEqual(self.restore().step, 3)

  def test_a_later_format_is_refused(self):
    self.save(3)
    self.edit_manifest(3, {'format': 'nested_learning 9'}, sign=True)
    with self.assertRaisesRegex(errors.UserError, "'nested_learning 9'.*reads"):
      self.restore()

  @parameterized.parameters(
    {'step': '3'},
    {'config': '{"cut'},
    {'config': '[]'},
    {'config': None},
    {'tokenizer_fingerprint': 5},
    {'train_seconds': float('nan')},
    {'train_seconds': True},
    {'checksums': []},
    {'checksums': {'params/b': 'x'}},
    {'arrays': 3},
    {'arrays': {'params/b': 3}},
  )
  def test_a_forged_manifest_is_damage(self, **change):
    self.save(3)
    self.edit_manifest(3, change, sign=True)
    self.assertEqual(list(training.inspect(self.root).damaged), [3])
    with self.assertRaisesRegex(errors.UserError, '/3 is damaged.*manifest'):
      self.restore()

  @parameterized.parameters('', '[]', '5', 'null', '{}', '[' * 9999, '{"a"')
  def test_a_manifest_that_is_none(self, text):
    self.save(3)
    (path,) = self.files(3, 'manifest/metadata')
    path.write_text(text)
    self.assertEqual(list(training.inspect(self.root).damaged), [3])
    with self.assertRaisesRegex(errors.UserError, 'no other checkpoint'):
      self.restore()

  def test_passes_over_stray_files_and_folders(self):
    self.save(3)
    folder = self.root / 'checkpoints'
    for name in ('²', '0028', '+7', '-1', 'x', '1_0'):
      (folder / name).mkdir()
    (folder / '12').write_text('no folder')
    self.assertEqual(checkpoint_files.steps(self.root), [3])
    self.assertEqual(training.inspect(self.root).damaged, {})
    self.assertEqual(self.restore().step, 3)

  def test_a_folder_that_is_no_checkpoint_is_moved_and_not_deleted(self):
    self.save(3)
    stray = self.root / 'checkpoints' / '2'
    stray.mkdir()
    (stray / 'notes.txt').write_text('mine')
    self.restore()  # read-only
    self.assertTrue(stray.exists())
    with (
      checkpoints.open_manager(self.root) as manager,
      self.assertLogs(level='WARNING') as logs,
    ):
      checkpoint_restore.restore(
        manager,
        self.abstract,
        config=self.config,
        tokenizer_fingerprint='bytes-1',
      )
    self.assertIn('/2 is no checkpoint; moved to', logs.output[0])
    moved = self.root / 'checkpoints_damaged' / '2' / 'notes.txt'
    self.assertEqual(moved.read_text(), 'mine')
    self.assertEqual(checkpoint_files.steps(self.root), [3])

  def test_a_file_where_a_folder_should_be(self):
    (self.root / 'checkpoints').write_text('')
    for act in (self.save, self.restore, lambda: training.inspect(self.root)):
      with self.assertRaisesRegex(errors.UserError, 'is not a folder; move'):
        act()
    (self.root / 'checkpoints').unlink()
    self.save(3)
    self.save_changed(6)
    (self.root / 'checkpoints_damaged').write_text('')
    with (
      checkpoints.open_manager(self.root) as manager,
      self.assertRaisesRegex(errors.UserError, '/6 is damaged and cannot be'),
    ):
      checkpoint_restore.restore(
        manager,
        self.abstract,
        config=self.config,
        tokenizer_fingerprint='bytes-1',
      )

  @parameterized.parameters('lr[3e-3]', 'a*', 'b?', '[', 'a\\b', '\udce9')
  def test_refuses_names_that_cannot_be_kept(self, name):
    self.root = self.root / name
    for act in (self.save, self.restore, lambda: training.inspect(self.root)):
      with self.assertRaisesRegex(
        errors.UserError, 'below a path with .; ch|not UTF-8; ch'
      ):
        act()
    self.assertFalse(self.root.exists())

  def test_takes_other_odd_names(self):
    self.root = self.root / ' -a%20"\'\n{c},$d;&é漢#~]' / '-'
    self.save(3)
    jax.tree.map(
      np.testing.assert_array_equal, self.state, self.restore().state
    )
    self.assertEqual(training.inspect(self.root).damaged, {})

  def test_keeps_the_best_by_its_score(self):
    scores = self.root / 'checkpoints' / 'scores.json'
    for step, score in ((1, 2.0), (2, 1.0), (3, 3.0), (4, None)):
      with checkpoints.open_manager(self.root) as manager:
        arguments = {'config': self.config, 'tokenizer_fingerprint': 'b'}
        checkpoints.save(manager, step, self.state, data={}, **arguments)
        if score is not None:
          checkpoints.record_score(manager, step, score)
    self.assertEqual(checkpoint_files.steps(self.root), [2, 4])
    self.assertEqual(checkpoints.read_scores(self.root)[2], 1.0)
    for text in ('[1]', '{"2": "x"}', '{"2"', '{"2": NaN}'):
      scores.write_text(text)
      self.assertEqual(checkpoints.read_scores(self.root), {})

  @parameterized.parameters(
    ('save', ValueError('RESOURCE_EXHAUSTED: No space left on device')),
    ('wait_until_finished', OSError(errno.EROFS, 'x')),
    ('wait_until_finished', OSError(errno.EMFILE, 'x')),
    ('wait_until_finished', ValueError('No ArrayMetadata found for x')),
    ('save', ValueError('Checkpoint directory does not exist: x')),
  )
  def test_a_disk_that_fails_is_one_line(self, failing, error):
    self.save(3)
    with (
      mock.patch.object(checkpoints.Manager, failing, side_effect=error),
      self.assertRaisesRegex(
        errors.UserError,
        'Cannot save step . in .*: (No|Read-only|Too) .* kept: 3.',
      ) as caught,
    ):
      self.save(4)
    self.assertEqual(
      isinstance(caught.exception, errors.Retryable), 'space' in str(error)
    )

  @parameterized.parameters(
    ((16, 9), 'float32', r'needs float32\[16, 9\]'),
    ((16, 8), 'bfloat16', r'needs bfloat16\[16, 8\]'),
  )
  def test_another_shape_or_type(self, shape, dtype, message):
    self.save(3)
    self.abstract['params']['w'] = jax.ShapeDtypeStruct(
      shape, dtype, sharding=self.abstract['params']['w'].sharding
    )
    with self.assertRaisesRegex(
      errors.UserError, rf'/3 holds params/w as float32\[16, 8\].*{message}'
    ):
      self.restore()

  def test_other_arrays(self):
    self.save(3)
    w = self.abstract['params'].pop('w')
    with self.assertRaisesRegex(
      errors.UserError, '/3 has an array params/w, which this config has not'
    ):
      self.restore()
    self.abstract['params'] |= {'w': w, 'more': w}
    with self.assertRaisesRegex(
      errors.UserError, 'config has an array params/more, which .*/3 has not'
    ):
      self.restore()

  def test_manifest_says_what_wrote_it(self):
    self.save(3)
    manifest = self.restore().manifest
    self.assertEqual(manifest['version'], nested_learning.__version__)
    self.assertEqual(manifest['jax'], jax.__version__)
    self.assertEqual(manifest['step'], 3)
    self.assertEqual(configs.from_json(manifest['config']), self.config)
    if (pathlib.Path(nested_learning.__file__).parents[1] / '.git').exists():
      self.assertRegex(manifest['commit'], '^[0-9a-f]{40}(-dirty)?$')

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

  def look(self, step):
    folder = self.root / 'checkpoints' / str(step)
    manifest = checkpoint_files.read_manifest(folder)
    names = manifest['checksums']
    arrays = dict(checkpoint_files.read_arrays(folder, names))
    return arrays, checkpoint_files.find_damages(folder, manifest, names)

  def test_reads_every_array(self):
    self.save(3)
    arrays, damages = self.look(3)
    self.assertEqual(damages, {})
    self.assertLen(arrays, 4)
    np.testing.assert_array_equal(arrays['params/w'], self.state['params']['w'])
    self.assertEqual(arrays['optimizer/count'], 7)

  @parameterized.parameters('cut', 'flip', 'delete')
  def test_finds_damage(self, how):
    self.save(3)
    for path in self.files(3, 'params/**/d/*'):
      damage(path, how)
    self.assertEqual({'params/b', 'params/w'}, set(self.look(3)[1]))


class ChecksumTest(parameterized.TestCase):
  @parameterized.parameters('float32', 'bfloat16', 'int32', 'uint8', 'bool')
  def test_any_changed_element_changes_it(self, dtype):
    x = jax.random.bernoulli(jax.random.key(0), shape=(7, 5)).astype(dtype)
    expected = checkpoint_files.tree_checksums({'x': x})['x'][0]
    changed = {
      checkpoint_files.tree_checksums(
        {'x': x.at[i, j].set((x[i, j] == 0).astype(x.dtype))}
      )['x'][0]
      for i in range(7)
      for j in range(5)
    }
    self.assertNotIn(expected, changed)
    self.assertGreater(len(changed), 20)  # and depends on the place

  @parameterized.product(
    dtype=['float32', 'bfloat16', 'int32', 'uint8', 'bool'],
    shape=[(), (5,), (3, 4), (2, 3, 4)],
  )
  def test_is_the_same_in_numpy(self, dtype, shape):
    x = (10 * jax.random.normal(jax.random.key(1), shape)).astype(dtype)
    self.assertEqual(
      checkpoint_files.array_checksum(np.asarray(x)),
      checkpoint_files.tree_checksums({'x': x})['x'][0],
    )

  def test_is_the_same_on_any_mesh(self):
    x = jax.random.normal(jax.random.key(0), (16, 8))
    sharded = jax.device_put(x, sharding.batch_sharding(sharding.make_mesh()))
    self.assertEqual(
      checkpoint_files.tree_checksums({'x': x}),
      checkpoint_files.tree_checksums({'x': sharded}),
    )
