"""Tests families of the zoo against the rules of their papers, token by token.

One head and one row; S and W are [d, d], tokens are vectors, `n` counts them.
"""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import memory
from nested_learning import models
from nested_learning import parameters
from tests import compiling

_DIM, _TOKENS = 5, 37
_SIZE = models.zoo.Size(1, _DIM, 1, 4)


def linear_attention(state, token, n):
  """Katharopoulos et al., arXiv:2006.16236, eqs. 18-20, without a divisor."""
  del n
  state = state + jnp.outer(token['v'], token['k'])
  return state, state @ token['q']


def retnet(state, token, n):
  """Sun et al., arXiv:2307.08621, eq. 6; the first head's decay is 31/32."""
  del n
  state = 31 / 32 * state + jnp.outer(token['v'], token['k'])
  return state, state @ token['q']


def gated_linear_attention(state, token, n):
  """Dao and Gu, arXiv:2405.21060, eq. 1, with one input scale."""
  del n
  state = token['retention'] * state + jnp.outer(token['v'], token['k'])
  return state, state @ token['q']


def deltanet(state, token, n):
  """Yang et al., arXiv:2406.06484, section 2.2."""
  del n
  k, beta = token['k'], token['inner_lr']
  old = state @ k
  new = beta * token['v'] + (1 - beta) * old
  state = state - jnp.outer(old, k) + jnp.outer(new, k)
  return state, state @ token['q']


def gated_deltanet(state, token, n):
  """Yang et al., arXiv:2412.06464, eq. 10."""
  del n
  k, alpha, beta = token['k'], token['retention'], token['inner_lr']
  erased = jnp.eye(_DIM) - beta * jnp.outer(k, k)
  state = state @ (alpha * erased) + beta * jnp.outer(token['v'], k)
  return state, state @ token['q']


def _layer_norm(x):
  x = x - x.mean()
  return 0.7 * x / jnp.sqrt((x**2).mean() + 1e-6) + 0.1


def _mlp(weights, x):
  return weights['vector'] @ jax.nn.gelu(weights['in'] @ x)


def _ttt(read):
  """Sun et al., arXiv:2407.04620, eqs. 4-7: mini-batches of 16 tokens."""

  def rule(state, token, n):
    weights, anchor = state
    anchor = jax.tree.map(
      lambda a, w: jnp.where(n % 16 == 0, w, a), anchor, weights
    )
    loss = lambda w: 0.5 * jnp.sum((read(w, token['k']) - token['v']) ** 2)
    gradient = jax.grad(loss)(anchor)
    weights = jax.tree.map(
      lambda w, g: w - token['inner_lr'] * g, weights, gradient
    )
    return (weights, anchor), read(weights, token['q'])

  return rule


def titans(state, token, n):
  """Behrouz et al., arXiv:2501.00663, eqs. 8-14, chunks of 64 tokens."""
  weights, surprise, anchor = state
  pick = lambda a, w: jnp.where(n % 64 == 0, w, a)
  anchor = jax.tree.map(pick, anchor, weights)
  read = lambda w, x: x + w['vector'] @ jax.nn.silu(w['in'] @ x)
  loss = lambda w: 0.5 * jnp.sum((read(w, token['k']) - token['v']) ** 2)
  surprise = jax.tree.map(
    lambda s, g: token['momentum'] * s - token['inner_lr'] * g,
    surprise,
    jax.grad(loss)(anchor),
  )
  forgotten = 1 - token['retention']
  weights = jax.tree.map(
    lambda w, s: (1 - forgotten) * w + s, weights, surprise
  )
  return (weights, surprise, anchor), read(weights, token['q'])


