import dataclasses
import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import inference
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from tests import compiling
from tests.training import tiny

_TITANS = dataclasses.replace(
  tiny.MODEL,
  mixer=layers.MemoryMixerConfig(
    num_heads=2, head_dim=8, kind='matrix', adaptive=(), chunk_size=4
  ),
)
# Chunks end in the prompt, and in the tokens that are drawn after it.
_HOPE = dataclasses.replace(
  tiny.MODEL,
  num_layers=2,
  mixer=layers.MemoryMixerConfig(
    num_heads=2, head_dim=8, chunk_size=4, chunk_size_others=5, max_norm=0.2
  ),
)
_MIXERS = (('attention', tiny.MODEL), ('titans', _TITANS), ('hope', _HOPE))


@functools.cache
def init_params(config):
  params = jax.jit(models.make_model(config).init_params)(jax.random.key(1))
  # Sharper than at initialisation, so that the choice is never a tie.
  return params | {'embedding': params['embedding'] * 4}


class GenerateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(compiling.quickly())

  def make(self, config, **settings):
    model = models.make_model(config)
    generate = inference.make_generate(model, **settings)
    return model, init_params(config), generate

  def prompt(self, *shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, 256)

  @parameterized.named_parameters(*_MIXERS)
  def test_greedy_is_the_argmax_of_one_forward(self, config):
    model, params, generate = self.make(config, num_tokens=6, temperature=0)
    prompt = self.prompt(2, 7)
    tokens = generate(params, prompt, jax.random.key(0)).tokens
    whole = jnp.concatenate([prompt, tokens], axis=1)
    logits, _ = jax.jit(model.forward)(params, None, whole)
    np.testing.assert_array_equal(tokens, jnp.argmax(logits[:, 6:-1], axis=-1))

  @parameterized.named_parameters(*_MIXERS)
  def test_prompts_of_different_lengths(self, config):
    _, params, generate = self.make(config, num_tokens=5, temperature=0)
    long, short = self.prompt(1, 6), self.prompt(1, 4, seed=1)
    key = jax.random.key(0)
    alone = generate(params, short, key).tokens[0]
    padding = jnp.full((1, 2), 77)
    real, no = jnp.ones((1, 4), bool), jnp.zeros((1, 2), bool)
    for padded, mask in (
      ((short, padding), (real, no)),
      ((padding, short), (no, real)),
    ):
      prompts = jnp.concatenate([long, jnp.concatenate(padded, axis=1)])
      masks = jnp.concatenate(
        [jnp.ones((1, 6), bool), jnp.concatenate(mask, axis=1)]
      )
      together = generate(params, prompts, key, masks).tokens
      np.testing.assert_array_equal(together[1], alone)

  def test_seeds_reproduce(self):
    _, params, generate = self.make(tiny.MODEL, num_tokens=12, temperature=50)
    draw = lambda seed: generate(
      params, self.prompt(1, 3), jax.random.key(seed)
    ).tokens.tolist()
    self.assertEqual(draw(0), draw(0))
    self.assertNotEqual(draw(0), draw(1))

  def test_stops_at_the_stop_token(self):
    _, params, free = self.make(tiny.MODEL, num_tokens=8, temperature=0)
    prompt = self.prompt(2, 3)
    expected = np.asarray(free(params, prompt, jax.random.key(0)).tokens)
    stop = int(expected[0, 4])
    first = [row.tolist().index(stop) if stop in row else 8 for row in expected]
    _, _, generate = self.make(
      tiny.MODEL, num_tokens=8, temperature=0, stop_token=stop
    )
    tokens, lengths = generate(params, prompt, jax.random.key(0))
    self.assertEqual(lengths.tolist(), first)
    for row, wanted, length in zip(tokens, expected, first, strict=True):
      np.testing.assert_array_equal(row[:length], wanted[:length])
      self.assertTrue(np.all(row[length:] == stop))

  def test_stops_at_any_of_several_tokens(self):
    _, params, free = self.make(tiny.MODEL, num_tokens=8, temperature=0)
    prompt = self.prompt(2, 3)
    expected = np.asarray(free(params, prompt, jax.random.key(0)).tokens)
    fill, *stops = 259, int(expected[0, 4]), int(expected[1, 2])
    _, _, generate = self.make(
      tiny.MODEL, num_tokens=8, temperature=0, stop_token=(fill, *stops)
    )
    tokens, lengths = generate(params, prompt, jax.random.key(0))
    for row, wanted, length in zip(tokens, expected, lengths, strict=True):
      end = np.flatnonzero(np.isin(wanted, (fill, *stops)))[0]
      self.assertEqual(length, end)
      np.testing.assert_array_equal(row, [*wanted[:end], *[fill] * (8 - end)])

  def test_draws_only_below_vocab_size(self):
    _, params, generate = self.make(tiny.MODEL, num_tokens=64, vocab_size=9)
    tokens = generate(params, self.prompt(2, 3), jax.random.key(0)).tokens
    self.assertLess(int(tokens.max()), 9)

  def test_a_prompt_longer_than_a_call_is_read_in_pieces(self):
    short_calls = dataclasses.replace(_TITANS, max_length=8)
    _, _, in_pieces = self.make(short_calls, num_tokens=2, temperature=0)
    _, params, whole = self.make(_TITANS, num_tokens=2, temperature=0)
    prompt = self.prompt(1, 9)
    np.testing.assert_array_equal(
      in_pieces(params, prompt, jax.random.key(0)).tokens,
      whole(params, prompt, jax.random.key(0)).tokens,
    )

  def test_refuses_prompts_longer_than_the_state(self):
    _, params, generate = self.make(tiny.MODEL, num_tokens=8)
    with self.assertRaisesRegex(
      errors.UserError, 'prompt of 121 tokens .* model.max_length=128'
    ):
      generate(params, self.prompt(1, 121), jax.random.key(0))
    with self.assertRaisesRegex(errors.UserError, 'the prompt is empty'):
      generate(params, self.prompt(1, 0), jax.random.key(0))

  def test_a_long_prompt_is_read_by_one_program(self):
    model = models.make_model(dataclasses.replace(_TITANS, max_length=8))
    calls = []

    def forward(*args, **kwargs):
      calls.append(args[2].shape)
      return model.forward(*args, **kwargs)

    params = init_params(_TITANS)
    counted = model._replace(forward=forward)
    read = inference.make_prompt_reader(counted)
    prompt = np.asarray(self.prompt(2, 61))
    logits, state = read(params, prompt, np.ones((2, 61), bool))
    self.assertEqual(calls, [(2, 8)])  # traced once, called eight times
    whole = models.make_model(dataclasses.replace(_TITANS, max_length=64))
    expected, expected_state = jax.jit(whole.forward)(params, None, prompt)
    np.testing.assert_allclose(logits, expected[:, -1], rtol=1e-4, atol=1e-4)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
      state,
      expected_state,
    )
    read(params, prompt[:, :49], np.ones((2, 49), bool))
    self.assertLen(calls, 1)

  def test_a_row_draws_the_same_in_any_batch(self):
    _, params, generate = self.make(tiny.MODEL, num_tokens=8, temperature=5)
    prompt, key = self.prompt(3, 4), jax.random.key(3)
    together = generate(params, prompt, key).tokens
    alone = generate(params, prompt[:1], key).tokens
    np.testing.assert_array_equal(together[0], alone[0])

  def test_a_model_that_learns_generates_as_its_session_does(self):
    inner = levels.make_inner((4,) * 2, learning_rate=0.5, objective='dot')
    params, prompt = init_params(tiny.MODEL), self.prompt(2, 13)
    session = inference.Session(
      models.make_model(tiny.MODEL), params, inner, num_rows=2
    )
    learner = models.make_model(tiny.MODEL, inner)
    generate = inference.make_generate(learner, num_tokens=9, temperature=0.5)
    generated = generate(params, prompt, jax.random.key(3)).tokens
    # Longer than a segment: no level learns from what the model writes.
    expected = session.generate(
      9, prompt=prompt, key=jax.random.key(3), temperature=0.5
    )
    np.testing.assert_array_equal(generated, expected.tokens)

  @parameterized.parameters(
    ([[1, 999]], 'token 999 is not one of the'),
    ([[1, -1]], 'token -1 is not one of the'),
    ([[0.5]], 'tokens are float'),
    ([1, 2], r'prompt has shape \(2,\)'),
  )
  def test_refuses_tokens_that_the_model_does_not_have(self, prompt, message):
    generate = inference.make_generate(
      models.make_model(tiny.MODEL), num_tokens=2
    )
    with self.assertRaisesRegex(errors.UserError, message):
      generate(None, np.array(prompt), jax.random.key(0))

  def test_takes_parameters_in_numpy(self):
    _, params, generate = self.make(tiny.MODEL, num_tokens=3, temperature=0)
    prompt, key = self.prompt(1, 3), jax.random.key(0)
    np.testing.assert_array_equal(
      generate(jax.tree.map(np.asarray, params), prompt, key).tokens,
      generate(params, prompt, key).tokens,
    )

  @parameterized.parameters(
    ({'num_tokens': 0}, 'num_tokens=0 must be at least 1'),
    ({'temperature': float('nan')}, 'temperature=nan must be a number'),
    ({'top_k': 0}, 'top_k=0 must be at least 1'),
    ({'stop_token': 999}, 'stop_token=999 is not one of the'),
    ({'vocab_size': 9999}, 'vocab_size=9999 must be at least 1 and at most'),
  )
  def test_refuses_arguments_out_of_range(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      inference.make_generate(
        models.make_model(tiny.MODEL), **{'num_tokens': 1, **changes}
      )

  @parameterized.parameters(
    ({'num_tokens': 0}, 'num_tokens=0 must be at least 1'),
    ({'temperature': -1.0}, 'temperature=-1.0 must be a number from 0'),
    ({'temperature': float('nan')}, 'temperature=nan must be a number from 0'),
    ({'temperature': float('inf')}, 'temperature=inf must be a number from 0'),
    ({'top_k': 0}, 'top_k=0 must be at least 1'),
    ({'top_p': 0.0}, 'top_p=0.0 must be above 0'),
    ({'top_p': 2.0}, 'top_p=2.0 must be above 0'),
    ({'seed': -1}, 'seed=-1 must be at least 0'),
    ({'seed': 10**20}, 'seed=1000.* must be at least 0'),
    ({'prompt': '\udcff'}, 'is not UTF-8 text'),
  )
  def test_refuses_settings_out_of_range(self, fields, message):
    with self.assertRaisesRegex(errors.UserError, message):
      inference.GenerateConfig(**fields)
