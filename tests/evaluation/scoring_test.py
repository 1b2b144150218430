import contextlib
import dataclasses
import functools
import io
import pathlib
import re

from absl import logging
from absl.testing import parameterized
import jax
import numpy as np
import pytest
import sentencepiece

from nested_learning import data
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import inference
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import sharding
from nested_learning.evaluation import scoring
from tests import compiling
from tests.training import tiny

_ATTENTION = dataclasses.replace(tiny.MODEL, max_length=32)
_TITANS = dataclasses.replace(
  _ATTENTION,
  mixer=layers.MemoryMixerConfig(
    num_heads=2, head_dim=8, kind='matrix', adaptive=(), chunk_size=4
  ),
)
_HOPE = dataclasses.replace(
  _ATTENTION,
  mixer=layers.MemoryMixerConfig(
    num_heads=2, head_dim=8, chunk_size=4, chunk_size_others=4
  ),
)
_BYTES = data.make_tokenizer('bytes')
_MODELS = (('attention', _ATTENTION), ('titans', _TITANS))


@functools.cache
def init_params(config):
  params = jax.jit(models.make_model(config).init_params)(jax.random.key(1))
  # Sharper than at initialisation, so that every token counts.
  return params | {'embedding': params['embedding'] * 4}


@functools.cache
def make_score(config, **settings):
  model = models.make_model(config)
  with compiling.quickly():
    score = scoring.make_score(model, **{'batch_size': 2, **settings})
  return functools.partial(score, init_params(config))


@functools.cache
def make_step(config):
  return compiling.jit(models.make_model(config).forward)


def request(num_context, num_continuation, seed=0):
  random = np.random.default_rng(seed)
  tokens = random.integers(0, 256, num_context + num_continuation, np.int32)
  return scoring.Request(tokens[:num_context], tokens[num_context:])


def reference(config, request):
  """Token by token, alone and without padding."""
  params, step = init_params(config), make_step(config)
  state = models.make_model(config).init_state(params, 1)
  total, greedy = 0.0, True
  tokens = np.concatenate(request)
  for i, token in enumerate(tokens[:-1]):
    logits, state = step(params, state, token[None, None])
    if i >= len(request.context) - 1:
      logs = np.asarray(jax.nn.log_softmax(logits[0, 0]))
      total += float(logs[tokens[i + 1]])
      greedy &= int(logs.argmax()) == tokens[i + 1]
  return total, greedy