def _miras(error, to_weights):
  """Behrouz et al., arXiv:2504.13173, section 5.3: chunks of 16 tokens."""

  def rule(state, token, n):
    written, anchor = state
    anchor = jax.tree.map(
      lambda a, w: jnp.where(n % 16 == 0, to_weights(w), a), anchor, written
    )
    read = lambda w, x: x + _layer_norm(_mlp(w, x))
    prediction, pull = jax.vjp(lambda w: read(w, token['k']), anchor)
    (gradient,) = pull(error(prediction - token['v']))
    written = jax.tree.map(
      lambda a, g: token['retention'] * a - token['inner_lr'] * g,
      written,
      gradient,
    )
    return (written, anchor), read(anchor, token['q'])

  return rule


def _huber_error(e):
  absolute = e / jnp.sqrt(e**2 + 1e-6)
  return jnp.where(jnp.sqrt(jnp.sum(e**2)) <= 1.0, e, 1.0 * absolute)


def _newton_schulz(x):
  x = x / jnp.linalg.norm(x)
  for _ in range(5):
    square = x @ x.T
    x = 3.4445 * x - 4.775 * square @ x + 2.0315 * square @ square @ x
  return x


def _omega(orthogonal):
  """Behrouz et al., arXiv:2505.23735: windows of 8 tokens, chunks of 16."""

  def rule(state, token, n):
    weights, surprise, anchor, past = state
    pick = lambda a, w: jnp.where(n % 16 == 0, w, a)
    anchor = jax.tree.map(pick, anchor, weights)
    read = lambda w, x: x + _mlp(w, x)
    gamma = token['weight'] if orthogonal else token['inner_lr']
    now = {'k': token['k'], 'v': token['v'], 'gamma': gamma}
    past = jax.tree.map(lambda p, x: jnp.append(p[1:], x[None], 0), past, now)

    def loss(w):
      read_all = jax.vmap(lambda k: read(w, k))(past['k'])
      errors = 0.5 * jnp.sum((read_all - past['v']) ** 2, -1)
      return jnp.sum(past['gamma'][:, 0] * errors)

    gradient = jax.grad(loss)(anchor)
    if orthogonal:
      surprise = jax.tree.map(
        lambda s, g: token['momentum'] * s + g, surprise, gradient
      )
      step = jax.tree.map(
        lambda s: token['inner_lr'] * _newton_schulz(s), surprise
      )
    else:
      step = gradient
    weights = jax.tree.map(
      lambda w, s: token['retention'] * w - s, weights, step
    )
    return (weights, surprise, anchor, past), read(weights, token['q'])

  return rule


def deltattt(state, token, n):
  """Tsinghua LeapLab, 2025, its rate of B by the square of h's norm."""
  del n
  a, b = state['in'], state['vector']
  k, v = token['k'], token['v']
  hidden = jax.nn.silu(a @ k)
  beta = token['hidden_lr'] / (hidden @ hidden + 0.01)
  a = a + token['inner_lr'] * jnp.outer(v - a @ k, k)
  b = b + beta * jnp.outer(v - b @ hidden, hidden)
  return {'in': a, 'vector': b}, b @ jax.nn.silu(a @ token['q'])


_RULES = {
  'linear_attention': linear_attention,
  'retnet': retnet,
  'gated_linear_attention': gated_linear_attention,
  'deltanet': deltanet,
  'gated_deltanet': gated_deltanet,
  'ttt_linear': _ttt(lambda w, x: x + _layer_norm(w['in'] @ x)),
  'ttt_mlp': _ttt(lambda w, x: x + _layer_norm(_mlp(w, x))),
  'titans': titans,
  'omeganet': _omega(False),
  'atlas': _omega(True),
  'deltattt': deltattt,
  'yaad': _miras(_huber_error, lambda a: a),
  'moneta': _miras(
    lambda e: 3 * e * jnp.sqrt(e**2 + 1e-6),
    lambda a: a / jnp.sqrt(jnp.sum(a**4) + 1e-6),
  ),
  'memora': _miras(
    lambda e: e, lambda a: jnp.exp(a) / jnp.exp(a).sum(-1, keepdims=True)
  ),
}


class PublishedRulesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  @parameterized.parameters(*_RULES)
  def test_equals_the_papers_rule(self, name):
    config = models.zoo.FAMILIES[name].mixer(_SIZE)
    norm = {'scale': jnp.full((1, _DIM), 0.7), 'bias': jnp.full((1, _DIM), 0.1)}
    network = config.network(
      output_norm=norm if config.output == 'norm' else None,
    )
    rng = np.random.default_rng(0)
    scale = 0.0 if config.initial == 'zero' else 0.5
    initial = parameters.map_params(
      lambda p: jnp.asarray(scale * rng.normal(size=p.shape)), network.table
    )
    tokens = {
      **{r: rng.normal(size=(_TOKENS, _DIM)) for r in 'kvq'},
      # Within the layer's bound, so that no memory reaches `max_norm`, which
      # no paper has.
      'inner_lr': rng.uniform(0.0, config.max_inner_lr, size=(_TOKENS, 1)),
      'retention': rng.uniform(0.9, 1.0, size=(_TOKENS, 1)),
      'momentum': rng.uniform(size=(_TOKENS, 1)),
      'weight': rng.uniform(size=(_TOKENS, 1)),
      'hidden_lr': rng.uniform(size=(_TOKENS, 1)),
    }
    tokens['k'] /= np.linalg.norm(tokens['k'], axis=-1, keepdims=True)
    tokens = jax.tree.map(jnp.asarray, tokens)
    weights = jnp.asarray(rng.normal(size=(_TOKENS, _DIM)))

    def expected(initial, tokens):
      start = {m: w[0].reshape(w.shape[-2:]) for m, w in initial.items()}
      match name:
        case 'titans':
          start = start, jax.tree.map(jnp.zeros_like, start), start
        case 'omeganet' | 'atlas':
          sizes = {'k': _DIM, 'v': _DIM, 'gamma': 1}
          past = {name: jnp.zeros((8, d)) for name, d in sizes.items()}
          start = start, jax.tree.map(jnp.zeros_like, start), start, past
        case 'deltattt':
          pass
        case _ if config.initial == 'zero':
          start = start['in']
        case _:
          start = start, start

      def body(state, numbered):
        n, token = numbered
        return _RULES[name](state, token, n)

      _, reads = jax.lax.scan(body, start, (jnp.arange(_TOKENS), tokens))
      return jnp.sum(weights * reads), reads

    def actual(initial, tokens):
      inner_lr, retention = tokens['inner_lr'], tokens['retention']
      if config.inner_lr == 'one':
        inner_lr = jnp.ones_like(inner_lr)
      if config.retention == 'none':
        retention = jnp.ones_like(retention)
      if config.retention == 'head':
        retention = jnp.full_like(retention, 31 / 32)
      feed = memory.WriteInputs(
        key=tokens['k'],
        value=tokens['v'],
        query=tokens['q'],
        inner_lr=inner_lr,
        retention=retention,
        momentum=tokens['momentum'] if config.momentum else None,
        extra={'weight': tokens['weight'], 'hidden_lr': tokens['hidden_lr']},
      )
      feed = jax.tree.map(lambda x: x[None, None], feed)
      result, _ = memory.scan_chunks(
        network, config.rule('main'), initial, None, feed, project=None
      )
      return jnp.sum(weights * result.read[0, 0]), result.read[0, 0]

    @compiling.jit
    def run(initial, tokens):
      return [
        jax.grad(f, argnums=(0, 1), has_aux=True)(initial, tokens)
        for f in (expected, actual)
      ]

    (expected_grads, reads), (grads, actual_reads) = run(initial, tokens)
    np.testing.assert_allclose(actual_reads, reads, rtol=1e-9, atol=1e-9)
    self.assertGreater(np.abs(reads).max(), 0.1)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, atol=1e-6 * max(np.abs(b).max(), 1e-3)
      ),
      grads,
      expected_grads,
    )
