"""Tests of the readers of intents, on small files of the same form."""

import json
import pathlib

from absl.testing import parameterized
import numpy as np

from experiments.continual import intents
from nested_learning import errors


class IntentsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def _write(self, **files):
    for name, text in files.items():
      self.folder.joinpath(name.replace('_csv', '.csv')).write_text(text)

  def test_clinc(self):
    data = {
      'train': [['pay my bill', 'pay_bill'], ['freeze it', 'freeze']],
      'val': [['never', 'seen']],
      'test': [['freeze now', 'freeze']],
      'oos_train': [['what', 'oos']],
    }
    self.folder.joinpath('data_full.json').write_text(json.dumps(data))
    corpus = intents.read_intents(self.folder)
    self.assertEqual(corpus.names, ('freeze', 'pay_bill'))
    self.assertEqual(corpus.train, ('pay my bill', 'freeze it'))
    np.testing.assert_array_equal(corpus.train_labels, [1, 0])
    np.testing.assert_array_equal(corpus.test_labels, [0])

  @parameterized.named_parameters(
    ('banking', 'text,category\n"Hi, you",b\nno,a\n', 'text,category\nyes,b\n'),
    ('dbpedia', 'text,l1,l2,l3\n"Hi, you",x,b,y\nno,x,a,z\n', 'text,l2\nyes,b'),
    ('dbpedia_14', 'b,Title,"Hi, you"\na,Other,no\n', 'b,Third,yes\n'),
  )
  def test_csv(self, train, test):
    self._write(train_csv=train, DBPEDIA_test_csv=test)
    corpus = intents.read_intents(self.folder)
    self.assertEqual(corpus.names, ('a', 'b'))
    self.assertEqual(corpus.train, ('Hi, you', 'no'))
    np.testing.assert_array_equal(corpus.train_labels, [1, 0])
    self.assertEqual(corpus.test, ('yes',))
    np.testing.assert_array_equal(corpus.test_labels, [1])

  @parameterized.named_parameters(
    ('no_folder', {}, '/nowhere', 'no folder'),
    ('no_test', {'train_csv': 'text,label\na,b\n'}, None, r'\*test\*.csv'),
    ('no_class', {'train_csv': 'text\na\n'}, None, r"columns \['text'\]"),
    ('short_row', {'train_csv': 'text,label\na\n'}, None, 'row 1 lacks'),
    (
      'new_class',
      {'train_csv': 'text,label\na,b\n', 'test_csv': 'text,label\na,c\n'},
      None,
      "class 'c'",
    ),
  )
  def test_refuses(self, files, path, message):
    self._write(**files)
    with self.assertRaisesRegex(errors.UserError, message):
      intents.read_intents(path or self.folder)

  def test_generated(self):
    sizes = {'num_classes': 20, 'num_train': 5}
    corpus = intents.generate_intents(1, num_test=2, **sizes)
    self.assertLen(corpus.train, 100)
    np.testing.assert_array_equal(np.bincount(corpus.test_labels), [2] * 20)
    self.assertEqual(
      corpus.train, intents.generate_intents(1, num_test=2, **sizes).train
    )
    self.assertNotEqual(
      corpus.train, intents.generate_intents(2, num_test=2, **sizes).train
    )
