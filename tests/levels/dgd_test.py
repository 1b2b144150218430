"""Tests of levels with Delta Gradient Descent, against the rule by hand."""

import itertools
from typing import NamedTuple

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from tests import compiling

_EMBED, _HIDDEN, _VOCAB, _LAYERS = 6, 5, 7, 2
_FAST, _SLOW, _LENGTH = 4, 8, 16  # tokens
_RATES = {'fast': 0.1, 'slow': 0.05}
_NAMES = tuple(_RATES)
_SGD = optimizers.configs.Sgd()
_CONFIG = models.ModelConfig(
  vocab_size=_VOCAB,
  num_layers=_LAYERS,
  embed_dim=_EMBED,
  mixer=layers.AttentionConfig(1, 1, head_dim=4),
  levels=tuple(models.LevelConfig(name, _HIDDEN) for name in _NAMES),
  max_length=_LENGTH,
  dtype='float64',
)


def draw():
  rng = np.random.default_rng(0)
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


def normalize(x):
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x / jnp.sqrt(mean + 1e-6)


class Seen(NamedTuple):
  """Input of a level [t, e], and those of its matrices by name."""

  x: jax.Array
  inputs: dict[str, jax.Array]


def apply(own, x):
  """Returns the output of a level, and the inputs of its matrices."""
  normed = normalize(x) * own['norm']
  hidden = jax.nn.silu(normed @ own['gate']) * (normed @ own['up'])
  inputs = {'gate': normed, 'up': normed, 'down': hidden}
  return hidden @ own['down'], inputs


def read(params, weights, tokens):
  """Reads tokens [t]; returns logits, and `Seen` of each level."""
  x = params['embedding'][tokens] * _EMBED**0.5
  seen = {}
  for key in itertools.product(range(_LAYERS), _NAMES):
    output, inputs = apply(weights[key], x)
    seen[key] = Seen(x, inputs)
    x = x + output
  return normalize(x) * params['norm'] @ params['embedding'].T, seen


def segment_loss(params, weights, tokens, counts):
  """Sums the next-token losses of a segment."""
  logits, _ = read(params, weights, tokens)
  losses = -jax.nn.log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
  return jnp.sum(losses * counts)


def own_losses(params, weights, tokens, counts):
  """Sums the local losses 'l2' of all levels, whose inputs are constants."""
  target = normalize(params['embedding'][tokens[1:]] * _EMBED**0.5)
  _, seen = read(params, jax.lax.stop_gradient(weights), tokens)
  total = 0.0
  for key, own in weights.items():
    output, _ = apply(own, seen[key].x)
    errors = jnp.sum((output[:-1] - target) ** 2, axis=-1)
    total += jnp.sum(counts * errors) / (2 * _EMBED)
  return total


def loop(params, tokens, reset, dgd, objective):
  """Reads a row; 'fast' learns by gradient descent and 'slow' by `dgd`."""
  weights = {
    (i, name): jax.tree.map(
      lambda x, i=i: x[i], params['blocks']['levels'][name]
    )
    for i, name in itertools.product(range(_LAYERS), _NAMES)
  }
  look = compiling.jit(lambda *x: read(*x)[1])
  grad = compiling.jit(jax.grad(segment_loss, argnums=1))
  own_grad = compiling.jit(jax.grad(own_losses, argnums=1))
  sums = {key: [] for key in weights}
  for end in range(_FAST, _LENGTH + 1, _FAST):
    part = tokens[end - _FAST : end]
    counts = 1.0 - reset[end - _FAST + 1 : end]
    seen = look(params, weights, part)
    gradients = grad(params, weights, part, counts)
    local = own_grad(params, weights, part, counts)
    for key in weights:
      is_local = key[1] == 'slow' and objective == 'l2'
      g = (local if is_local else gradients)[key]
      # Sums over the predictions: of gradients, x x^T and their number.
      grams = {
        name: np.einsum('t,ti,tj->ij', counts, x[:-1], x[:-1])
        for name, x in seen[key].inputs.items()
      }
      sums[key].append((g, grams, np.sum(counts)))
    for key, own in weights.items():
      if end % {'fast': _FAST, 'slow': _SLOW}[key[1]]:
        continue
      number = sum(n for *_, n in sums[key])
      rate, changed = _RATES[key[1]], {}
      for name, w in own.items():
        g = sum(x[name] for x, *_ in sums[key]) / number
        if key[1] == 'slow' and name != 'norm':
          gram = sum(x[name] for _, x, _ in sums[key]) / number
          pull = dgd.erase if dgd.target == 'printed' else 0.0
          divisor = 1 + rate * dgd.erase * np.trace(gram)
          changed[name] = w - rate / divisor * (pull * gram @ w + g)
        else:
          changed[name] = w - rate * g
      weights[key], sums[key] = changed, []
  return weights


