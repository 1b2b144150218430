import dataclasses
import functools

from absl import logging
from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import models
from nested_learning import sharding
from nested_learning.evaluation import requests as requests_lib
from nested_learning.evaluation import scoring
from tests.training import tiny

_ATTENTION = dataclasses.replace(tiny.MODEL, max_length=64)
_TITANS = dataclasses.replace(
  _ATTENTION,
  mixer=layers.SelfModifyingTitansConfig(
    num_heads=2, head_dim=8, kind='matrix', adaptive=(), chunk_size=4
  ),
)
_HOPE = dataclasses.replace(
  _ATTENTION,
  mixer=layers.SelfModifyingTitansConfig(
    num_heads=2, head_dim=8, chunk_size=4, chunk_size_others=4
  ),
)
_MODELS = (('attention', _ATTENTION), ('titans', _TITANS))


@functools.cache
def init_params(config):
  params = jax.jit(models.make_model(config).init_params)(jax.random.key(1))
  # Sharper than at initialisation, so that every token counts.
  return params | {'embedding': params['embedding'] * 4}


@functools.cache
def make_score(config, **settings):
  score = scoring.make_score(models.make_model(config), **settings)
  return functools.partial(score, init_params(config))


def request(num_context, num_continuation, seed=0):
  random = np.random.default_rng(seed)
  tokens = random.integers(0, 256, num_context + num_continuation, np.int32)
  return requests_lib.Request(tokens[:num_context], tokens[num_context:])


def reference(config, request):
  """One forward over the whole, alone and without padding."""
  tokens = np.concatenate(request)
  model = models.make_model(config)
  logits, _ = model.forward(init_params(config), None, tokens[None, :-1])
  logs = jax.nn.log_softmax(logits[0], axis=-1)
  rows = np.arange(len(request.context) - 1, len(tokens) - 1)
  found = logs[rows, request.continuation]
  greedy = jnp.argmax(logs[rows], axis=-1) == request.continuation
  return float(found.sum()), bool(greedy.all())


