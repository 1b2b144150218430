import dataclasses
import functools

from absl import logging
from absl.testing import parameterized
import jax
import numpy as np

from nested_learning import data
from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from nested_learning.evaluation import continuation
from nested_learning.evaluation import scoring
from tests import compiling
from tests.training import tiny

# Draws only ASCII, so that encoding the text gives the tokens drawn.
_ASCII = dataclasses.replace(data.make_tokenizer('bytes'), vocab_size=127)
_ATTENTION = dataclasses.replace(tiny.MODEL, max_length=64)
_TITANS = dataclasses.replace(
  _ATTENTION,
  max_length=32,
  mixer=layers.MemoryMixerConfig(
    num_heads=2, head_dim=8, kind='matrix', adaptive=(), chunk_size=4
  ),
)
_X = np.array([ord('x')])
_CONTEXTS = ('one, two, three, ', '', 'a', 'words and words and')


@functools.cache
def init_params(config):
  params = jax.jit(models.make_model(config).init_params)(jax.random.key(1))
  # Further from linear than at initialisation, where every token would be
  # followed by itself.
  params['blocks'] = jax.tree.map(lambda x: 4 * x, params['blocks'])
  return params


@functools.cache
def make_generate_until(config, **settings):
  model = models.make_model(config)
  write = continuation.make_generate_until(
    model, _ASCII, batch_size=2, **settings
  )
  write = functools.partial(write, init_params(config))

  def quick(*args, **kwargs):  # its programs are made when they are needed
    with compiling.quickly():
      return write(*args, **kwargs)

  return quick


@functools.cache
def make_score(config):
  with compiling.quickly():
    return scoring.make_score(
      models.make_model(config), batch_size=2, vocab_size=_ASCII.vocab_size
    )


def greedy(num_tokens, *until):
  return continuation.GenerateUntilConfig(until, num_tokens)


class GenerateUntilTest(parameterized.TestCase):
  def assert_greedy(self, config, requests, wanted):
    score = make_score(config)
    scores = score(init_params(config), requests)
    self.assertEqual([s.is_greedy for s in scores], wanted)

  @parameterized.named_parameters(
    ('attention', _ATTENTION, ()),
    ('titans', _TITANS, ('more, longer, than a piece of it, ' * 2,)),
  )
  def test_generated_text_is_greedy_under_scoring(self, config, more):
    contexts = (*_CONTEXTS, *more)
    texts = make_generate_until(config)(contexts, greedy(20))
    self.assertEqual([len(text) for text in texts], [20] * len(contexts))
    self.assertLen(set(texts), len(texts))
    requests = [
      scoring.Request(
        scoring.encode_context(_ASCII, context), _ASCII.encode(text)
      )
      for context, text in zip(contexts, texts, strict=True)
    ]
    self.assert_greedy(config, requests, [True] * len(contexts))
    changed = requests[-1].continuation.copy()
    changed[11] = (changed[11] + 1) % 127
    changed = requests[-1]._replace(continuation=changed)
    self.assert_greedy(config, [changed], [False])

  def test_neither_batch_nor_order_matters(self):
    write = make_generate_until(_ATTENTION)
    wanted = [write([context], greedy(20))[0] for context in _CONTEXTS]
    found = write(_CONTEXTS[::-1], greedy(20))
    self.assertEqual(found, wanted[::-1])
    self.assertLen(set(wanted), 4)

  def test_until_is_cut_off_across_blocks_and_tokens(self):
    write = make_generate_until(_ATTENTION)
    (whole,) = write(_CONTEXTS[:1], greedy(40))
    until = whole[14:18]  # the first block draws 16 tokens
    place = whole.find(until)
    self.assertEqual(place, 14)
    (found,) = write(_CONTEXTS[:1], greedy(40, 'unseen', until))
    self.assertEqual(found, whole[:place])
    first = whole[7:9]
    (found,) = write(_CONTEXTS[:1], greedy(40, until, first))
    self.assertEqual(found, whole[: min(place, whole.find(first))])

  def test_seeds_reproduce_in_any_batch(self):
    config = continuation.GenerateUntilConfig(max_tokens=20, temperature=20.0)
    same = ['same'] * 3
    texts = make_generate_until(_ATTENTION)(same, config)
    self.assertLen(set(texts), 3)
    self.assertEqual(make_generate_until(_ATTENTION)(same, config), texts)
    self.assertEqual(
      make_generate_until(_ATTENTION)(same[:1], config), texts[:1]
    )
    other = make_generate_until(_ATTENTION, seed=1)(same, config)
    self.assertNotEqual(other, texts)

  def test_warns_of_contexts_longer_than_attention_holds(self):
    write = make_generate_until(_ATTENTION)
    context = ''.join(chr(65 + i % 50) for i in range(70))
    with self.assertLogs(logging.get_absl_logger(), 'WARNING') as logs:
      found = write([context, 'b'], greedy(20))
    self.assertIn('1 of 2 contexts are longer than the 44', logs.output[0])
    request = scoring.Request(
      _ASCII.encode(context)[-44:], _ASCII.encode(found[0])
    )
    self.assert_greedy(_ATTENTION, [request], [True])

  def test_refuses_texts_without_room_for_a_context(self):
    with self.assertRaisesRegex(errors.UserError, '64 tokens to generate'):
      make_generate_until(_ATTENTION)(['a'], greedy(64))
    tokenizer = dataclasses.replace(_ASCII, vocab_size=261)
    with self.assertRaisesRegex(errors.UserError, 'tokenizer has 261 tokens'):
      continuation.make_generate_until(models.make_model(_ATTENTION), tokenizer)


