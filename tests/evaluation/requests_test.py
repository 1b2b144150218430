import dataclasses
import io

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import sentencepiece

from nested_learning import data
from nested_learning import errors
from nested_learning import layers
from nested_learning.evaluation import requests
from tests.training import tiny

_BYTES = data.make_tokenizer('bytes')


def pairs_tokenizer() -> data.Tokenizer:
  """Letters two by two: a token may reach across any border of two texts."""

  def encode(text):
    return np.array(
      [
        ord(text[i]) + 256 * ord(text[i + 1 : i + 2] or '\0')
        for i in range(0, len(text), 2)
      ],
      np.int32,
    )

  return dataclasses.replace(_BYTES, encode=encode)


class EncodePairTest(parameterized.TestCase):
  @parameterized.parameters(
    ('two and two', ' is four', 'two and two', ' is four'),
    ('', 'is four', '', 'is four'),
    ('Answer: ', 'four', 'Answer:', ' four'),  # the space goes with the word
    ('Answer:\n', 'four', 'Answer:', '\nfour'),
    (' ', 'four', '', ' four'),
    ('naïve ☃', '!', 'naïve ☃', '!'),
    ('two', '', 'two', ''),
  )
  def test_bytes(self, context, continuation, before, after):
    request = requests.encode_pair(_BYTES, context, continuation)
    self.assertEqual(request.context[0], _BYTES.document_id)
    self.assertEqual(_BYTES.decode(request.context), before)
    self.assertEqual(_BYTES.decode(request.continuation), after)

  def test_a_token_across_the_border_is_of_the_continuation(self):
    tokenizer = pairs_tokenizer()
    request = requests.encode_pair(tokenizer, 'abc', 'de')
    whole = tokenizer.encode('abcde')
    np.testing.assert_array_equal(request.context[1:], whole[:1])
    np.testing.assert_array_equal(request.continuation, whole[1:])

  def test_sentencepiece(self):
    content = io.BytesIO()
    text = ['the cat sat on the mat', 'the mat is on the cat', 'a cat'] * 9
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(text),
      model_writer=content,
      vocab_size=40,
      hard_vocab_limit=False,
      minloglevel=2,
    )
    path = self.create_tempfile(
      'a.model', content=content.getvalue(), mode='wb'
    )
    tokenizer = data.make_tokenizer(path.full_path)
    for context in ('the cat', 'the cat ', ''):
      request = requests.encode_pair(tokenizer, context, 'sat')
      whole = tokenizer.encode(context + 'sat')
      np.testing.assert_array_equal(
        np.concatenate(request), [tokenizer.document_id, *whole]
      )
    request = requests.encode_pair(tokenizer, 'the cat', ' sat')
    np.testing.assert_array_equal(
      request.context[1:], tokenizer.encode('the cat')
    )


class LayoutTest(parameterized.TestCase):
  def test_limits(self):
    limits = requests.limits(tiny.MODEL)
    self.assertEqual(limits, requests.Limits(128, 128))
    self.assertEqual(requests.limits(tiny.MODEL, 16), requests.Limits(16, 16))
    titans = dataclasses.replace(
      tiny.MODEL,
      mixer=layers.MemoryMixerConfig(num_heads=2, head_dim=8),
    )
    self.assertEqual(requests.limits(titans, 16), requests.Limits(16, None))

  @parameterized.parameters(0, 129)
  def test_refuses_lengths_that_the_model_has_not(self, length):
    with self.assertRaisesRegex(
      errors.UserError, f'max_length={length} .* model.max_length=128'
    ):
      requests.limits(tiny.MODEL, length)

  def test_refuses_batches_without_rows(self):
    with self.assertRaisesRegex(errors.UserError, 'batch_size=0'):
      requests.num_rows(0, None)

  def test_batches_hold_each_place_once_longest_first(self):
    lengths = [3, 9, 1, 9, 5]
    batches = list(requests.batches(lengths, 2))
    self.assertEqual(batches, [(1, 3), (4, 0), (2,)])

  @parameterized.parameters(
    (1, 32), (32, 32), (33, 64), (100, 100), (101, 132), (199, 200), (200, 200)
  )
  def test_pads_to_few_lengths(self, length, padded):
    rows = [np.arange(length), np.arange(1)]
    found = requests.pad(rows, 3, piece=100)
    self.assertEqual(found.shape, (3, padded))
    np.testing.assert_array_equal(found[0, :length], rows[0])
    self.assertTrue(np.all(found[0, length:] == -1))
    self.assertTrue(np.all(found[2] == -1))


if __name__ == '__main__':
  absltest.main()
