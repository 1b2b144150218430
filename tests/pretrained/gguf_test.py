"""GGUF files, against the safetensors that they were made of."""

import io
import json
import pathlib
import shutil
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from nested_learning import data
from nested_learning import errors
from nested_learning import pretrained
from nested_learning.pretrained import gguf_sentencepiece

gguf = pytest.importorskip('gguf', reason='pip install nested-learning[gguf]')
from tests.pretrained import gguf_writer  # noqa: E402  (needs gguf)

pytestmark = pytest.mark.extra
_DATA = pathlib.Path(__file__).parent / 'data'
# Settings that llama.cpp knows, where the recorded models have others.
_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 32.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
  'rope_theta': 500_000.0,
}
_GEMMA3 = {
  'query_pre_attn_scalar': 8,
  'layer_types': ['sliding_attention'] * 4,
  'rope_parameters': {
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 10_000.0},
    'full_attention': {
      'rope_type': 'linear',
      'factor': 8.0,
      'rope_theta': 1000.0,
    },
  },
}


class GgufTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.folder / 'model.gguf'

  def write(self, name, changes=None, **metadata):
    """Writes a GGUF of a recorded model with changes of its config.json."""
    folder = self.folder / 'source'
    shutil.copytree(_DATA / name, folder)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | (changes or {})))
    gguf_writer.write(folder, self.path, **metadata)
    return folder

  @parameterized.parameters(
    ('llama', {}),
    ('llama3', {'rope_parameters': _LLAMA3}),
    (
      'qwen2',
      {'use_sliding_window': False, 'layer_types': ['full_attention'] * 2},
    ),
    ('qwen3', {}),
    ('gemma2', {'query_pre_attn_scalar': 8}),
    ('gemma3', _GEMMA3),
    ('gpt2', {}),
  )
  def test_is_the_model_of_the_safetensors(self, name, changes):
    folder = self.write(name, changes)
    expected, found = pretrained.load(folder), pretrained.load(self.path)
    self.assertEqual(found.config, expected.config)
    for ours, theirs in zip(
      *(jax.tree.leaves(x.params) for x in (found, expected)), strict=True
    ):
      # Gemma's w + 1 - 1 rounds.
      atol = 2e-7 if name.startswith('gemma') else 0
      np.testing.assert_allclose(ours, theirs, atol=atol)

  def test_half_precision_stays(self):
    folder = self.write('llama')
    writer = gguf.GGUFWriter
    add = writer.add_tensor

    def add_half(self, name, x):
      add(self, name, x.astype(np.float16) if x.ndim == 2 else x)

    with mock.patch.object(writer, 'add_tensor', add_half):
      gguf_writer.write(folder, self.path)
    tensors = pretrained.open_source(self.path).tensors
    self.assertEqual({x.dtype for x in tensors.values()}, {'F16', 'F32'})

  @parameterized.parameters('smollm', 'gpt-2', 'llama-bpe', 'qwen2')
  def test_tokenizers(self, kind):
    letters = [bytes([i]).decode('latin-1') for i in range(33, 127)]
    tokens = ['<|endoftext|>', '<|im_end|>', '\u0120', '\u0120t', *letters]
    self.write(
      'llama',
      **{
        'tokenizer__ggml__model': 'gpt2',
        'tokenizer__ggml__pre': kind,
        'tokenizer__ggml__tokens': tokens,
        'tokenizer__ggml__token_type': [3, 3] + [1] * (len(tokens) - 2),
        'tokenizer__ggml__merges': ['\u0120 t'],
        'tokenizer__ggml__eos_token_id': 1,
        'tokenizer__chat_template': '{{ messages }}',
      },
    )
    source = pretrained.open_source(self.path)
    self.assertEqual(source.chat_template, '{{ messages }}')
    self.assertEqual(source.generation, {'eos_token_id': 1})
    path = self.folder / 'tokenizer.json'
    path.write_bytes(source.files['tokenizer.json'])
    tokenizer = data.make_tokenizer(str(path))
    self.assertEqual(tokenizer.special, {'<|endoftext|>': 0, '<|im_end|>': 1})
    ids = tokenizer.encode('12 to it.')
    self.assertEqual(tokenizer.decode(ids), '12 to it.')
    self.assertIn(3, ids)  # the merge
    self.assertEqual(tokenizer.byte_lengths[ids].sum(), 9)

  @parameterized.parameters(True, False)
  def test_sentencepiece(self, adds_space):
    import sentencepiece

    words = ['reads', 'what', 'others', 'wrote', 'naïve', 'model', 'a', '12']
    corpus = [' '.join(words[i % 8 :] + words[: i % 5]) for i in range(60)]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(corpus),
      model_writer=trained,
      model_type='bpe',
      vocab_size=310,
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=adds_space,
      user_defined_symbols=['<turn>'],
      minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    ids = range(model.vocab_size())
    kinds = [
      (model.is_unknown, 2),
      (model.is_control, 3),
      (model.is_byte, 6),
      (lambda i: model.id_to_piece(i) == '<turn>', 4),
    ]
    types = [next((k for f, k in kinds if f(i)), 1) for i in ids]
    fields = {
      'tokenizer.ggml.tokens': [model.id_to_piece(i) for i in ids],
      'tokenizer.ggml.scores': [model.get_score(i) for i in ids],
      'tokenizer.ggml.token_type': types,
      'tokenizer.ggml.unknown_token_id': model.unk_id(),
      'tokenizer.ggml.bos_token_id': model.bos_id(),
      'tokenizer.ggml.eos_token_id': model.eos_id(),
    }
    if not adds_space:
      fields['tokenizer.ggml.add_space_prefix'] = False
    found = sentencepiece.SentencePieceProcessor(
      model_proto=gguf_sentencepiece.make(fields)
    )
    for text in (*corpus[:3], 'a  naïve <turn>\n☃ tree ', ''):
      self.assertEqual(found.encode(text), model.encode(text))
      self.assertEqual(found.decode(found.encode(text)), text)
    self.assertEqual(
      (found.bos_id(), found.eos_id(), found.unk_id()),
      (model.bos_id(), model.eos_id(), model.unk_id()),
    )

  def test_leaves_out_tokenizers_that_it_does_not_know(self):
    self.write('llama', tokenizer__ggml__model='bert')
    self.assertNotIn('tokenizer.json', pretrained.open_source(self.path).files)

  def test_refuses_files(self):
    self.write('llama')
    content = self.path.read_bytes()
    for cut in (b'', b'GGUF', b'x' * 100, content[:3000], content[:-4000]):
      self.path.write_bytes(cut)
      with self.assertRaisesRegex(errors.UserError, 'is cut short or damaged'):
        pretrained.open_source(self.path)
    self.path.unlink()
    with self.assertRaisesRegex(errors.UserError, 'No such file'):
      pretrained.open_source(self.path)

  def test_refuses_types_and_architectures(self):
    self.write('llama')
    with mock.patch.object(
      gguf.quants, 'dequantize', side_effect=NotImplementedError
    ):
      with self.assertRaisesRegex(errors.UserError, 'GGUF type F32, which'):
        pretrained.load(self.path)
    content = self.path.read_bytes()
    self.path.write_bytes(content.replace(b'llama', b'lamma'))
    with self.assertRaisesRegex(
      errors.UserError, "architecture='lamma', which is not supported; llama"
    ):
      pretrained.open_source(self.path)


class MissingPackageTest(absltest.TestCase):
  def test_says_how_to_install_it(self):
    with (
      mock.patch.dict(sys.modules, {'gguf': None}),
      self.assertRaisesRegex(errors.UserError, r'nested-learning\[gguf\]'),
    ):
      pretrained.open_source('model.gguf')
