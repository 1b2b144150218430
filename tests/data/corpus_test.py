import dataclasses
import os
import pathlib
from unittest import mock

from absl.testing import absltest
import numpy as np

from nested_learning import errors
from nested_learning.data import corpus
from nested_learning.data import formats
from nested_learning.data import sources
from nested_learning.data import tokenizers

_TEXTS = ('one', 'two two', 'x', 'na\u00efve', 'the end')


class CorpusTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.cache = self.root / 'cache'
    (self.root / 'text').mkdir()
    for i, text in enumerate(_TEXTS):
      (self.root / 'text' / f'{i}.txt').write_text(text)
    self.tokenizer = tokenizers.make_tokenizer('bytes')

  def load(self, tokenizer=None):
    return corpus.load_corpus(
      formats.open_documents(str(self.root / 'text')),
      tokenizer or self.tokenizer,
      cache_dir=str(self.cache),
    )

  def test_corpus_holds_the_documents(self):
    loaded = self.load()
    self.assertIsInstance(loaded.tokens, np.memmap)
    for i, text in enumerate(_TEXTS):
      tokens = loaded.tokens[loaded.starts[i] : loaded.starts[i + 1]]
      self.assertSequenceEqual(tokens.tolist(), [256, *text.encode()])
    self.assertLen(loaded.tokens, loaded.starts[-1])

  def test_text_is_tokenised_once(self):
    first = self.load()
    with mock.patch.object(sources, 'read_text', side_effect=AssertionError):
      second = self.load()
    np.testing.assert_array_equal(first.tokens, second.tokens)
    self.assertEqual(first.fingerprint, second.fingerprint)
    self.assertLen(os.listdir(self.cache), 1)

  def test_changed_text_is_tokenised_again(self):
    before = self.load()
    path = self.root / 'text' / '0.txt'
    stat = path.stat()
    path.write_text('ONE')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = self.load()
    self.assertNotEqual(before.fingerprint, after.fingerprint)
    self.assertEqual(bytes(after.tokens[1:4].astype(np.uint8)), b'ONE')

  def test_fingerprint_is_of_the_content(self):
    before = self.load()
    path = self.root / 'text' / '0.txt'
    os.utime(path, ns=(0, 0))
    self.assertEqual(before.fingerprint, self.load().fingerprint)
    self.assertLen(os.listdir(self.cache), 2)
    path.rename(path.with_name('first.txt'))
    self.assertNotEqual(before.fingerprint, self.load().fingerprint)

  def test_file_whose_name_is_not_utf8(self):
    folder = os.fsencode(self.root / 'text')
    with open(folder + b'/\xff.txt', 'w') as file:
      file.write('text')
    self.assertLen(self.load().starts, len(_TEXTS) + 2)

  def test_large_vocabulary_has_larger_type(self):
    tokenizer = tokenizers.Tokenizer(
      vocab_size=100_001,
      document_id=100_000,
      byte_lengths=np.zeros(100_001, np.int32),
      fingerprint='large',
      encode=lambda text: np.arange(70_000, 70_000 + len(text)),
      decode=str,
    )
    loaded = self.load(tokenizer)
    self.assertSequenceEqual(
      loaded.tokens[:4].tolist(), [100_000, 70_000, 70_001, 70_002]
    )

  def test_race_for_a_cache(self):
    first = self.load()
    real_exists = pathlib.Path.exists
    calls = []

    def exists(path):
      calls.append(path)
      return len(calls) > 1 and real_exists(path)

    with mock.patch.object(pathlib.Path, 'exists', exists):
      second = self.load()
    self.assertGreater(len(calls), 1)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    self.assertLen(os.listdir(self.cache), 1)

  def test_failure_leaves_no_files(self):
    (self.root / 'text' / 'z.bin').write_bytes(b'\0')
    with self.assertRaisesRegex(errors.UserError, 'z.bin is a binary file'):
      self.load()
    self.assertEmpty(os.listdir(self.cache))

  def test_cache_that_cannot_be_written(self):
    self.cache.write_text('a file in its place')
    with self.assertRaisesRegex(
      errors.UserError, r'cannot be written \(.*\). Set data.cache_dir to'
    ):
      self.load()

  def test_damaged_cache(self):
    self.load()
    (folder,) = self.cache.iterdir()
    for name in ('tokens.npy', 'index.npz'):
      content = (folder / name).read_bytes()
      for damaged in (content[:-5], b'', None):
        (folder / name).unlink()
        if damaged is not None:
          (folder / name).write_bytes(damaged)
        with self.assertRaisesRegex(
          errors.UserError, r'is damaged \(.*\). Delete that folder; it is made'
        ):
          self.load()
        (folder / name).write_bytes(content)

  def test_default_cache_honours_xdg(self):
    with mock.patch.dict(os.environ, {'XDG_CACHE_HOME': '/somewhere'}):
      self.assertEqual(
        corpus.default_cache_dir(),
        '/somewhere/nested_learning/tokens',
      )
    with mock.patch.dict(os.environ, {'XDG_CACHE_HOME': '', 'HOME': '/home/x'}):
      self.assertEqual(
        corpus.default_cache_dir(),
        '~/.cache/nested_learning/tokens',
      )

  def test_changed_byte_is_noticed(self):
    expected = self.load()
    (folder,) = self.cache.iterdir()
    for name in ('tokens.npy', 'index.npz'):
      content = bytearray((folder / name).read_bytes())
      for place in range(0, len(content), 1 + len(content) // 50):
        content[place] ^= 0x10
        (folder / name).write_bytes(content)
        try:
          found = self.load()
        except errors.UserError as error:
          self.assertRegex(str(error), r'^The token cache .* is damaged \(.*\)')
          self.assertNotIn('\n', str(error))
        else:  # the date of an entry, for example
          self.assertEqual(name, 'index.npz')
          np.testing.assert_array_equal(found.starts, expected.starts)
          np.testing.assert_array_equal(found.places, expected.places)
          np.testing.assert_array_equal(found.contents, expected.contents)
        content[place] ^= 0x10
      (folder / name).write_bytes(content)

  def test_cache_is_readable_by_others(self):
    self.load()
    (folder,) = self.cache.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    self.assertEqual(folder.stat().st_mode & 0o777, 0o777 & ~umask)

  def test_file_that_changes_or_vanishes_while_it_is_read(self):
    path = self.root / 'text' / '4.txt'
    changes = {
      'changed while it was read': lambda: path.write_text('another end'),
      'cannot be read': path.unlink,
    }
    for message, change in changes.items():
      opened = formats.open_documents(str(self.root / 'text'))
      path.write_text('the end')
      opened = formats.open_documents(str(self.root / 'text'))
      change()
      with self.assertRaisesRegex(errors.UserError, f'4.txt.* {message}'):
        corpus.load_corpus(opened, self.tokenizer, cache_dir=str(self.cache))
      self.assertEmpty(os.listdir(self.cache))

  def test_warns_of_a_tokenizer_that_loses_text(self):
    encode = self.tokenizer.encode
    lossy = {
      'drops letters': lambda text: encode(text.replace('o', '')),
      'changes letters': lambda text: encode(text.replace('o', 'x')),
    }
    for name, changed in lossy.items():
      tokenizer = dataclasses.replace(
        self.tokenizer, fingerprint=name, encode=changed
      )
      for _ in range(2):  # also where the cache is there
        corpus._warn_once.cache_clear()
        with self.assertLogs(level='WARNING') as logs:
          self.load(tokenizer)
        # 3 of the 24 bytes of the texts are an o.
        self.assertIn('loses 12.5% of the bytes', logs.output[0])
    with self.assertNoLogs(level='WARNING'):
      self.load()
