"""Tests that every family of the zoo keeps the contract of a model.

Windows, segments and chunks have a few tokens, so that a short stream crosses
their borders. The tests run in float64, since a float32 memory loses digits
with every write and hides mistakes.
"""

import dataclasses
import functools
import pathlib

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_learning import models
from nested_learning import parameters
from tests import compiling

# 22 tokens end inside a chunk. There, a state may keep unused values of the
# chunk before, which depend on how the calls were split.
_BATCH, _LENGTH, _VOCAB, _CHUNK, _WINDOW = 2, 22, 17, 8, 5
_WHOLE = 2 * _CHUNK  # tokens of the gradient's row
_SHORT = {
  'chunk_size': _CHUNK,
  'chunk_size_others': _CHUNK // 2,
  'window': _WINDOW,
  'shard_size': _CHUNK,
}
# One family of each kind: memories, attention, both. All others are tested in
# the same ways by the slow tests.
_EVERY_DAY = ('hope', 'hope_attention', 'gated_deltanet', 'tnt', 'titans_mac')
_OTHERS = tuple(f for f in models.zoo.FAMILIES if f not in _EVERY_DAY)


def shorten(mixer):
  """Returns the mixer with short chunks and windows."""
  if isinstance(mixer, tuple):
    return tuple(map(shorten, mixer))
  changes = {}
  for field in dataclasses.fields(mixer):
    value = getattr(mixer, field.name)
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
      changes[field.name] = shorten(value)
    elif dataclasses.is_dataclass(value):
      changes[field.name] = shorten(value)
    elif field.name in _SHORT and value is not None:
      changes[field.name] = _SHORT[field.name]
  return dataclasses.replace(mixer, **changes)


class Stream:
  """A model with compiled calls that count how often they were traced."""

  def __init__(self, family):
    config = models.zoo.make_config(
      f'{family}_tiny',
      vocab_size=_VOCAB,
      max_length=_LENGTH,
      dtype='float64',
    )
    self.model = models.make_model(
      dataclasses.replace(config, mixer=shorten(config.mixer))
    )
    self.traced = []
    self.forward = compiling.jit(self._forward)
    params = compiling.jit(self.model.init_params)(jax.random.key(0))
    self.params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    self.start = self.model.init_state(self.params, _BATCH)
    rng = np.random.default_rng(0)
    shape = (_BATCH, _LENGTH)
    self.tokens = rng.integers(_VOCAB, size=shape).astype(np.int32)
    self.reset = rng.uniform(size=shape) < 0.1
    self.none, self.all = np.zeros(shape, bool), np.ones(shape, bool)

  def _forward(self, state, tokens, reset, mask):
    self.traced.append(tokens.shape)
    return self.model.forward(
      self.params, state, tokens, reset=reset, mask=mask
    )

  @functools.cached_property
  def whole(self):
    """Returns logits of all tokens and the state after them."""
    return self.forward(self.start, self.tokens, self.reset, self.all)

  def gradient(self):
    """Returns gradients of the loss of whole chunks, and their logits."""
    tokens = self.tokens[:, :_WHOLE]

    def loss(params):
      logits, _ = self.model.forward(params, None, tokens)
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
      )
      return jnp.mean(losses), logits

    return compiling.jit(jax.grad(loss, has_aux=True))(self.params)


def assert_close(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
    actual,
    expected,
  )