class FinishedTextTest(parameterized.TestCase):
  @parameterized.parameters(
    ('ab', None),
    ('abcde', 'abcde'),
    ('abcdef', 'abcde'),  # no more than five
    ('abSTOPcd', 'abSTO'),  # the whole string is not there
    ('a;b', 'a'),
    ('', None),
  )
  def test_bytes(self, drawn, wanted):
    config = continuation.GenerateUntilConfig(('STOP', ';'), 5)
    found = continuation.finished_text(_ASCII, _X, _ASCII.encode(drawn), config)
    self.assertEqual(found, wanted)

  def test_ends_before_the_next_document(self):
    drawn = np.array([97, _ASCII.document_id, 98])
    found = continuation.finished_text(
      _ASCII, _X, drawn, continuation.GenerateUntilConfig()
    )
    self.assertEqual(found, 'a')

  def test_half_a_character_waits_for_its_other_half(self):
    config = continuation.GenerateUntilConfig(('\u00e9',), 9)
    drawn = np.array([0x61, 0xC3])
    self.assertIsNone(continuation.finished_text(_ASCII, _X, drawn, config))
    drawn = np.array([0x61, 0xC3, 0xA9])
    self.assertEqual(continuation.finished_text(_ASCII, _X, drawn, config), 'a')

  def test_half_a_character_at_the_end_is_left_out(self):
    config = continuation.GenerateUntilConfig(max_tokens=3)
    drawn = _ASCII.encode('Gr\u00fc')[:3]
    self.assertEqual(
      continuation.finished_text(_ASCII, _X, drawn, config), 'Gr'
    )

  def test_the_first_token_keeps_its_space(self):
    words = ['the', 'cat', 'sat']

    def decode(ids):  # a space before each word, taken off the first
      return ' '.join(words[i] for i in ids)

    tokenizer = dataclasses.replace(_ASCII, decode=decode)
    config = continuation.GenerateUntilConfig(max_tokens=2)
    found = continuation.finished_text(
      tokenizer, np.array([0]), np.array([1, 2]), config
    )
    self.assertEqual(found, ' cat sat')

  def test_a_special_token_of_until_ends_the_text(self):
    tokenizer = dataclasses.replace(_ASCII, special={'<|im_end|>': 3})
    config = continuation.GenerateUntilConfig(('<|im_end|>',), 9)
    drawn = np.array([*_ASCII.encode('yes'), 3, *_ASCII.encode('no')])
    self.assertEqual(
      continuation.finished_text(tokenizer, _X, drawn, config), 'yes'
    )