class ScoreTest(parameterized.TestCase):
  def assert_scores(self, found, wanted, atol=1e-4):
    logs = [score.log_likelihood for score in found]
    np.testing.assert_allclose(logs, [w[0] for w in wanted], 0, atol)
    self.assertEqual(
      [score.is_greedy for score in found], [w[1] for w in wanted]
    )

  @parameterized.named_parameters(*_MODELS)
  def test_equals_decoding_token_by_token(self, config):
    requests = [request(5, 9), request(1, 3), request(20, 12)]
    self.assert_scores(
      make_score(config)(requests), [reference(config, r) for r in requests]
    )

  @parameterized.named_parameters(*_MODELS)
  def test_chain_rule(self, config):
    x, y, z = np.split(np.concatenate(request(20, 13)), [12, 25])
    both, first, second = make_score(config)(
      [
        scoring.Request(x, np.concatenate([y, z])),
        scoring.Request(x, y),
        scoring.Request(np.concatenate([x, y]), z),
      ]
    )
    self.assertAlmostEqual(
      both.log_likelihood,
      first.log_likelihood + second.log_likelihood,
      delta=1e-4,
    )
    self.assertLess(both.log_likelihood, first.log_likelihood - 1)

  @parameterized.named_parameters(*_MODELS)
  def test_neither_batch_nor_order_nor_padding_matters(self, config):
    score = make_score(config)
    lengths = [(3, 4), (20, 12), (1, 1), (10, 20), (30, 2), (2, 9), (8, 8)]
    requests = [request(*x, seed=i) for i, x in enumerate(lengths)]
    wanted = [score([request])[0] for request in requests]
    order = np.random.default_rng(0).permutation(len(requests))
    found = score([requests[i] for i in order])
    self.assert_scores(found, [wanted[i] for i in order])

  def assert_reads_on(self, config):
    """A recurrent model reads more than model.max_length, and all of it."""
    requests = [request(60, 20), request(2, 9), request(28, 3)]
    with self.assertNoLogs(logging.get_absl_logger(), 'WARNING'):
      found = make_score(config)(requests)
    self.assert_scores(found, [reference(config, r) for r in requests])
    tail = scoring.Request(requests[0][0][-10:], requests[0][1])
    (forgetful,) = make_score(config)([tail])
    self.assertNotAlmostEqual(forgetful[0], found[0][0], delta=1e-3)

  def test_titans_reads_more_than_its_max_length(self):
    self.assert_reads_on(_TITANS)

  @pytest.mark.slow
  def test_hope_reads_more_than_its_max_length(self):
    self.assert_reads_on(_HOPE)

  def test_pieces_of_any_length_are_the_same(self):
    requests = [request(60, 20), request(2, 9)]
    whole = make_score(_TITANS)(requests)
    self.assert_scores(make_score(_TITANS, max_length=7)(requests), whole)

  def test_warns_of_texts_longer_than_attention_holds(self):
    requests = [request(70, 9), request(3, 3), request(30, 5)]
    with self.assertLogs(logging.get_absl_logger(), 'WARNING') as logs:
      found = make_score(_ATTENTION)(requests)
    self.assertLen(logs.output, 1)
    self.assertIn('2 of 3 texts are longer than the 32', logs.output[0])
    # 32 tokens are read to predict the last, of which others are predicted.
    tails = [
      scoring.Request(context[-(33 - len(rest)) :], rest)
      for context, rest in requests
    ]
    self.assert_scores(found, [reference(_ATTENTION, r) for r in tails])

  def test_a_long_text_is_the_sum_of_its_windows(self):
    text = request(1, 75)
    (found,) = make_score(_ATTENTION)([text])
    tokens = np.concatenate(text)
    wanted = sum(
      reference(_ATTENTION, scoring.Request(tokens[a:b], tokens[b:c]))[0]
      for a, b, c in ((0, 1, 33), (32, 33, 65), (43, 65, 76))
    )
    self.assertAlmostEqual(found.log_likelihood, wanted, delta=1e-3)

  def test_the_text_of_a_recurrent_model_is_one_stream(self):
    text = request(1, 75)
    (found,) = make_score(_TITANS)([text])
    tokens = np.concatenate(text)
    parts = make_score(_TITANS)(
      [
        scoring.Request(tokens[:a], tokens[a:b])
        for a, b in ((1, 33), (33, 65), (65, 76))
      ]
    )
    wanted = sum(part.log_likelihood for part in parts)
    self.assertAlmostEqual(found.log_likelihood, wanted, delta=1e-3)

  def test_windows(self):
    text = scoring.Request(np.array([-1]), np.arange(10))
    windows = scoring.make_windows(7, text, 4)
    self.assertEqual(
      [(w.index, w.tokens.tolist(), w.num_scored) for w in windows],
      [
        (7, [-1, 0, 1, 2, 3], 4),
        (7, [3, 4, 5, 6, 7], 4),
        (7, [5, 6, 7, 8, 9], 2),
      ],
    )
    ((_, tokens, num_scored),) = scoring.make_windows(0, text, None)
    self.assertEqual((len(tokens), num_scored), (11, 10))

  @pytest.mark.slow
  def test_a_model_that_learns_scores_as_its_session_reads(self):
    self.enterContext(compiling.quickly())
    inner = levels.make_inner((4, 4), learning_rate=0.5, objective='dot')
    params, asked = init_params(_ATTENTION), request(1, 19)
    score = scoring.make_score(models.make_model(_ATTENTION, inner))
    session = inference.Session(models.make_model(_ATTENTION), params, inner)
    losses = session.feed(np.concatenate(asked))
    (found,) = score(params, [asked])
    self.assertAlmostEqual(found.log_likelihood, -np.nansum(losses), delta=1e-3)
    (plain,) = make_score(_ATTENTION)([asked])
    self.assertNotAlmostEqual(
      found.log_likelihood, plain.log_likelihood, delta=0.1
    )

  def test_empty_continuation_has_log_likelihood_zero(self):
    score = make_score(_ATTENTION)
    self.assertEqual(score([request(5, 0)]), [scoring.Score(0.0, True)])
    self.assertEqual(score([]), [])

  def test_greedy_is_the_likeliest_of_the_vocabulary(self):
    prompt = request(1, 0).context
    model, params = models.make_model(_ATTENTION), init_params(_ATTENTION)
    logits, _ = make_step(_ATTENTION)(
      params, model.init_state(params, 1), prompt[None]
    )
    last = np.asarray(logits[0, 0])
    best = int(last.argmax())
    score = make_score(_ATTENTION)
    other = int(last.argmin())
    self.assertEqual(
      [
        s.is_greedy
        for s in score(
          [scoring.Request(prompt, np.array([t])) for t in (best, other)]
        )
      ],
      [True, False],
    )
    below = int(last[:best].argmax())
    (found,) = make_score(_ATTENTION, vocab_size=best)(
      [scoring.Request(prompt, np.array([below]))]
    )
    self.assertTrue(found.is_greedy)

  def test_examples_of_the_readme_run(self):
    page = pathlib.Path(evaluation.__file__).with_name('README.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    output = io.StringIO()
    with compiling.quickly(), contextlib.redirect_stdout(output):
      exec('\n'.join(blocks), {})
    self.assertLen(re.findall('-[0-9.]+ (True|False)', output.getvalue()), 2)

  def test_rows_over_devices(self):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, model=2))
    model = models.make_model(_ATTENTION)
    params = jax.device_put(
      init_params(_ATTENTION), sharding.param_shardings(model.table, mesh)
    )
    requests = [request(20, 5, seed=i) for i in range(5)]
    with jax.set_mesh(mesh):
      score = scoring.make_score(model, batch_size=3, mesh=mesh)
      found = score(params, requests)
    self.assert_scores(found, make_score(_ATTENTION)(requests))

  def test_refuses_settings_out_of_range(self):
    with self.assertRaisesRegex(errors.UserError, 'batch_size=0'):
      make_score(_ATTENTION, batch_size=0)
    with self.assertRaisesRegex(errors.UserError, 'max_length=33'):
      make_score(_ATTENTION, max_length=33)
    with self.assertRaisesRegex(errors.UserError, 'tokenizer has 261 tokens'):
      make_score(_ATTENTION, vocab_size=261)

  @parameterized.parameters(260, -1)
  def test_refuses_tokens_that_the_model_does_not_have(self, token):
    text = scoring.Request(np.array([1]), np.array([token]))
    with self.assertRaisesRegex(errors.UserError, f'token {token} is not one'):
      make_score(_ATTENTION)([text])


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
    request = scoring.encode_pair(_BYTES, context, continuation)
    self.assertEqual(request.context[0], _BYTES.document_id)
    self.assertEqual(_BYTES.decode(request.context), before)
    self.assertEqual(_BYTES.decode(request.continuation), after)

  def test_a_token_across_the_border_is_of_the_continuation(self):
    tokenizer = pairs_tokenizer()
    request = scoring.encode_pair(tokenizer, 'abc', 'de')
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
      request = scoring.encode_pair(tokenizer, context, 'sat')
      whole = tokenizer.encode(context + 'sat')
      np.testing.assert_array_equal(
        np.concatenate(request), [tokenizer.document_id, *whole]
      )
    request = scoring.encode_pair(tokenizer, 'the cat', ' sat')
    np.testing.assert_array_equal(
      request.context[1:], tokenizer.encode('the cat')
    )


