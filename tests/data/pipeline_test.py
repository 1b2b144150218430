import dataclasses
import itertools
import json
import pathlib
import re

from absl.testing import parameterized
import numpy as np

from nested_learning import data
from nested_learning import errors
from nested_learning.data import corpus

_NUM_FILES = 12


def _text(i):
  return ''.join(f'{i}.{n} ' for n in range(20 + 5 * i % 17))


class PipelineTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.folder = self.root / 'text'
    self.folder.mkdir()
    for i in range(_NUM_FILES):
      (self.folder / f'{i}.txt').write_text(_text(i))
    self.config = data.DataConfig(
      source=str(self.folder),
      sequence_length=16,
      batch_size=4,
      validation_fraction=0.25,
      cache_dir=str(self.root / 'cache'),
    )

  def make(self, **settings):
    names = [field.name for field in dataclasses.fields(data.DataConfig)]
    changes = {k: v for k, v in settings.items() if k in names}
    others = {k: v for k, v in settings.items() if k not in names}
    config = dataclasses.replace(self.config, **changes)
    return data.make_iterator(config, **others)

  def split_texts(self, split):
    """Returns the documents of a split in order, as tokens."""
    names = sorted(f'{i}.txt' for i in range(_NUM_FILES))
    held_out = [corpus.place(name) < 0.25 for name in names]
    return [
      (256, *(self.folder / name).read_bytes())
      for name, out in zip(names, held_out, strict=True)
      if out == (split == 'validation')
    ]

  def assert_same(self, batches, expected):
    self.assertEqual(len(batches), len(expected))
    for a, b in zip(batches, expected, strict=True):
      self.assertSameElements(a, b)
      for name in b:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)

  @parameterized.product(
    reset=['document', 'never'], split=['train', 'validation']
  )
  def test_batch_contract(self, reset, split):
    batch = next(self.make(reset=reset, split=split))
    dtypes = {name: array.dtype for name, array in batch.items()}
    self.assertEqual(
      dtypes,
      {
        'tokens': np.int32,
        'targets': np.int32,
        'mask': np.bool_,
        'reset': np.bool_,
        'document': np.int32,
      },
    )
    for array in batch.values():
      self.assertEqual(array.shape, (4, 16))

  @parameterized.product(
    reset=['document', 'never'], split=['train', 'validation']
  )
  def test_same_settings_same_batches(self, reset, split):
    def make():
      return list(itertools.islice(self.make(reset=reset, split=split), 50))

    self.assert_same(make(), make())

  @parameterized.parameters('document', 'never')
  def test_seed_changes_training_and_not_validation(self, reset):
    def make(split, seed):
      return next(self.make(reset=reset, split=split, seed=seed))['tokens']

    self.assertFalse(np.array_equal(make('train', 0), make('train', 1)))
    np.testing.assert_array_equal(make('validation', 0), make('validation', 1))

  def test_an_epoch_has_every_row_once(self):
    whole = self.make(num_epochs=1, batch_size=1)
    rows = [tuple(batch['tokens'][0]) for batch in whole]
    total = sum(map(len, self.split_texts('train')))
    self.assertLen(rows, total // 16)
    self.assertLen(set(rows), len(rows))
    two = [tuple(b['tokens'][0]) for b in self.make(num_epochs=2, batch_size=1)]
    self.assertEqual(two[: len(rows)], rows)
    self.assertSameElements(two[len(rows) :], rows)
    self.assertNotEqual(two[len(rows) :], rows)  # Shuffled anew.

  def test_targets_follow_tokens(self):
    for batch in itertools.islice(self.make(), 40):
      np.testing.assert_array_equal(
        batch['targets'][:, :-1], batch['tokens'][:, 1:]
      )
      self.assertTrue(batch['mask'].all())

  def test_reset_at_documents_and_rows(self):
    for batch in itertools.islice(self.make(), 40):
      expected = batch['tokens'] == 256
      expected[:, 0] = True
      np.testing.assert_array_equal(batch['reset'], expected)
      np.testing.assert_array_equal(
        batch['document'], np.cumsum(expected, axis=1) - 1
      )

  @parameterized.parameters('document', 'never')
  def test_validation_counts_every_token_once_in_order(self, reset):
    batches = list(self.make(split='validation', reset=reset))
    documents = list(itertools.chain(*self.split_texts('validation')))
    targets = [*documents[1:], documents[0]]
    # Rows side by side in a batch, or one lane after the other.
    axis = 0 if reset == 'document' else 1
    for name, expected in (('tokens', documents), ('targets', targets)):
      values = np.concatenate([b[name] for b in batches], axis)
      masks = np.concatenate([b['mask'] for b in batches], axis)
      self.assertSequenceEqual(values[masks].tolist(), expected)
    self.assertFalse(batches[-1]['mask'].all())  # So padding was tested.

  def test_training_and_validation_share_no_document(self):
    def names(split):  # Every text begins with the number of its file.
      epochs = 1 if split == 'train' else None
      iterator = self.make(
        split=split, reset='never', batch_size=1, num_epochs=epochs
      )
      tokens = np.concatenate([b['tokens'][b['mask']] for b in iterator])
      text = np.where(tokens == 256, 0, tokens).astype(np.uint8).tobytes()
      return [int(part.split(b'.')[0]) for part in text.split(b'\0')[1:]]

    found = names('train') + names('validation')
    self.assertCountEqual(found, range(_NUM_FILES))

  @parameterized.product(
    reset=['document', 'never'], split=['train', 'validation']
  )
  def test_resume_at_every_offset(self, reset, split):
    settings = {'reset': reset, 'split': split}
    if split == 'train':
      settings['num_epochs'] = 2
    iterator = self.make(**settings)
    states = [json.dumps(iterator.get_state())]
    batches = []
    for batch in iterator:
      batches.append(batch)
      states.append(json.dumps(iterator.get_state()))
    self.assertGreater(len(batches), 2)
    restored = self.make(**settings)
    for offset in reversed(range(len(states))):
      restored.set_state(json.loads(states[offset]))
      self.assertEqual(json.dumps(restored.get_state()), states[offset])
      self.assert_same(list(restored), batches[offset:])
    fresh = self.make(**settings)
    fresh.set_state(json.loads(states[2]))
    self.assert_same(list(fresh), batches[2:])

  @parameterized.product(
    reset=['document', 'never'], split=['train', 'validation']
  )
  def test_processes_make_the_same_global_batches(self, reset, split):
    settings = {'reset': reset, 'split': split}
    if split == 'train':
      settings['num_epochs'] = 3
    whole = list(self.make(**settings))
    for count in (2, 4):
      parts = [
        list(self.make(process_index=i, process_count=count, **settings))
        for i in range(count)
      ]
      joined = [
        {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
        for pieces in zip(*parts, strict=True)
      ]
      self.assert_same(joined, whole)

  @parameterized.product(
    reset=['document', 'never'], counts=[(4, 1), (1, 2), (2, 4)]
  )
  def test_resume_on_another_number_of_processes(self, reset, counts):
    settings = {'reset': reset, 'num_epochs': 3}
    whole = list(self.make(**settings))
    before, after = counts
    old = [
      self.make(process_index=i, process_count=before, **settings)
      for i in range(before)
    ]
    for iterator in old:
      list(itertools.islice(iterator, 3))
    (state,) = {json.dumps(iterator.get_state()) for iterator in old}
    for i in range(after):
      new = self.make(process_index=i, process_count=after, **settings)
      new.set_state(json.loads(state))
      rows = slice(i * 4 // after, (i + 1) * 4 // after)
      expected = [{k: v[rows] for k, v in b.items()} for b in whole[3:]]
      self.assert_same(list(new), expected)

  def test_lanes_are_endless(self):
    total = sum(map(len, self.split_texts('train')))
    num_steps = 3 * total // 16  # Three times around for every lane.
    batches = list(itertools.islice(self.make(reset='never'), num_steps))
    tokens = np.concatenate([b['tokens'] for b in batches], axis=1)
    targets = np.concatenate([b['targets'] for b in batches], axis=1)
    np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])
    np.testing.assert_array_equal(tokens[:, :-total], tokens[:, total:])
    resets = np.concatenate([b['reset'] for b in batches], axis=1)
    self.assertTrue(resets[:, 0].all())
    self.assertFalse(resets[:, 1:].any())
    self.assertTrue(all(b['mask'].all() for b in batches))
    # Each lane once around is every document of the split, in one order.
    documents = self.split_texts('train')
    for lane in tokens:
      start = np.flatnonzero(lane == 256)[0]
      text = lane[start : start + total].tolist()
      borders = [i for i, token in enumerate(text) if token == 256]
      pieces = [
        tuple(text[a:b])
        for a, b in zip(borders, [*borders[1:], total], strict=True)
      ]
      self.assertCountEqual(pieces, documents)
    # A lane ends where the next one began.
    self.assertTrue((tokens[:-1, total // 4] == tokens[1:, 0]).all())

  def test_streams_begin_at_steps_of_their_own(self):
    lanes = list(itertools.islice(self.make(reset='never'), 8))
    found = self.make(reset='stream', stream_tokens=4 * 16)
    batches = list(itertools.islice(found, 8))
    begins = np.stack([b['reset'][:, 0] for b in batches], axis=1)
    expected = np.array(
      [
        [1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 1],
        [1, 0, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],
      ]
    )
    np.testing.assert_array_equal(begins, expected)
    for lane, batch in zip(lanes, batches, strict=True):
      self.assertFalse(batch['reset'][:, 1:].any())
      for name in ('tokens', 'targets', 'mask'):
        np.testing.assert_array_equal(batch[name], lane[name])
    with self.assertRaisesRegex(errors.UserError, 'stream_tokens=40 .* of seq'):
      self.make(reset='stream', stream_tokens=40)

  def test_stdlib_with_defaults(self):
    config = data.DataConfig(cache_dir=self.config.cache_dir)
    batch = next(data.make_iterator(config))
    self.assertEqual(batch['tokens'].shape, (8, 1024))
    validation = data.make_iterator(config, split='validation')
    self.assertGreater(sum(b['mask'].sum() for b in validation), 100_000)

  def test_random_access_is_not_slowed_by_the_step(self):
    iterator = self.make()
    state = iterator.get_state()
    iterator.set_state(state | {'step': 10**12})
    self.assertEqual(next(iterator)['tokens'].shape, (4, 16))

  @parameterized.parameters(
    ('seed', {'seed': 1}),
    ('sequence_length', {'sequence_length': 8}),
    ('batch_size', {'batch_size': 8}),
    ('reset', {'reset': 'never'}),
    ('split', {'split': 'validation'}),
  )
  def test_state_of_other_settings(self, name, settings):
    with self.assertRaisesRegex(
      errors.UserError, f'was made on data with {name}=.* Restore the text'
    ):
      self.make(**settings).set_state(self.make().get_state())

  def test_state_of_other_text(self):
    state = self.make().get_state()
    (self.folder / '0.txt').write_text('changed')
    with self.assertRaisesRegex(errors.UserError, 'on data with text='):
      self.make().set_state(state)

  def test_malformed_state(self):
    for state in ({'next_index': 3}, [], None, {'step': 1, 'stream': 'x'}):
      with self.assertRaisesRegex(errors.UserError, 'on data with .*=None'):
        self.make().set_state(state)

  def test_malformed_step(self):
    iterator = self.make()
    state = iterator.get_state()
    for step in (None, -1, 1.0, True, '1', [], 2**64):
      with self.assertRaisesRegex(errors.UserError, 'the position step='):
        iterator.set_state(state | {'step': step})
    state.pop('step')
    with self.assertRaisesRegex(errors.UserError, 'the position step=None'):
      iterator.set_state(state)

  @parameterized.parameters(
    ({'sequence_length': 0}, '^sequence_length=0 must be at least 1'),
    ({'batch_size': -1}, '^batch_size=-1 must be at least 1'),
    ({'reset': 'maybe'}, "must be one of 'document', 'stream', 'never'"),
    ({'validation_fraction': 1.0}, 'validation_fraction=1.0 must be at'),
    ({'seed': -1}, '^seed=-1 must be at least 0'),
    ({'process_count': 3}, 'batch_size=4 is not a multiple of the 3 proc'),
    (
      {'sequence_length': 10_000},
      r'has \d+ tokens for train, fewer than the 10000 that',
    ),
    (
      {'batch_size': 100, 'reset': 'never'},
      r'has \d+ tokens for train, fewer than the 1600 that',
    ),
    (
      {'split': 'validation', 'validation_fraction': 0.0},
      'data.validation_fraction=0 holds nothing out',
    ),
    ({'source': '/no/such'}, 'does not exist'),
    ({'tokenizer': 'words'}, "data.tokenizer='words' is unknown"),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(errors.UserError, message):
      self.make(**settings)

  @parameterized.product(reset=['document', 'never'], fraction=[0.05, 0.5])
  def test_one_file_is_split_by_position(self, reset, fraction):
    (self.folder / 'long.txt').write_text('Some words of a tale. ' * 40)
    settings = {
      'source': str(self.folder / 'long.txt'),
      'reset': reset,
      'validation_fraction': fraction,
    }
    text = [256, *(self.folder / 'long.txt').read_bytes()]
    num_out = round(fraction * len(text))
    batches = list(self.make(split='validation', **settings))
    axis = 0 if reset == 'document' else 1
    tokens, masks = (
      np.concatenate([b[name] for b in batches], axis)
      for name in ('tokens', 'mask')
    )
    self.assertSequenceEqual(tokens[masks].tolist(), text[-num_out:])
    batch = next(self.make(num_epochs=1, batch_size=1, **settings))
    self.assertEqual(batch['tokens'].shape, (1, 16))

  def test_training_without_validation(self):
    self.assertTrue(self.config.has_validation)
    config = dataclasses.replace(self.config, validation_fraction=0.0)
    self.assertFalse(config.has_validation)
    self.assertEqual(next(data.make_iterator(config))['mask'].all(), True)

  def test_examples_of_the_page_run(self):
    page = pathlib.Path(data.__file__).with_name('README.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    self.assertNotEmpty(blocks)
    names = {}
    exec('\n'.join(blocks), names)
    self.assertEqual(names['batch']['tokens'].shape, (4, 64))

  def test_unknown_split(self):
    with self.assertRaisesRegex(ValueError, "split='test' must be 'train'"):
      self.make(split='test')
