"""Tests of local losses of levels, against loops in NumPy."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning.layers import cms
from nested_learning.layers import local_losses
from tests import compiling

_EMBED, _HIDDEN, _VOCAB, _LAYERS = 6, 5, 7, 3
_FAST, _SLOW, _LENGTH = 4, 8, 16  # tokens
_NAMES = ('fast', 'slow')
_RATE = 0.3
_CONFIG = models.ModelConfig(
  vocab_size=_VOCAB,
  num_layers=_LAYERS,
  embed_dim=_EMBED,
  mixer=layers.AttentionConfig(1, 1, head_dim=4),
  levels=tuple(models.LevelConfig(name, _HIDDEN) for name in _NAMES),
  max_length=_LENGTH,
  dtype='float64',
)


def normalize(x):
  return x / np.sqrt(np.mean(x * x) + 1e-6)


def mlp(params, x):
  """Applies a level to one token [e]; returns intermediates for gradients."""
  normed = normalize(x) * params['norm']
  gate, up = normed @ params['gate'], normed @ params['up']
  sigmoid = 1 / (1 + np.exp(-gate))
  hidden = gate * sigmoid * up
  return hidden @ params['down'], (normed, gate, up, sigmoid, hidden)


def gradient(params, x, error):
  """Returns the gradient of error . output with respect to the weights."""
  _, (normed, gate, up, sigmoid, hidden) = mlp(params, x)
  to_hidden = params['down'] @ error
  to_up = to_hidden * gate * sigmoid
  to_gate = to_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
  to_normed = params['gate'] @ to_gate + params['up'] @ to_up
  return {
    'down': np.outer(hidden, error),
    'up': np.outer(normed, to_up),
    'gate': np.outer(normed, to_gate),
    'norm': normalize(x) * to_normed,
  }


def own_error(objective, output, target):
  return ((output - target) if objective == 'l2' else -target) / _EMBED


def draw(seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(_VOCAB, size=_LENGTH).astype(np.int32)
  return tokens, rng.uniform(size=_LENGTH) < 0.2


def init():
  """Makes float64 parameters with mixers of output zero."""
  params = compiling.jit(models.make_model(_CONFIG).init_params)(
    jax.random.key(0)
  )
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  out = params['blocks']['mixer']['out']
  params['blocks']['mixer']['out'] = np.zeros_like(out)
  return params


def loop(params, tokens, reset, objective, num_last):
  """Reads a row token by token; returns logits and weights."""
  embedding = params['embedding']
  block = lambda i, name: jax.tree.map(
    lambda x: x[i].copy(), params['blocks']['levels'][name]
  )
  weights = {
    (i, name): block(i, name) for i in range(_LAYERS) for name in _NAMES
  }
  learns = [key for key in weights if key[0] >= _LAYERS - num_last]
  zero = lambda key: jax.tree.map(np.zeros_like, weights[key])
  sums, counts = {key: zero(key) for key in learns}, dict.fromkeys(learns, 0)
  logits = []
  for t in range(_LENGTH):
    x = embedding[tokens[t]] * _EMBED**0.5
    judged = (t + 1) % _FAST and not reset[t + 1]
    for i in range(_LAYERS):
      for name in _NAMES:
        output, _ = mlp(weights[i, name], x)
        if judged and (i, name) in sums:
          target = normalize(embedding[tokens[t + 1]] * _EMBED**0.5)
          found = gradient(
            weights[i, name], x, own_error(objective, output, target)
          )
          sums[i, name] = jax.tree.map(np.add, sums[i, name], found)
          counts[i, name] += 1
        x = x + output
    logits.append(normalize(x) * params['norm'] @ embedding.T)
    for key in learns:
      if (t + 1) % {'fast': _FAST, 'slow': _SLOW}[key[1]] == 0:
        weights[key] = jax.tree.map(
          lambda w, g, n=counts[key]: w - _RATE * g / max(n, 1),
          weights[key],
          sums[key],
        )
        sums[key], counts[key] = zero(key), 0
  return np.stack(logits), weights


def learning(**changes):
  settings = {
    'objective': 'l2',
    'depth': 0.5,
    'clip_norm': None,
    'max_drift': 1e6,
    'learning_rate': _RATE,
    **changes,
  }
  inner = levels.make_inner((_FAST, _SLOW), **settings)
  return models.make_model(_CONFIG, inner)


class LocalObjectivesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.product(
    objective=local_losses.OBJECTIVES,
    connection=('sequential', 'independent', 'nested'),
  )
  def test_the_gradient_of_a_chain(self, objective, connection):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda x: rng.normal(size=x[0].shape), init()['blocks']['levels']
    )
    x, target = rng.normal(size=(2, 3, _EMBED)), rng.normal(size=(3, _EMBED))
    counts = np.array([1.0, 0.0, 2.0])
    chain, mix = cms.ChainConfig(connection), np.array([0.5, 2.0])
    local_loss = local_losses.LocalLoss(
      {'slow': local_losses.LocalLevel(objective)},
      jnp.asarray(target[None]),
      jnp.asarray(counts[None]),
    )
    arguments = {'chain': chain, 'mix': jnp.asarray(mix)}
    out, (found, energies) = local_losses.apply_with_gradients(
      _CONFIG.levels, params, jnp.asarray(x), local_loss, **arguments
    )
    np.testing.assert_array_equal(
      out, cms.apply(_CONFIG.levels, params, jnp.asarray(x), **arguments)
    )
    self.assertEqual(list(found), ['slow'])
    self.assertEqual(energies, {})
    expected = jax.tree.map(np.zeros_like, params['slow'])
    for row in x:
      for t, token in enumerate(row):
        before = token
        if connection != 'independent':
          before = token + mlp(params['fast'], token)[0]
        output, _ = mlp(params['slow'], before)
        error = own_error(objective, output, target[t])
        expected = jax.tree.map(
          np.add, expected, gradient(params['slow'], before, counts[t] * error)
        )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
      found['slow'],
      expected,
    )

  @parameterized.product(objective=local_losses.OBJECTIVES, depth=(0.5, 1.0))
  def test_equals_the_loop(self, objective, depth):
    learner = learning(objective=objective, depth=depth)
    params, (tokens, reset) = init(), draw()
    num_last = {0.5: 2, 1.0: 3}[depth]
    read = lambda p: learner.forward(p, None, tokens[None], reset=reset[None])
    logits, state = compiling.jit(read)(params)
    expected, weights = loop(params, tokens, reset, objective, num_last)
    np.testing.assert_allclose(logits[0], expected, rtol=1e-6, atol=1e-8)
    for name in _NAMES:
      blocks = state.levels[name].params['blocks']
      found = jax.tree.map(
        lambda *x: np.concatenate(x, axis=1)[0], blocks.first, blocks.rest
      )['levels'][name]
      for i in range(num_last):
        jax.tree.map(
          lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6),
          found,
          weights[_LAYERS - num_last + i, name],
        )

  def test_any_split_gives_the_same_and_no_logit_sees_ahead(self):
    learner = learning(objective='dot')
    params, (tokens, reset) = jax.tree.map(jnp.asarray, init()), draw()
    whole = compiling.jit(
      lambda t: learner.forward(params, None, t, reset=reset[None])
    )
    logits, state = whole(tokens[None])
    general = compiling.jit(
      lambda s, m: learner.forward(
        params, s, tokens[None], reset=reset[None], mask=m
      )
    )
    piece, total = learner.init_state(params, 1), 0.0
    call = np.sort(np.random.default_rng(1).integers(3, size=(1, _LENGTH)))
    for i in range(3):
      out, piece = general(piece, call == i)
      total += np.where((call == i)[..., None], out, 0.0)
    np.testing.assert_allclose(total, logits, rtol=1e-9, atol=1e-12)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
      piece.levels,
      state.levels,
    )
    changed = tokens.copy()
    changed[6] = (changed[6] + 1) % _VOCAB
    after, _ = whole(changed[None])
    np.testing.assert_array_equal(after[:, :6], logits[:, :6])
    self.assertTrue(np.any(after[:, 8:] != logits[:, 8:]))

  def test_rates_of_zero_equal_the_model(self):
    params, (tokens, _) = jax.tree.map(jnp.asarray, init()), draw()
    model = models.make_model(_CONFIG)
    learner = learning(objective='dot', learning_rate=0.0)
    read = lambda f, s: compiling.jit(lambda s: f(params, s, tokens[None]))(s)
    logits, _ = read(learner.forward, learner.init_state(params, 1))
    expected, _ = read(model.forward, model.init_state(params, 1))
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-12)

  @pytest.mark.slow
  def test_the_outer_gradient_goes_through_the_steps(self):
    learner, (tokens, _) = learning(), draw()
    params = init()
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    move = lambda step: jax.tree.map(
      lambda x, d: x + step * d, params, direction
    )
    take = lambda values, targets: (
      -jnp.take_along_axis(
        jax.nn.log_softmax(values), targets[..., None], axis=-1
      )[..., 0]
    )

    def loss(params):
      found, _ = learner.losses(
        params, None, tokens[None], np.roll(tokens, -1)[None], take
      )
      return jnp.mean(found)

    value_and_grad = compiling.jit(jax.value_and_grad(loss))
    _, grads = value_and_grad(params)
    slope = sum(
      np.sum(a * b)
      for a, b in zip(
        jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True
      )
    )
    finite = value_and_grad(move(1e-5))[0] - value_and_grad(move(-1e-5))[0]
    np.testing.assert_allclose(slope, finite / 2e-5, rtol=1e-6)

  def test_needs_a_next_token(self):
    inner = levels.make_inner((_FAST, _SLOW), objective='dot')
    with self.assertRaisesRegex(
      errors.UserError, 'CompressionHead has no next'
    ):
      models.make_model(_CONFIG, inner, head=models.CompressionHead())