class LayoutTest(parameterized.TestCase):
  def test_limits(self):
    limits = scoring.read_limits(tiny.MODEL)
    self.assertEqual(limits, scoring.Limits(128, 128))
    self.assertEqual(
      scoring.read_limits(tiny.MODEL, 16), scoring.Limits(16, 16)
    )
    titans = dataclasses.replace(
      tiny.MODEL,
      mixer=layers.MemoryMixerConfig(num_heads=2, head_dim=8),
    )
    self.assertEqual(scoring.read_limits(titans, 16), scoring.Limits(16, None))

  @parameterized.parameters(0, 129)
  def test_refuses_lengths_out_of_range(self, length):
    with self.assertRaisesRegex(
      errors.UserError, f'max_length={length} .* model.max_length=128'
    ):
      scoring.read_limits(tiny.MODEL, length)

  def test_refuses_batches_without_rows(self):
    with self.assertRaisesRegex(errors.UserError, 'batch_size=0'):
      scoring.num_rows(0, None)

  def test_batches_hold_each_place_once_longest_first(self):
    lengths = [3, 9, 1, 9, 5]
    batches = list(scoring.batches(lengths, 2))
    self.assertEqual(batches, [(1, 3), (4, 0), (2,)])

  @parameterized.parameters(
    (1, 32), (32, 32), (33, 64), (100, 100), (101, 132), (199, 200), (200, 200)
  )
  def test_pads_to_few_lengths(self, length, padded):
    rows = [np.arange(length), np.arange(1)]
    found = scoring.pad(rows, 3, piece=100)
    self.assertEqual(found.shape, (3, padded))
    np.testing.assert_array_equal(found[0, :length], rows[0])
    self.assertTrue(np.all(found[0, length:] == -1))
    self.assertTrue(np.all(found[2] == -1))
