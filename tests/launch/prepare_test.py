"""Tests of launch/prepare.py, called as a user calls it."""

import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

from absl.testing import parameterized
import numpy as np
import pytest

from nested_learning import data
from nested_learning.data import token_files

_PREPARE = pathlib.Path(__file__).resolve().parents[2] / 'launch' / 'prepare.py'

_MODULE = """
from nested_learning.data import seqio_tasks

seqio_tasks.add_task('mine', {'train': 'jsonl:text'}, 'tokenizer.model')
seqio_tasks.add_task('other', {'train': 'jsonl:more'}, 'tokenizer.model')
seqio_tasks.add_mixture('both', {'mine': 1.0, 'other': 1.0})
"""


class PrepareTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.write('text/a.jsonl', 30)

  def write(self, path, num_lines):
    path = self.root / path
    path.parent.mkdir(exist_ok=True)
    lines = [
      f'{i} bottles of beer\n\ton the wall {i}' for i in range(num_lines)
    ]
    path.write_text('\n'.join(json.dumps({'text': line}) for line in lines))

  def call(self, *args, code=0):
    result = subprocess.run(
      [sys.executable, _PREPARE, *args],
      capture_output=True,
      text=True,
      cwd=self.root,
    )
    self.assertEqual(result.returncode, code, result.stderr)
    return result

  def iterate(self, source):
    config = data.DataConfig(
      source=str(self.root / source),
      tokenizer=str(self.root / 'tokenizer.model'),
      sequence_length=16,
      batch_size=2,
      cache_dir=str(self.root / 'cache'),
    )
    return data.make_iterator(config)

  def test_learns_a_tokenizer_and_makes_tokens(self):
    source = '--source=text/*.jsonl'
    model = '--output=tokenizer.model'
    result = self.call(source, model, '--vocab_size=300')
    self.assertIn('--set=data.tokenizer=tokenizer.model', result.stdout)
    tokenizer = data.make_tokenizer(str(self.root / 'tokenizer.model'))
    self.assertEqual(tokenizer.vocab_size, 300)
    text = '7 bottles\n\tof  na\u00efve\u2603 beer '
    self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)
    self.assertLess(len(tokenizer.encode(' bottles of beer')), 8)
    made = self.call(
      source, '--tokenizer=tokenizer.model', '--output=tokens'
    ).stdout
    self.assertRegex(made, r'tokens: [\d,]+ tokens of 30 documents; use')
    self.assertTrue((self.root / 'tokens' / 'tokenizer.model').exists())
    batch = next(self.iterate('tokens'))
    text = next(self.iterate('text/*.jsonl'))
    self.assertEqual(batch['tokens'].tolist(), text['tokens'].tolist())
    again = self.call(source, model, code=2)
    self.assertIn('must end in .model and not exist', again.stderr)

  @parameterized.parameters('lr[3e-3]', '-a b\\*?%s\n☃ ')
  def test_output_of_any_name_is_read_back(self, name):
    self.call('--source=text/a.jsonl', f'--output={name}')
    config = data.DataConfig(
      source=str(self.root / name),
      sequence_length=16,
      batch_size=2,
      cache_dir=str(self.root / 'cache'),
    )
    self.assertEqual(next(data.make_iterator(config))['tokens'].shape, (2, 16))

  @parameterized.parameters(
    ([f'--output={"x" * 300}', '--source=text'], 'longer than the file system'),
    (['--output=a'], '--source is missing'),
    (['--source=text'], '--output is missing'),
    (['--source=none', '--output=a'], "'none' does not exist"),
    (['--source=seqio:c4', '--output=a.model'], 'is made of tokens'),
    (['--source=text', '--output=a', '--split'], 'split'),
    (
      ['--source=text/a.jsonl', '--output=a.model', '--vocab_size=9000'],
      'No vocabulary of 9000 pieces',
    ),
  )
  def test_bad_call(self, args, message):
    result = self.call(*args, code=2)
    self.assertLen(result.stderr.splitlines(), 1)
    self.assertIn(message.lower(), result.stderr.lower())
    self.assertEqual([p.name for p in self.root.iterdir()], ['text'])

  @pytest.mark.extra
  def test_makes_tokens_of_seqio(self):
    if importlib.util.find_spec('seqio') is None:
      self.skipTest('needs seqio: pip install "nested-learning[seqio]"')
    self.write('more/b.jsonl', 50)
    (self.root / 'my_tasks.py').write_text(_MODULE)
    self.call(
      '--source=text/*.jsonl', '--output=tokenizer.model', '--vocab_size=300'
    )
    for name in ('mine', 'both'):
      self.call(
        f'--source=seqio:{name}',
        '--module=my_tasks',
        '--tokenizer=tokenizer.model',
        f'--output={name}',
      )
    # A task in the order of its source holds the tokens of its source.
    summaries = [
      json.loads((self.root / name / 'tokens.json').read_text())
      for name in ('mine', 'both')
    ]
    self.assertEqual(summaries[0]['num_documents'], 30)
    tokenizer = data.make_tokenizer(str(self.root / 'tokenizer.model'))
    corpus = token_files.load(str(self.root / 'mine'), tokenizer)
    tokens = corpus.tokens[np.arange(corpus.starts[-1])].tolist()
    texts = data.open_documents(str(self.root / 'text' / '*.jsonl'))
    expected = [[1, *tokenizer.encode(text)] for text in texts]
    self.assertEqual(tokens, list(itertools.chain(*expected)))
    self.assertGreater(summaries[1]['num_documents'], 50)
    refused = self.call(
      '--source=seqio:mine', '--module=my_tasks', '--output=bytes', code=2
    )
    self.assertIn('--tokenizer is bytes', refused.stderr)
    unknown = self.call('--source=seqio:nothing', '--output=bytes', code=2)
    self.assertIn("knows no task 'nothing'", unknown.stderr)
