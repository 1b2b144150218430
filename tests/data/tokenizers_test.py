import io
import json
import os
import pathlib
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import sentencepiece
import tokenizers as hf

from nested_learning import errors
from nested_learning.data import sources
from nested_learning.data import tokenizer_training
from nested_learning.data import tokenizers

_TEXTS = (
  'def f(x):\n  return x + 1\n',
  'The  cat, "2 x 3" ... isn\'t <s> here!',
  ' leading and trailing ',
  'na\u00efve caf\u00e9 \u2603 \U0001f600 \u65e5\u672c\u8a9e',
  '<unk></s>\t\tx\r\n\r\n',
)
_SPECIAL = ['<unk>', '<s>', '</s>']
_PATHS = {}  # name of a tokenizer -> its file


def _corpus():
  paths = [pathlib.Path(absltest.__file__), pathlib.Path(sources.__file__)]
  return [line for path in paths for line in path.read_text().splitlines()]


def _train_sentencepiece(**settings):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(_corpus()),
    model_writer=model,
    vocab_size=500,
    minloglevel=2,
    num_threads=1,
    **settings,
  )
  return model.getvalue()


def _train_hugging_face(model, trainer, **parts):
  tokenizer = hf.Tokenizer(model)
  for name, part in parts.items():
    setattr(tokenizer, name, part)
  tokenizer.train_from_iterator(_corpus(), trainer)
  return tokenizer.to_str().encode()


def _byte_level(special=(), *, prefix=False):
  return _train_hugging_face(
    hf.models.BPE(),
    hf.trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=list(special),
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
    pre_tokenizer=hf.pre_tokenizers.ByteLevel(add_prefix_space=prefix),
    decoder=hf.decoders.ByteLevel(),
  )


def _llama_like():
  """Makes SentencePiece pieces with byte fallback in JSON, as in Llama 2."""
  fallback = [f'<0x{i:02X}>' for i in range(256)]
  content = _train_hugging_face(
    hf.models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True),
    hf.trainers.BpeTrainer(
      vocab_size=700,
      special_tokens=_SPECIAL + fallback,
      show_progress=False,
    ),
    normalizer=hf.normalizers.Sequence(
      [hf.normalizers.Prepend('\u2581'), hf.normalizers.Replace(' ', '\u2581')]
    ),
    decoder=hf.decoders.Sequence(
      [
        hf.decoders.Replace('\u2581', ' '),
        hf.decoders.ByteFallback(),
        hf.decoders.Fuse(),
        hf.decoders.Strip(' ', 1, 0),
      ]
    ),
  )
  # Byte pieces belong to the vocabulary, not to the added tokens.
  state = json.loads(content)
  state['added_tokens'] = [
    token for token in state['added_tokens'] if token['content'] in _SPECIAL
  ]
  return json.dumps(state).encode()


def _word_piece():
  return _train_hugging_face(
    hf.models.WordPiece(unk_token='[UNK]'),
    hf.trainers.WordPieceTrainer(
      vocab_size=300, special_tokens=['[UNK]'], show_progress=False
    ),
    pre_tokenizer=hf.pre_tokenizers.BertPreTokenizer(),
    decoder=hf.decoders.WordPiece(),
  )


def setUpModule():
  folder = pathlib.Path(absltest.TEST_TMPDIR.value, 'tokenizers')
  folder.mkdir(parents=True, exist_ok=True)
  contents = {
    'unigram.model': _train_sentencepiece(),
    'fallback.model': _train_sentencepiece(
      model_type='bpe',
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
    ),
    'bare.model': _train_sentencepiece(
      bos_id=-1,
      eos_id=-1,
      add_dummy_prefix=False,
      user_defined_symbols=['def'],
    ),
    'byte_level.json': _byte_level(),
    'special.json': _byte_level(_SPECIAL, prefix=True),
    'llama.json': _llama_like(),
    'word_piece.json': _word_piece(),
  }
  for name, content in contents.items():
    _PATHS[name] = str(folder / name)
    pathlib.Path(_PATHS[name]).write_bytes(content)


_KINDS = (
  'bytes',
  'unigram.model',
  'fallback.model',
  'bare.model',
  'byte_level.json',
  'special.json',
  'llama.json',
)