class ScoreTest(parameterized.TestCase):
  def assert_scores(self, found, wanted, atol=1e-4):
    logs = [score.log_likelihood for score in found]
    np.testing.assert_allclose(logs, [w[0] for w in wanted], 0, atol)
    self.assertEqual(
      [score.is_greedy for score in found], [w[1] for w in wanted]
    )

  @parameterized.named_parameters(*_MODELS)
  def test_equals_the_plain_forward(self, config):
    requests = [request(5, 9), request(1, 3), request(40, 25)]
    self.assert_scores(
      make_score(config, batch_size=2)(requests),
      [reference(config, r) for r in requests],
    )

  @parameterized.named_parameters(*_MODELS)
  def test_chain_rule(self, config):
    x, y, z = np.split(np.concatenate(request(30, 34)), [20, 33])
    yz = np.concatenate([y, z])
    both, first, second = make_score(config, batch_size=2)(
      [
        requests_lib.Request(x, yz),
        requests_lib.Request(x, y),
        requests_lib.Request(np.concatenate([x, y]), z),
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
    lengths = [(3, 4), (40, 20), (1, 1), (10, 30), (33, 2), (2, 9), (20, 20)]
    requests = [request(*x, seed=i) for i, x in enumerate(lengths)]
    wanted = make_score(config, batch_size=1)(requests)
    order = np.random.default_rng(0).permutation(len(requests))
    found = make_score(config, batch_size=2)([requests[i] for i in order])
    self.assert_scores(found, [wanted[i] for i in order])

  @parameterized.named_parameters(
    ('titans', _TITANS, (8, 20)), ('hope', _HOPE, (24,))
  )
  def test_pieces_and_token_by_token_equal_the_whole(self, config, pieces):
    requests = [request(30, 27), request(2, 9, seed=1), request(50, 14, seed=2)]
    whole = make_score(config, batch_size=3)(requests)
    for piece in pieces:
      found = make_score(config, batch_size=3, max_length=piece)(requests)
      self.assert_scores(found, whole)
    tokens = np.concatenate(requests[0])
    model = models.make_model(config)
    step = jax.jit(model.forward)
    params = init_params(config)
    state, total = model.init_state(params, 1), 0.0
    for i, token in enumerate(tokens[:-1]):
      logits, state = step(params, state, token[None, None])
      if i >= len(requests[0].context) - 1:
        total += jax.nn.log_softmax(logits[0, 0])[tokens[i + 1]]
    self.assertAlmostEqual(total, whole[0].log_likelihood, delta=1e-4)

  def test_a_recurrent_model_reads_more_than_its_max_length(self):
    long = request(150, 20)
    longer_calls = dataclasses.replace(_TITANS, max_length=256)
    wanted = reference(longer_calls, long)
    with self.assertNoLogs(logging.get_absl_logger(), 'WARNING'):
      found = make_score(_TITANS, batch_size=2)([long])
    self.assert_scores(found, [wanted])
    forgetful = make_score(_TITANS, batch_size=2)(
      [requests_lib.Request(long.context[-44:], long.continuation)]
    )
    self.assertNotAlmostEqual(forgetful[0][0], wanted[0], delta=1e-3)

  def test_attention_reads_what_it_holds_and_says_so(self):
    score = make_score(_ATTENTION, batch_size=2)
    requests = [request(150, 20), request(3, 3), request(80, 5)]
    with self.assertLogs(logging.get_absl_logger(), 'WARNING') as logs:
      found = score(requests)
    self.assertLen(logs.output, 1)
    self.assertIn('2 of 3 texts are longer than the 64', logs.output[0])
    # 64 tokens are read to predict the last; the first 20 are continued.
    tails = [
      requests_lib.Request(r.context[-(65 - len(r.continuation)) :], r[1])
      for r in requests
    ]
    self.assert_scores(found, [reference(_ATTENTION, r) for r in tails])

  def test_a_long_text_is_the_sum_of_its_windows(self):
    text = request(1, 150)
    (found,) = make_score(_ATTENTION, batch_size=2)([text])
    tokens = np.concatenate(text)
    wanted = sum(
      reference(_ATTENTION, requests_lib.Request(tokens[a:b], tokens[b:c]))[0]
      for a, b, c in ((0, 1, 65), (64, 65, 129), (86, 129, 151))
    )
    self.assertAlmostEqual(found.log_likelihood, wanted, delta=1e-3)

  def test_windows(self):
    text = requests_lib.Request(np.array([-1]), np.arange(10))
    windows = scoring.cut(7, text, 4)
    self.assertEqual(
      [(w.index, w.tokens.tolist(), w.num_scored) for w in windows],
      [
        (7, [-1, 0, 1, 2, 3], 4),
        (7, [3, 4, 5, 6, 7], 4),
        (7, [5, 6, 7, 8, 9], 2),
      ],
    )
    ((_, tokens, num_scored),) = scoring.cut(0, text, None)
    self.assertEqual((len(tokens), num_scored), (11, 10))

  def test_nothing_is_certain(self):
    score = make_score(_ATTENTION, batch_size=2)
    self.assertEqual(score([request(5, 0)]), [scoring.Score(0.0, True)])
    self.assertEqual(score([]), [])

  def test_greedy_is_the_likeliest_of_the_vocabulary(self):
    prompt = request(6, 0).context
    model = models.make_model(_ATTENTION)
    logits, _ = model.forward(init_params(_ATTENTION), None, prompt[None])
    last = np.asarray(logits[0, -1])
    best = int(last.argmax())
    score = make_score(_ATTENTION, batch_size=2)
    other = int(last.argmin())
    self.assertEqual(
      [
        s.is_greedy
        for s in score(
          [requests_lib.Request(prompt, np.array([t])) for t in (best, other)]
        )
      ],
      [True, False],
    )
    below = int(last[:best].argmax())
    (found,) = make_score(_ATTENTION, batch_size=2, vocab_size=best)(
      [requests_lib.Request(prompt, np.array([below]))]
    )
    self.assertTrue(found.is_greedy)

  def test_rows_over_devices(self):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, model=2))
    model = models.make_model(_ATTENTION)
    params = jax.device_put(
      init_params(_ATTENTION), sharding.param_shardings(model.table, mesh)
    )
    requests = [request(30, 5, seed=i) for i in range(5)]
    with jax.set_mesh(mesh):
      score = scoring.make_score(model, batch_size=3, mesh=mesh)
      found = score(params, requests)
    self.assert_scores(found, make_score(_ATTENTION, batch_size=2)(requests))

  def test_refuses_settings_out_of_range(self):
    with self.assertRaisesRegex(errors.UserError, 'batch_size=0'):
      make_score(_ATTENTION, batch_size=0)
    with self.assertRaisesRegex(errors.UserError, 'max_length=65'):
      make_score(_ATTENTION, max_length=65)


if __name__ == '__main__':
  absltest.main()