def learn(learner, params, tokens, reset):
  """Returns the state of the levels, and their weights by block and name."""
  read = lambda p: learner.forward(p, None, tokens[None], reset=reset[None])
  state = compiling.jit(read)(params)[1]
  weights = {}
  for name, level in state.levels.items():
    blocks = level.params['blocks']
    parts = [x for x in (blocks.first, blocks.rest) if x is not None]
    join = lambda *x: np.concatenate(x, axis=1)[0]
    joined = jax.tree.map(join, *parts)['levels'][name]
    for i in range(_LAYERS):
      weights[i, name] = jax.tree.map(lambda x, i=i: x[i], joined)
  return state, weights


class DgdTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(
    (optimizers.configs.Dgd(target='printed', erase=0.5), 'next_token'),
    (optimizers.configs.Dgd(target='corrected'), 'next_token'),
    (optimizers.configs.Dgd(target='printed'), 'l2'),
  )
  def test_equals_the_rule_by_hand(self, dgd, objective):
    inner = levels.make_inner(
      (_FAST, _SLOW),
      learning_rate=tuple(_RATES.values()),
      optimizer=(optimizers.configs.Sgd(), dgd),
      objective=('next_token', objective),
      clip_norm=None,
      depth=1.0,
      max_drift=1e6,
    )
    learner = models.make_model(_CONFIG, inner)
    params, (tokens, reset) = init(), draw()
    state, found = learn(learner, params, tokens, reset)
    np.testing.assert_array_equal(state.levels['slow'].num_updates, [2])
    expected = loop(params, tokens, reset, dgd, objective)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
      found,
      expected,
    )

  def test_the_energy_of_a_matrix_is_one_number_per_block(self):
    dgd = optimizers.configs.Dgd()
    inner = levels.make_inner((4, 8), optimizer=(_SGD, dgd), depth=1.0)
    learner = models.make_model(_CONFIG, inner)
    state = jax.eval_shape(lambda p: learner.init_state(p, 3), init())
    self.assertEqual(state.levels['fast'].accumulated, ())
    sums = state.levels['slow'].accumulated
    sizes = {x.size for x in jax.tree.leaves(sums.energy)}
    self.assertLessEqual(sizes, {3})

  def test_needs_captured_inputs(self):
    tables = {'fast': np.ones((_VOCAB, _VOCAB))}
    level = levels.LearningLevel(
      'fast',
      4,
      optimizers.dgd(0.1),
      dgd=optimizers.configs.Dgd(),
    )

    def forward(params, state, tokens, *, reset=None, mask=None, write=True):
      return params['fast'][tokens], state

    reader = levels.make_reader(
      levels.ReaderSpec(
        forward,
        lambda params, batch_size: jnp.zeros((batch_size,)),
        levels.StepSpec([level], {'fast': 'fast'}),
      )
    )
    with self.assertRaisesRegex(errors.UserError, "'fast' .* such as sgd"):
      reader.init_state(tables, 1)

  def test_refuses_a_fallback(self):
    dgd = optimizers.configs.Dgd(fallback=optimizers.configs.AdamW(b1=0.8))
    with self.assertRaisesRegex(
      errors.UserError, r'levels\.1\.opti.*no effect'
    ):
      models.make_model(
        _CONFIG, levels.make_inner((4, 8), optimizer=(_SGD, dgd))
      )