def described(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


class _Contract(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  def check(self, family):
    stream = Stream(family)
    for check in (
      self.check_shapes_and_types,
      self.check_causal,
      self.check_a_document_is_alone,
      self.check_reset_is_a_start,
      self.check_padding_is_nothing,
      self.check_any_split,
      self.check_token_by_token,
      self.check_gradients,
    ):
      with self.subTest(check.__name__):
        check(stream)
    with self.subTest('one compilation per shape'):
      self.assertLen(stream.traced, 2)

  def check_shapes_and_types(self, stream):
    logits, state = stream.whole
    self.assertEqual(logits.shape, (_BATCH, _LENGTH, _VOCAB))
    self.assertEqual(logits.dtype, jnp.float64)
    # Users train with bfloat16 projections around a float32 state.
    config = dataclasses.replace(stream.model.config, dtype='bfloat16')
    model = models.make_model(config)
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), stream.params
    )
    logits, _ = jax.eval_shape(model.forward, params, None, stream.tokens)
    self.assertEqual(logits.dtype, jnp.float32)
    self.assertEqual(described(state), described(stream.start))

  def check_causal(self, stream):
    run = lambda tokens: stream.forward(
      stream.start, tokens, stream.none, stream.all
    )[0]
    before = run(stream.tokens)
    for t in (2, 9):  # in the first chunk and in the second
      tokens = stream.tokens.copy()
      tokens[:, t] = (tokens[:, t] + 1) % _VOCAB
      after = run(tokens)
      np.testing.assert_array_equal(after[:, :t], before[:, :t])
      differs = np.abs(after - before).max(axis=(0, 2))
      self.assertTrue(np.all(differs[t : t + _WINDOW] > 0))

  def check_a_document_is_alone(self, stream):
    reset = stream.none.copy()
    reset[:, 10] = True
    tokens = stream.tokens.copy()
    tokens[:, :10] = tokens[:, :10][:, ::-1]
    run = lambda tokens: stream.forward(
      stream.start, tokens, reset, stream.all
    )[0]
    np.testing.assert_array_equal(
      run(tokens)[:, 10:], run(stream.tokens)[:, 10:]
    )

  def check_reset_is_a_start(self, stream):
    # Chunks are counted from a stream's start, so the document begins with one.
    reset = stream.none.copy()
    reset[:, _CHUNK] = True
    later = np.arange(_LENGTH) >= _CHUNK
    after, _ = stream.forward(stream.start, stream.tokens, reset, stream.all)
    fresh, _ = stream.forward(
      stream.start, stream.tokens, stream.none, stream.all & later
    )
    assert_close(after[:, _CHUNK:], fresh[:, _CHUNK:])

  def check_padding_is_nothing(self, stream):
    _, state = stream.whole
    _, after = stream.forward(state, stream.tokens, stream.reset, stream.none)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    mask = np.random.default_rng(2).uniform(size=stream.all.shape) < 0.6
    tokens = np.where(mask, stream.tokens, 0)
    one, _ = stream.forward(state, stream.tokens, stream.reset, mask)
    two, _ = stream.forward(state, tokens, stream.reset, mask)
    np.testing.assert_array_equal(one[mask], two[mask])

  def check_any_split(self, stream):
    # Calls are masks of one shape, each row split at its own places.
    rng = np.random.default_rng(1)
    for num_calls in (2, 5):
      call = np.sort(rng.integers(num_calls, size=stream.all.shape), axis=1)
      state, total = stream.start, 0.0
      for i in range(num_calls):
        out, state = stream.forward(
          state, stream.tokens, stream.reset, call == i
        )
        total += np.where((call == i)[..., None], out, 0.0)
      assert_close((total, state), stream.whole)

  def check_token_by_token(self, stream):
    state, pieces = stream.start, []
    for t in range(_LENGTH):
      one = slice(t, t + 1)
      out, state = stream.forward(
        state, stream.tokens[:, one], stream.reset[:, one], stream.all[:, one]
      )
      pieces.append(out)
    assert_close((np.concatenate(pieces, axis=1), state), stream.whole)

  def check_gradients(self, stream):
    grads, logits = stream.gradient()
    marked, _ = stream.forward(
      stream.start, stream.tokens, stream.none, stream.all
    )
    assert_close(logits, marked[:, :_WHOLE])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
      name = parameters.path_name(path)
      self.assertTrue(np.all(np.isfinite(grad)), name)
      layers = grad if name.startswith('blocks') else grad[None]
      for layer in layers:
        self.assertGreater(np.abs(layer).max(), 0.0, name)


def make_streams(num_tokens):
  """Makes rows of one token, two in turn, random tokens and text, [4, t]."""
  rng = np.random.default_rng(0)
  text = pathlib.Path(dataclasses.__file__).read_bytes()[:num_tokens]
  rows = (
    np.full(num_tokens, 7),
    7 + np.arange(num_tokens) % 2,
    rng.integers(256, size=num_tokens),
    np.frombuffer(text, np.uint8),
  )
  return np.stack(rows).astype(np.int32)


class ContractTest(_Contract):
  @parameterized.parameters(*_EVERY_DAY)
  def test_contract(self, family):
    self.check(family)


# A mark of a parameterised test is lost; that of a class is not.
@pytest.mark.slow
class ContractOfTheOthersTest(_Contract):
  @parameterized.parameters(*_OTHERS)
  def test_contract(self, family):
    self.check(family)


class _LongStream(parameterized.TestCase):
  """Untrained models stay finite on rows of many chunks.

  Weights times 4 and 16 stand for weights that training may lead to.
  """

  def check(self, family, num_tokens, dtype):
    # The pattern of mixers is as long as the model has layers.
    config = models.zoo.make_config(
      f'{family}_tiny', dtype=dtype, max_length=num_tokens
    )
    pattern = isinstance(config.mixer, tuple)
    config = dataclasses.replace(
      config, num_layers=len(config.mixer) if pattern else 1
    )
    model = models.make_model(config)

    @compiling.jit
    def all_finite(scale, tokens):
      params = model.init_params(jax.random.key(0))
      params = jax.tree.map(lambda x: (x * scale).astype(x.dtype), params)
      logits, _ = model.forward(params, None, tokens)
      return jnp.all(jnp.isfinite(logits), axis=(1, 2))  # [b]

    rows = make_streams(num_tokens)
    # Attention to thousands of tokens needs the memory of one row at a time.
    groups = rows[None] if num_tokens <= 512 else rows[:, None]
    for scale in (1.0, 4.0, 16.0):
      finite = [all_finite(scale, group) for group in groups]
      self.assertEqual(
        np.concatenate(finite).tolist(), [True] * 4, f'weights times {scale}'
      )


class LongStreamTest(_LongStream):
  @parameterized.parameters(*_EVERY_DAY)
  def test_finite(self, family):
    self.check(family, 320, 'float32')


@pytest.mark.slow
class VeryLongStreamTest(_LongStream):
  @parameterized.product(
    family=tuple(models.zoo.FAMILIES), dtype=('float32', 'bfloat16')
  )
  def test_finite_over_8192_tokens(self, family, dtype):
    self.check(family, 8192, dtype)
