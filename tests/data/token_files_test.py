import errno
import io
import itertools
import json
import os
import pathlib
from unittest import mock
import zlib

from absl.testing import parameterized
import numpy as np

from nested_learning import data
from nested_learning import errors
from nested_learning.data import token_files

_TEXTS = {f'{i}.txt': f'text {i} ' * (1 + 7 * i % 11) for i in range(20)}


class TokenFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.folder = self.root / 'tokens'
    self.tokenizer = data.make_tokenizer('bytes')
    for name, value in (('_BLOCK', 32), ('_SHARD_BLOCKS', 5)):
      patch = mock.patch.object(token_files, name, value)
      patch.start()
      self.addCleanup(patch.stop)

  def write(self, texts=None):
    return token_files.write(
      self.folder,
      sorted((texts or _TEXTS).items()),
      self.tokenizer,
      spec='bytes',
      source='a source',
    )

  def test_holds_the_documents_in_several_files(self):
    summary = self.write()
    expected = [[256, *text.encode()] for _, text in sorted(_TEXTS.items())]
    self.assertEqual(summary['num_tokens'], sum(map(len, expected)))
    self.assertEqual(summary['num_documents'], 20)
    files = list(self.folder.glob('*.array_record'))
    self.assertLen(files, -(-summary['num_tokens'] // (5 * 32)))
    corpus = token_files.load(str(self.folder), self.tokenizer)
    for i, tokens in enumerate(expected):
      places = np.arange(corpus.starts[i], corpus.starts[i + 1])
      self.assertEqual(corpus.tokens[places].tolist(), tokens)

  @parameterized.parameters('document', 'never')
  def test_gives_the_batches_of_its_text(self, reset):
    for name, text in _TEXTS.items():
      (self.root / 'text').mkdir(exist_ok=True)
      (self.root / 'text' / name).write_text(text)
    self.write()
    batches = {}
    for source in ('text', 'tokens'):
      config = data.DataConfig(
        source=str(self.root / source),
        sequence_length=24,
        batch_size=4,
        validation_fraction=0.2,
        reset=reset,
        cache_dir=str(self.root / 'cache'),
      )
      for split in ('train', 'validation'):
        iterator = data.make_iterator(config, split=split)
        batches[source, split] = [
          {k: v.tolist() for k, v in batch.items()}
          for batch in itertools.islice(iterator, 3)
        ]
      batches[source, 'state'] = iterator.get_state()
    for what in ('train', 'validation', 'state'):
      self.assertEqual(batches['text', what], batches['tokens', what])

  def test_is_part_of_a_mixture(self):
    self.write()
    config = data.DataConfig(
      source=f'0.5*{self.folder} + 0.5*stdlib', sequence_length=64
    )
    with mock.patch.object(
      data.pipeline.corpus_lib, 'load_corpus'
    ) as load:  # of the other source
      load.return_value = token_files.load(str(self.folder), self.tokenizer)
      batch = next(data.make_iterator(config))
    self.assertEqual(load.call_count, 1)
    self.assertIn(256, batch['tokens'])

  def test_another_tokenizer(self):
    self.write()
    other = self.tokenizer.__class__(
      **{**self.tokenizer.__dict__, 'fingerprint': 'other-1'}
    )
    with self.assertRaisesRegex(
      errors.UserError, 'tokens of bytes, .* is other-1; set .*=bytes'
    ):
      token_files.load(str(self.folder), other)

  def test_missing_and_empty_files(self):
    self.write()
    last = max(self.folder.glob('*.array_record'))
    os.rename(last, self.root / 'away')
    with self.assertRaisesRegex(
      errors.UserError, r'is damaged .*array_record is missing'
    ):
      token_files.load(str(self.folder), self.tokenizer)
    (self.folder / 'starts.npy').write_bytes(b'')
    with self.assertRaisesRegex(errors.UserError, 'is damaged'):
      token_files.load(str(self.folder), self.tokenizer)

  def test_changed_byte_is_noticed(self):
    self.write()

    def read():
      corpus = token_files.load(str(self.folder), self.tokenizer)
      return corpus.tokens[np.arange(corpus.starts[-1])].tolist()

    expected = read()
    for path in sorted(self.folder.iterdir()):
      content = bytearray(path.read_bytes())
      for place in range(0, len(content), 1 + len(content) // 10):
        content[place] ^= 0x10
        path.write_bytes(content)
        try:
          found = read()
        except errors.UserError as error:
          self.assertNotIn('\n', str(error))
        else:  # some bytes between the records of a shard do not matter
          self.assertEqual(path.suffix, '.array_record')
          self.assertEqual(found, expected)
        content[place] ^= 0x10
      path.write_bytes(content)

  @parameterized.parameters(
    ({'num_tokens': 10**12}, 'is damaged'),
    ({'num_tokens': '3'}, 'num_tokens in tokens.json is'),
    ({'block': 0}, '0 per block'),
    ({'block': 2**40}, 'per block'),
    ({'dtype': 'O'}, "tokens are 'O'"),
    ({'fingerprint': None}, 'fingerprint in tokens.json is None'),
    ({'format': 'other'}, "format is 'other'"),
    ({'lost': 'x'}, "lost in tokens.json is 'x'"),
    ([], 'not an object'),
  )
  def test_forged_summary(self, changes, message):
    summary = self.write()
    forged = {**summary, **changes} if changes else changes
    if changes:
      forged['crc32'] = token_files._own_checksum(forged)
    (self.folder / 'tokens.json').write_text(json.dumps(forged))
    with self.assertRaisesRegex(errors.UserError, message) as caught:
      token_files.load(str(self.folder), self.tokenizer)
    self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters('starts', 'places', 'contents')
  def test_forged_array_claims_more_than_its_file(self, name):
    summary = self.write()
    header = io.BytesIO()  # of 8 TB
    np.lib.format.write_array_header_1_0(
      header, {'descr': '<i8', 'fortran_order': False, 'shape': (10**12,)}
    )
    content = header.getvalue()
    (self.folder / f'{name}.npy').write_bytes(content)
    sizes = {'bytes': len(content), 'crc32': zlib.crc32(content)}
    summary['files'][f'{name}.npy'] = sizes
    summary['crc32'] = token_files._own_checksum(summary)
    (self.folder / 'tokens.json').write_text(json.dumps(summary))
    with self.assertRaisesRegex(errors.UserError, 'is damaged .*make it again'):
      token_files.load(str(self.folder), self.tokenizer)

  @parameterized.parameters('tokens.json', 'starts.npy')
  def test_file_without_rights_is_not_damaged(self, name):
    self.write()
    refuse = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    read = pathlib.Path.read_text, np.load

    def read_text(path, **kwargs):
      if path.name == name:
        raise refuse
      return read[0](path, **kwargs)

    def load(path, **kwargs):
      if path.name == name:
        raise refuse
      return read[1](path, **kwargs)

    with (
      mock.patch.object(pathlib.Path, 'read_text', read_text),
      mock.patch.object(np, 'load', load),
      self.assertRaisesRegex(errors.UserError, 'read .Permission denied'),
    ):
      token_files.load(str(self.folder), self.tokenizer)

  def test_reads_folders_without_checksums(self):
    summary = self.write()
    old = {k: v for k, v in summary.items() if k not in ('files', 'crc32')}
    old['format'] = 'nested_learning tokens 1'
    (self.folder / 'tokens.json').write_text(json.dumps(old))
    (self.folder / 'contents.npy').unlink()
    corpus = token_files.load(str(self.folder), self.tokenizer)
    self.assertLen(corpus.places, 20)

  def test_folder_below_a_file(self):
    (self.root / 'file').write_text('text')
    self.folder = self.root / 'file' / 'tokens'
    with self.assertRaisesRegex(errors.UserError, 'cannot be written .Not a d'):
      self.write()

  def test_is_written_whole_or_not_at_all(self):
    with self.assertRaisesRegex(errors.UserError, 'holds no text'):
      self.write({'empty': ''})

    def documents():
      yield 'a', 'text'
      raise KeyboardInterrupt

    with self.assertRaises(KeyboardInterrupt):
      token_files.write(
        self.folder, documents(), self.tokenizer, spec='bytes', source='a'
      )
    self.assertEmpty(list(self.root.iterdir()))
    self.write()
    with self.assertRaisesRegex(errors.UserError, 'tokens exists; name anoth'):
      self.write()
