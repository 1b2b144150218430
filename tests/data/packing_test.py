import os
import pathlib
from unittest import mock

from absl.testing import absltest
import numpy as np

from nested_learning import errors
from nested_learning.data import documents
from nested_learning.data import packing
from nested_learning.data import sources
from nested_learning.data import tokenizers

_TEXTS = ('one', 'two two', 'x', 'na\u00efve', 'the end')


class PackingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.cache = self.root / 'cache'
    (self.root / 'text').mkdir()
    for i, text in enumerate(_TEXTS):
      (self.root / 'text' / f'{i}.txt').write_text(text)
    self.tokenizer = tokenizers.make_tokenizer('bytes')

  def load(self, tokenizer=None):
    return packing.load_corpus(
      documents.open_documents(str(self.root / 'text')),
      tokenizer or self.tokenizer,
      cache_dir=str(self.cache),
    )

  def test_corpus_holds_the_documents(self):
    corpus = self.load()
    self.assertIsInstance(corpus.tokens, np.memmap)
    for i, text in enumerate(_TEXTS):
      tokens = corpus.tokens[corpus.starts[i] : corpus.starts[i + 1]]
      self.assertSequenceEqual(tokens.tolist(), [256, *text.encode()])
    self.assertLen(corpus.tokens, corpus.starts[-1])

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

  def test_large_vocabulary_is_kept(self):
    tokenizer = tokenizers.Tokenizer(
      vocab_size=100_001,
      document_id=100_000,
      byte_lengths=np.zeros(100_001, np.int32),
      fingerprint='large',
      encode=lambda text: np.arange(70_000, 70_000 + len(text)),
      decode=str,
    )
    corpus = self.load(tokenizer)
    self.assertSequenceEqual(
      corpus.tokens[:4].tolist(), [100_000, 70_000, 70_001, 70_002]
    )

  def test_process_that_comes_second_uses_the_first_ones_cache(self):
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

  def test_nothing_is_left_of_a_failure(self):
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
          errors.UserError, r'is damaged. Delete that folder; it is made'
        ):
          self.load()
        (folder / name).write_bytes(content)

  def test_default_cache_honours_xdg(self):
    with mock.patch.dict(os.environ, {'XDG_CACHE_HOME': '/somewhere'}):
      self.assertEqual(
        packing.default_cache_dir(),
        pathlib.Path('/somewhere/nested_learning/tokens'),
      )
    with mock.patch.dict(os.environ, {'XDG_CACHE_HOME': '', 'HOME': '/home/x'}):
      self.assertEqual(
        packing.default_cache_dir(),
        pathlib.Path('/home/x/.cache/nested_learning/tokens'),
      )

  def test_pack_by_hand(self):
    corpus = packing.Corpus(
      tokens=np.array([9, 1, 2, 9, 3, 9, 4], np.uint16),
      starts=np.array([0, 3, 3, 5, 7]),  # Document 1 has no tokens.
      places=np.zeros(4),
      fingerprint='',
    )
    stream = packing.make_stream(corpus, np.array([3, 1, 0, 2]))
    self.assertEqual(stream.length, 7)  # 9 4 | 9 1 2 | 9 3
    rows = packing.pack(stream, np.array([0, 3, 5]), length=4)
    expected = {
      'tokens': [[9, 4, 9, 1], [1, 2, 9, 3], [9, 3, 9, 4]],
      'targets': [[4, 9, 1, 2], [2, 9, 3, 9], [3, 9, 4, 9]],
      'reset': [[1, 0, 1, 0], [0, 0, 1, 0], [1, 0, 1, 0]],
      'document': [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
    }
    self.assertSameElements(rows, expected)
    for name, value in expected.items():
      np.testing.assert_array_equal(rows[name], value, err_msg=name)

  def test_rows_put_together_are_the_documents(self):
    corpus = self.load()
    order = np.array([3, 0, 4, 2, 1])
    stream = packing.make_stream(corpus, order)
    text = b''.join(b'\xff' + _TEXTS[i].encode() for i in order)
    for length in (1, 2, 5, 64):
      begins = np.arange(0, stream.length, length)
      rows = packing.pack(stream, begins, length=length)
      tokens = rows['tokens'].ravel()[: stream.length]
      as_bytes = np.where(tokens == 256, 0xFF, tokens).astype(np.uint8)
      self.assertEqual(as_bytes.tobytes(), text)
      np.testing.assert_array_equal(rows['reset'], rows['tokens'] == 256)


if __name__ == '__main__':
  absltest.main()
