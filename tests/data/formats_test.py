"""Tests of every format, with small real files."""

import gzip
import importlib.util
import json
import pathlib
import pickle

from absl.testing import parameterized
import grain
import numpy as np
import pytest

from nested_learning import data
from nested_learning import errors

pytestmark = pytest.mark.extra

_TEXTS = ['one', 'two two', 'na\u00efve \u2603\n', '', 'the end', 'x' * 300]


def _needs(test, module, extra):
  if importlib.util.find_spec(module) is None:
    test.skipTest(f'needs {module}: pip install "nested-learning[{extra}]"')


def _write_jsonl(test, root, opener=open, name='part-{}.jsonl'):
  for part in (0, 1):
    with opener(root / name.format(part), 'wb') as file:
      for i, text in enumerate(_TEXTS[3 * part :][:3]):
        line = json.dumps({'id': i, 'text': text}, ensure_ascii=i % 2 == 0)
        file.write(line.encode() + b'\n' * (1 + i))  # some lines are blank


def _jsonl(test, root):
  _write_jsonl(test, root)
  return str(root / '*.jsonl')


def _gzipped(test, root):
  _write_jsonl(test, root, gzip.open, 'c4-train.{}.json.gz')
  return str(root / 'c4-train.*.json.gz')


def _text(test, root):
  for i, text in enumerate(_TEXTS):
    (root / f'{i}.txt').write_text(text or ' ')
  return str(root)


def _array_record(test, root):
  _needs(test, 'array_record', 'array-record')
  from array_record.python import array_record_module

  for part in (0, 1):
    path = root / f'part-{part}.array_record'
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for text in _TEXTS[3 * part :][:3]:
      writer.write(text.encode())
    writer.close()
  return f'array_record:{root}'


def _parquet(test, root):
  _needs(test, 'pyarrow', 'parquet')
  import pyarrow
  from pyarrow import parquet

  for part in (0, 1):
    texts = _TEXTS[3 * part :][:3]
    table = pyarrow.table({'id': [1, 2, 3], 'text': texts})
    parquet.write_table(table, root / f'{part}.parquet', row_group_size=2)
  return str(root / '*.parquet')


def _hugging_face(test, root):
  _needs(test, 'datasets', 'datasets')
  import datasets

  table = datasets.Dataset.from_dict({'text': _TEXTS})
  datasets.DatasetDict({'train': table}).save_to_disk(str(root / 'saved'))
  return f'hf:{root}/saved/train'


def _tfds(test, root):
  _needs(test, 'tensorflow_datasets', 'tfds')
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
  tfds.dataset_builders.store_as_tfds_dataset(
    name='toy',
    version='1.0.0',
    features=features,
    split_datasets={'train': [(i, {'text': t}) for i, t in enumerate(_TEXTS)]},
    data_dir=str(root),
    file_format='array_record',
    disable_shuffling=True,
  )
  return f'tfds:{root}/toy/1.0.0'


_FORMATS = (
  ('text', _text),
  ('jsonl', _jsonl),
  ('gzipped', _gzipped),
  ('array_record', _array_record),
  ('parquet', _parquet),
  ('hugging_face', _hugging_face),
  ('tfds', _tfds),
)


class DocumentsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  @parameterized.named_parameters(*_FORMATS)
  def test_is_a_source_of_grain(self, write):
    expected = [t or ' ' for t in _TEXTS] if write is _text else _TEXTS
    documents = data.open_documents(write(self, self.root))
    self.assertLen(documents, len(_TEXTS))
    self.assertEqual(list(documents), expected)
    for i in (5, 0, 2, 1, 4, 3):  # in any order
      self.assertEqual(documents[i], expected[i])
    with self.assertRaises(IndexError):
      documents[len(_TEXTS)]
    dataset = grain.MapDataset.source(documents).shuffle(seed=0)
    self.assertCountEqual(list(dataset), expected)
    threads = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    self.assertCountEqual(list(dataset.to_iter_dataset(threads)), expected)

  @parameterized.named_parameters(*_FORMATS)
  def test_trains_resumes_and_notices_a_change(self, write):
    config = data.DataConfig(
      source=write(self, self.root),
      sequence_length=8,
      batch_size=2,
      validation_fraction=0.05,
      cache_dir=str(self.create_tempdir().full_path),
    )
    iterator = data.make_iterator(config)
    first = [next(iterator)['tokens'].tolist() for _ in range(3)]
    again = data.make_iterator(config)
    again.set_state({**iterator.get_state(), 'step': 1})
    self.assertEqual(next(again)['tokens'].tolist(), first[1])
    for path in self.root.glob('*'):
      if write in (_text, _jsonl):
        path.write_bytes(path.read_bytes().replace(b'o', b'O'))
    if write in (_text, _jsonl):
      with self.assertRaisesRegex(errors.UserError, 'on data with text='):
        data.make_iterator(config).set_state(iterator.get_state())

  @parameterized.named_parameters(_FORMATS[1], _FORMATS[2], _FORMATS[4])
  def test_can_be_pickled(self, write):
    documents = data.open_documents(write(self, self.root))
    documents[1]
    again = pickle.loads(pickle.dumps(documents))
    self.assertEqual(list(again), _TEXTS)
    self.assertEqual(repr(again), repr(documents))

  def test_names_are_relative_to_the_source(self):
    documents = data.open_documents(_jsonl(self, self.root))
    names = [documents.name(i) for i in range(6)]
    self.assertEqual(names[2:4], ['part-0.jsonl:2', 'part-1.jsonl:0'])

  def test_a_prefix_comes_before_an_ending(self):
    documents = data.open_documents(f'text:{_jsonl(self, self.root)}')
    self.assertLen(documents, 2)

  def test_text_field(self):
    (self.root / 'a.jsonl').write_text('{"content": "hello"}\n')
    source = str(self.root / 'a.jsonl')
    documents = data.open_documents(source, text_field='content')
    self.assertEqual(list(documents), ['hello'])
    with self.assertRaisesRegex(
      errors.UserError, "a.jsonl, row 0: no field 'text' among content. .*field"
    ):
      list(data.open_documents(source))

  @parameterized.parameters(
    ('{"text": "a"}\n{"te', 'row 1: not JSON'),
    ('["a"]\n', "row 0: no field 'text' among none"),
    ('{"text": 3}\n', "row 0: 'text' is of type int, not a text"),
    ('{"text": ' + '[' * 100_000, 'row 0: JSON that is nested too deeply'),
  )
  def test_damaged_lines(self, content, message):
    (self.root / 'a.jsonl').write_text(content)
    with self.assertRaisesRegex(errors.UserError, f'a.jsonl, {message}'):
      list(data.open_documents(str(self.root / 'a.jsonl')))

  def test_lone_surrogates_become_replacement_marks(self):
    lines = ['"half \\ud83d of it"', '"whole \\ud83d\\ude00"']
    (self.root / 'a.jsonl').write_text(
      '\n'.join(f'{{"text": {line}}}' for line in lines)
    )
    documents = data.open_documents(str(self.root / 'a.jsonl'))
    self.assertEqual(list(documents), ['half \ufffd of it', 'whole \U0001f600'])

  def test_endings_in_capitals(self):
    _write_jsonl(self, self.root, name='{}.JSONL')
    for source in ('0.JSONL', '*.JSONL'):
      documents = data.open_documents(str(self.root / source))
      self.assertEqual(documents[0], 'one')
    self.assertLen(data.open_documents(f'jsonl:{self.root}'), 6)

  def test_gzip_with_a_changed_byte(self):
    rng = np.random.default_rng(0)
    lines = [json.dumps({'text': str(rng.random(9))}) for _ in range(200)]
    good = gzip.compress('\n'.join(lines).encode())
    path = self.root / 'a.jsonl.gz'
    for place in rng.integers(20, len(good) - 20, size=40):
      bad = bytearray(good)
      bad[place] ^= 0x5A
      path.write_bytes(bad)
      with self.assertRaisesRegex(errors.UserError, 'a.jsonl.gz'):
        list(data.open_documents(str(path)))

  def test_file_that_vanishes(self):
    source = _jsonl(self, self.root)
    documents = data.open_documents(source)
    (self.root / 'part-1.jsonl').unlink()
    with self.assertRaisesRegex(errors.UserError, 'part-1.jsonl cannot be re'):
      list(documents)

  def test_damaged_files(self):
    _write_jsonl(self, self.root, gzip.open, '{}.json.gz')
    path = self.root / '0.json.gz'
    path.write_bytes(path.read_bytes()[:-12])
    with self.assertRaisesRegex(errors.UserError, '0.json.gz: cannot be read'):
      list(data.open_documents(str(path)))
    path = self.root / 'a.array_record'
    path.write_bytes(b'no such thing')
    with self.assertRaisesRegex(errors.UserError, 'is not of ArrayRecord'):
      data.open_documents(str(path))

  @parameterized.parameters(
    ('jsonl:{root}', 'holds no file that ends in .jsonl'),
    ('hf:{root}/none', 'is not a folder|needs the package datasets'),
    ('tfds:{root}/none', 'is not a folder|needs the package tensorflow_data'),
    ('seqio:c4', 'made once, with launch/prepare.py'),
    ('{root}/none.jsonl', 'does not exist'),
  )
  def test_bad_source(self, source, message):
    (self.root / 'a.txt').write_text('text')
    with self.assertRaisesRegex(errors.UserError, message):
      data.open_documents(source.format(root=self.root))