def _make(name):
  return tokenizers.make_tokenizer(_PATHS.get(name, name))


class TrainingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_output_that_cannot_be_written(self):
    (self.root / 'file').write_text('text')
    for name in ('file/a.model', 'x' * 300 + '.model', 'file'):
      with self.assertRaises(errors.UserError) as caught:
        tokenizer_training.train_sentencepiece(
          iter(()), self.root / name, vocab_size=300
        )
      self.assertNotIn('\n', str(caught.exception))

  def test_error_of_the_source_is_raised(self):
    def texts():
      yield from _corpus()
      raise errors.UserError('The last text is damaged.')

    with self.assertRaisesRegex(errors.UserError, 'last text is damaged'):
      tokenizer_training.train_sentencepiece(
        texts(), self.root / 'a.model', vocab_size=300
      )
    self.assertEmpty(list(self.root.iterdir()))


class TokenizersTest(parameterized.TestCase):
  @parameterized.parameters(*_KINDS)
  def test_byte_lengths_count_the_decoded_text(self, name):
    tokenizer = _make(name)
    for text in _TEXTS:
      ids = tokenizer.encode(text)
      document = np.concatenate([[tokenizer.document_id], ids])
      self.assertEqual(
        tokenizer.byte_lengths[document].sum(),
        len(tokenizer.decode(ids).encode()),
        msg=text,
      )

  @parameterized.parameters(*_KINDS)
  def test_contract(self, name):
    tokenizer = _make(name)
    ids = tokenizer.encode('\n'.join(_TEXTS))
    self.assertEqual(ids.dtype, np.int32)
    self.assertNotIn(tokenizer.document_id, ids)
    self.assertLess(max(ids.max(), tokenizer.document_id), tokenizer.vocab_size)
    self.assertEqual(tokenizer.byte_lengths.shape, (tokenizer.vocab_size,))
    self.assertEqual(tokenizer.byte_lengths.dtype, np.int32)
    self.assertEqual(
      tokenizer.decode([tokenizer.document_id, *ids]), tokenizer.decode(ids)
    )

  @parameterized.parameters(
    'bytes', 'fallback.model', 'byte_level.json', 'llama.json'
  )
  def test_round_trip(self, name):
    tokenizer = _make(name)
    for text in _TEXTS:
      self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

  @parameterized.parameters(
    ('bytes', 256, 257, 0),
    ('unigram.model', 1, 500, -1),
    ('bare.model', 500, 501, 0),
    ('byte_level.json', 400, 401, 0),
    ('special.json', 1, 400, 0),
    ('llama.json', 1, 700, -1),
  )
  def test_document_id(self, name, document_id, vocab_size, byte_length):
    tokenizer = _make(name)
    self.assertEqual(tokenizer.document_id, document_id)
    self.assertEqual(tokenizer.vocab_size, vocab_size)
    self.assertEqual(tokenizer.byte_lengths[document_id], byte_length)

  def test_bytes_of_half_a_character_decode_to_a_replacement(self):
    tokenizer = tokenizers.make_tokenizer('bytes')
    self.assertEqual(tokenizer.decode([97, 0xC3]), 'a\ufffd')

  @parameterized.parameters(*_KINDS)
  def test_decode_after_adds_up_to_the_whole_text(self, name):
    tokenizer = _make(name)
    for text in _TEXTS:
      ids = tokenizer.encode(text)
      whole = tokenizer.decode(ids)
      document = [tokenizer.document_id, *ids]
      for cut in range(len(document) + 1):
        first = tokenizer.decode_after([], document[:cut])
        rest = tokenizer.decode_after(document[:cut], document[cut:])
        self.assertEqual(first + rest, whole)
      parts = [
        tokenizer.decode_after(document[:i], document[i : i + 1])
        for i in range(len(document))
      ]
      self.assertEqual(''.join(parts), whole)

  @parameterized.parameters(*_KINDS)
  def test_decode_after_keeps_the_space_after_a_prompt(self, name):
    tokenizer = _make(name)
    prompt, whole = map(tokenizer.encode, ('return x', 'return x def f'))
    self.assertEqual(prompt.tolist(), whole[: len(prompt)].tolist())
    self.assertEqual(
      tokenizer.decode_after(prompt, whole[len(prompt) :]), ' def f'
    )

  @parameterized.parameters(
    'bytes', 'fallback.model', 'byte_level.json', 'llama.json'
  )
  def test_decode_after_leaves_out_an_unfinished_character(self, name):
    tokenizer = _make(name)
    for character in ('\u00fc', '\u2603', '\U0001f600'):
      text = 'a' + character
      ids = tokenizer.encode(text)
      num_whole = len(tokenizer.encode('a'))
      for end in range(num_whole, len(ids)):
        self.assertEqual(tokenizer.decode_after([], ids[:end]), 'a')
        self.assertEqual(
          tokenizer.decode_after(ids[:end], ids[end:]), character
        )
      # A replacement mark that the text has is no unfinished character.
      ids = tokenizer.encode('a\ufffd')
      self.assertEqual(tokenizer.decode_after([], ids), 'a\ufffd')

  @parameterized.parameters(
    'bytes', 'fallback.model', 'byte_level.json', 'llama.json'
  )
  def test_lone_surrogates_become_replacement_marks(self, name):
    tokenizer = _make(name)
    for text in ('half \ud83d of it', os.fsdecode(b'caf\xe9')):
      expected = tokenizers.replace_surrogates(text)
      self.assertIn('\ufffd', expected)
      self.assertEqual(tokenizer.decode(tokenizer.encode(text)), expected)

  def test_fingerprint_tells_models_apart(self):
    fingerprints = [_make(name).fingerprint for name in _KINDS]
    self.assertLen(set(fingerprints), len(_KINDS))
    self.assertEqual(fingerprints, [_make(name).fingerprint for name in _KINDS])

  @parameterized.parameters(
    ('bytez', "'bytez' is unknown. Give 'bytes', the path of"),
    ('/no/such.json', r"such.json' cannot be read \(No such file"),
    ('/no/such.model', r"such.model' cannot be read \(No such file"),
  )
  def test_bad_spec(self, spec, message):
    with self.assertRaisesRegex(errors.UserError, message):
      tokenizers.make_tokenizer(spec)

  @parameterized.parameters(
    ('.model', 'is not a SentencePiece model, or is damaged'),
    ('.json', 'is not a Hugging Face tokenizers file, or is damaged'),
  )
  def test_damaged_file(self, suffix, message):
    path = self.create_tempfile('damaged' + suffix, 'nonsense').full_path
    with self.assertRaisesRegex(errors.UserError, message):
      tokenizers.make_tokenizer(path)

  @parameterized.parameters(
    ('unigram.model', 'sentencepiece'), ('special.json', 'tokenizers')
  )
  def test_missing_package(self, name, package):
    with mock.patch.dict(sys.modules, {package: None}):
      with self.assertRaisesRegex(
        errors.UserError,
        rf'needs the package {package}. .*"nested-learning\[tokenizers\]"',
      ):
        _make(name)

  def test_bytes_that_cannot_be_counted(self):
    with self.assertRaisesRegex(
      errors.UserError, "word_piece.json' decodes in a way that hides"
    ):
      _make('word_piece.json')

  def test_marks_stand_for_special_tokens(self):
    text = '<s>user\n a <unk></s></s>naïve<s>'
    tokenizer = _make('special.json')
    theirs = hf.Tokenizer.from_file(_PATHS['special.json'])
    expected = theirs.encode(text, add_special_tokens=False).ids
    self.assertEqual(tokenizer.encode_marked(text).tolist(), expected)
    self.assertNotEqual(tokenizer.encode(text).tolist(), expected)
    for name in ('bytes', 'byte_level.json', 'unigram.model'):
      tokenizer = _make(name)
      ids = tokenizer.encode_marked('a</s>b')
      self.assertEqual('</s>' in tokenizer.special, len(ids) < 6, name)
      self.assertEmpty(tokenizer.encode_marked(''))

  def test_names_special_tokens(self):
    for name in ('special.json', 'unigram.model'):
      tokenizer = _make(name)
      self.assertIn('</s>', tokenizer.special)
      for special, i in tokenizer.special.items():
        self.assertEqual(tokenizer.decode(np.array([i])), '', special)
