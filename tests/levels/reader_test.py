"""Tests of levels that learn inside a sequence, against an explicit loop."""

import dataclasses
import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning.levels import trees
from tests import compiling
from tests.levels import mixture_test

_ROWS, _LENGTH, _VOCAB = 2, 16, 11
_FAST, _SLOW = 4, 8  # tokens
_CONFIG = models.ModelConfig(
  vocab_size=_VOCAB,
  num_layers=1,
  embed_dim=8,
  mixer=layers.AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4),
  levels=(
    models.LevelConfig('fast', mlp_dim=6),
    models.LevelConfig('slow', mlp_dim=6),
  ),
  max_length=_LENGTH,
)
_CHOICES = optimizers.configs
_INNER = {
  'update_every': (_FAST, _SLOW),
  'learning_rate': (0.03, 0.02),
  'optimizer': _CHOICES.AdamW(),
  'clip_norm': None,
}


def learning(config=_CONFIG, **changes):
  """Makes the model, at rest and with levels that learn."""
  model = models.make_model(config)
  inner = levels.make_inner(**{**_INNER, **changes})
  return model, models.make_model(config, inner)


def own(params, name):
  labels = models.level_labels(_CONFIG, of='chain')
  return optimizers.select_level(params, labels, name)


def learned(level):
  """Returns a level's weights [b, blocks that learn, ...], named like `own`."""
  blocks = level.params['blocks']
  parts = [part for part in (blocks.first, blocks.rest) if part is not None]
  join = lambda *x: np.concatenate(x, axis=1)
  return {**own(init(), 'none'), 'blocks': jax.tree.map(join, *parts)}


@functools.cache
def init(dtype=np.float32, num_layers=1):
  config = dataclasses.replace(_CONFIG, num_layers=num_layers)
  params = compiling.jit(models.make_model(config).init_params)(
    jax.random.key(0)
  )
  # Larger than initial values, so that losses and steps are not negligible.
  return jax.tree.map(lambda x: jnp.asarray(1.5 * x, dtype), params)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(_VOCAB, size=(_ROWS, _LENGTH)).astype(np.int32)
  return tokens, rng.uniform(size=tokens.shape) < 0.15


def segment_loss(model, objective, params, state, tokens, reset):
  """Sums the losses of a segment's transitions within documents."""
  said, state = model.forward(params, state, tokens, reset=reset)
  logits, targets = said[:, :-1], tokens[:, 1:, None]
  rivals = jnp.ones(_VOCAB)
  if objective == 'in_segment':
    rivals = jnp.isin(jnp.arange(_VOCAB), targets)
  right = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
  losses = jnp.log(jnp.sum(jnp.exp(logits) * rivals, axis=-1)) - right
  counts = ~reset[:, 1:]
  return jnp.sum(losses * counts), (said, state, jnp.sum(counts))


def loop(
  params, tokens, reset, *, nested=False, num_last=1, objective='next_token'
):
  """Runs the definition on one row [1, t], both levels with Adam."""
  num_layers = params['blocks']['norm'].shape[0]
  model = models.make_model(dataclasses.replace(_CONFIG, num_layers=num_layers))
  grad = compiling.jit(
    jax.grad(functools.partial(segment_loss, model, objective), has_aux=True)
  )
  clocks = {'fast': (_FAST, 0.03), 'slow': (_SLOW, 0.02)}
  adams = {
    name: optax.adam(rate, 0.9, 0.95) for name, (_, rate) in clocks.items()
  }
  start = params
  weights = {name: own(params, name) for name in clocks}
  opts = {name: adams[name].init(weights[name]) for name in clocks}
  sums = {
    name: (jax.tree.map(jnp.zeros_like, weights[name]), 0) for name in clocks
  }
  labels = models.level_labels(_CONFIG, of='chain')
  # The levels that learn from the losses of each member.
  members = [('fast',), ('slow',)] if nested else [('fast', 'slow')]
  begun = weights['fast']  # where the fast level restarts
  states = [model.init_state(params, 1) for _ in members]
  outputs = [[] for _ in members]
  for end in range(_FAST, tokens.shape[1] + 1, _FAST):
    part = slice(end - _FAST, end)
    gradients = {}
    for i, names in enumerate(members):
      used = {**weights, 'fast': begun} if i else weights
      merged = optimizers.merge_levels(start, labels, used)
      found, (logits, states[i], count) = grad(
        merged, states[i], tokens[:, part], reset[:, part]
      )
      outputs[i].append(logits)
      gradients |= {name: own(found, name) for name in names}
    for name, (size, _) in clocks.items():
      total, number = sums[name]
      learns = np.arange(num_layers) >= num_layers - num_last
      total = jax.tree.map(
        lambda a, g, rows=learns: a + (g.T * rows).T,
        total,
        gradients[name],
      )
      sums[name] = total, number + count
      if end % size:
        continue
      total, number = sums[name]
      mean = jax.tree.map(lambda g, n=number: g / n, total)
      updates, opts[name] = adams[name].update(mean, opts[name], weights[name])
      weights[name] = optax.apply_updates(weights[name], updates)
      sums[name] = jax.tree.map(jnp.zeros_like, total), 0
    if nested and not end % _SLOW:
      weights['fast'] = begun
      opts['fast'] = adams['fast'].init(begun)
  outputs = [np.concatenate(x, axis=1)[0] for x in outputs]
  if len(outputs) == 1:
    return outputs[0][None], weights
  return mixture_test.mix_loop(outputs, tokens[0], reset[0])[None], weights


def assert_close(actual, expected, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    actual,
    expected,
  )


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class ReaderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    init()  # outside of any trace

  @parameterized.parameters(
    ('sequential', 'next_token'),
    ('nested', 'next_token'),
    ('sequential', 'in_segment'),
  )
  def test_equals_the_loop(self, connection, objective):
    chain = models.ChainConfig(connection)
    _, learner = learning(
      dataclasses.replace(_CONFIG, chain=chain), objective=objective
    )
    tokens, reset = draw()
    read = lambda p, t, r: learner.forward(p, None, t, reset=r)
    logits, state = compiling.jit(read)(init(), tokens, reset)
    for row in range(_ROWS):
      one = slice(row, row + 1)
      expected, weights = loop(
        init(),
        tokens[one],
        reset[one],
        nested=connection == 'nested',
        objective=objective,
      )
      assert_close(logits[one], expected, 1e-4)
      found = {name: learned(level) for name, level in state.levels.items()}
      assert_close(jax.tree.map(lambda x, r=row: x[r], found), weights, 1e-4)
    for name, level in state.levels.items():
      start = jax.tree.leaves(own(init(), name))
      moved = jax.tree.leaves(jax.tree.map(lambda x: x[0], learned(level)))
      moved = [np.sum((a - b) ** 2) for a, b in zip(moved, start, strict=True)]
      drift = np.sqrt(sum(moved) / sum(np.sum(x**2) for x in start))
      np.testing.assert_allclose(level.drift[0], drift, rtol=1e-4)

  @parameterized.parameters(1.0, 0.5)
  def test_only_the_last_blocks_learn(self, depth):
    params, num_last = init(num_layers=3), round(3 * depth + 0.1)
    _, learner = learning(
      dataclasses.replace(_CONFIG, num_layers=3), depth=depth
    )
    tokens, reset = (x[:1] for x in draw())
    read = lambda p: learner.forward(p, None, tokens, reset=reset)
    logits, state = compiling.jit(read)(params)
    expected, weights = loop(params, tokens, reset, num_last=num_last)
    assert_close(logits, expected, 1e-4)
    for name, level in state.levels.items():
      found = learned(level)['blocks']['levels'][name]
      last = jax.tree.map(
        lambda x: x[-num_last:], weights[name]['blocks']['levels'][name]
      )
      assert_close(jax.tree.map(lambda x: x[0], found), last, 1e-4)

  @parameterized.parameters('sequential', 'nested')
  def test_any_split_gives_the_same(self, connection):
    chain = models.ChainConfig(connection)
    _, learner = learning(dataclasses.replace(_CONFIG, chain=chain))
    tokens, reset = draw()
    read = compiling.jit(
      lambda p, s, r, m: learner.forward(p, s, tokens, reset=r, mask=m)
    )
    start = learner.init_state(init(), _ROWS)
    whole, after = read(init(), start, reset, np.ones_like(reset))
    rng = np.random.default_rng(1)
    for num_calls in (2, 5):
      # Calls are masks of one shape, each row split at its own places.
      call = np.sort(rng.integers(num_calls, size=tokens.shape), axis=1)
      state, total = start, 0.0
      for i in range(num_calls):
        logits, state = read(init(), state, reset, call == i)
        total += np.where((call == i)[..., None], logits, 0.0)
      assert_close(total, whole)
      assert_equal(state, after)
    aligned = compiling.jit(
      lambda p, r: learner.forward(p, None, tokens, reset=r)
    )
    logits, state = aligned(init(), reset)
    assert_close(logits, whole)
    assert_close(state.model, after.model)
    assert_close(state.mixture, after.mixture)
    assert_close(state.levels, after.levels)

  def test_a_slow_level_learns_as_if_faster_ones_were_at_rest(self):
    # So levels add up: the chain is mixed of what each would be without faster
    # ones, and the bound of the mixture holds for all of them.
    config = dataclasses.replace(_CONFIG, chain=models.ChainConfig('nested'))
    tokens, reset = draw()
    slow = []
    for rate in (0.03, 0.0):
      _, learner = learning(config, learning_rate=(rate, 0.02))
      read = compiling.jit(
        lambda p, f=learner.forward: f(p, None, tokens, reset=reset)[1]
      )
      slow.append(learned(read(init()).levels['slow']))
    assert_close(*slow)

  def test_after_a_restart_members_agree(self):
    # What the fast level forgot comes back: the chain is what its slower level
    # knows, until the fast one learns again.
    chain = models.ChainConfig('nested')
    _, learner = learning(dataclasses.replace(_CONFIG, chain=chain))
    tokens, _ = draw()
    read = compiling.jit(lambda s, t: learner.forward(init(), s, t)[1])
    state = learner.init_state(init(), _ROWS)
    for start in range(0, _LENGTH, _FAST):
      state = read(state, tokens[:, start : start + _FAST])
      whole, slow = state.mixture.predictions.swapaxes(0, 1)
      # These were made before the step at the end of the segment.
      after_restart = start % _SLOW == 0
      self.assertEqual(np.abs(whole - slow).max() < 1e-6, after_restart)

  def test_updates_come_at_their_counts_token_by_token(self):
    _, learner = learning()
    tokens, reset = draw()
    read = compiling.jit(lambda p, s, t, r: learner.forward(p, s, t, reset=r))
    state, outputs = learner.init_state(init(), _ROWS), []
    for t in range(_LENGTH):
      one = slice(t, t + 1)
      logits, state = read(init(), state, tokens[:, one], reset[:, one])
      outputs.append(logits)
      for name, size in (('fast', _FAST), ('slow', _SLOW)):
        np.testing.assert_array_equal(
          state.levels[name].num_updates, np.full(_ROWS, (t + 1) // size)
        )
    whole = compiling.jit(
      lambda p: learner.forward(p, None, tokens, reset=reset)
    )
    assert_close(np.concatenate(outputs, axis=1), whole(init())[0])

  def test_is_causal(self):
    _, learner = learning()
    read = compiling.jit(lambda t: learner.forward(init(), None, t)[0])
    tokens, _ = draw()
    before = read(tokens)
    for t in (3, 4, 9):
      changed = tokens.copy()
      changed[:, t] = (changed[:, t] + 1) % _VOCAB
      after = read(changed)
      np.testing.assert_array_equal(after[:, :t], before[:, :t])
      differs = np.abs(after - before).max(axis=(0, 2))
      self.assertTrue(np.all(differs[t:] > 0))

  @pytest.mark.slow
  def test_rates_of_zero_equal_the_model(self):
    # Up to rounding; zero_rates_test.py compares bits.
    tokens, reset = draw()
    for optimizer in (_CHOICES.Sgd(), _CHOICES.M3()):
      model, learner = learning(
        learning_rate=0.0, optimizer=optimizer, clip_norm=1.0
      )
      plain = compiling.jit(
        lambda s, t, r, m, f=model.forward: f(init(), s, t, reset=r, mask=m)
      )
      state, outputs = model.init_state(init(), _ROWS), []
      everything = np.ones((_ROWS, _FAST), bool)
      for start in range(0, _LENGTH, _FAST):
        part = slice(start, start + _FAST)
        logits, state = plain(
          state, tokens[:, part], reset[:, part], everything
        )
        outputs.append(logits)
      outputs = np.concatenate(outputs, axis=1)
      aligned = compiling.jit(
        lambda r, f=learner.forward: f(init(), None, tokens, reset=r)
      )
      assert_close(aligned(reset)[0], outputs)
      general = compiling.jit(
        lambda s, r, f=learner.forward: f(init(), s, tokens, reset=r)
      )
      logits, after = general(learner.init_state(init(), _ROWS), reset)
      assert_close(logits, outputs)
      axes = trees.row_axes(model.init_state, init())
      assert_close(after.model, (trees.rows_first(axes, state),))
      assert_equal(
        jax.tree.map(lambda x: x[0], learned(after.levels['slow'])),
        own(init(), 'slow'),
      )

  def test_write_false_changes_no_level(self):
    model, learner = learning()
    tokens, reset = draw()
    off = lambda f, s: compiling.jit(
      lambda s, r: f(init(), s, tokens, reset=r, write=False)
    )(s, reset)
    start = learner.init_state(init(), _ROWS)
    logits, state = off(learner.forward, start)
    assert_close(logits, off(model.forward, model.init_state(init(), _ROWS))[0])
    assert_equal(state.levels, start.levels)

  def test_rows_are_independent_with_every_optimiser(self):
    tokens, _ = draw()
    for optimizer in (_CHOICES.Sgd(momentum=0.9), _CHOICES.DeltaMomentum()):
      _, learner = learning(optimizer=optimizer, learning_rate=0.02)
      read = lambda t, f=learner.forward: compiling.jit(
        lambda t: f(init(), None, t)
      )(t)
      logits, state = read(tokens)
      alone, last = read(tokens[1:])
      assert_close(logits[1:], alone)
      assert_close(jax.tree.map(lambda x: x[1:], state.levels), last.levels)
      self.assertGreater(last.levels['fast'].drift[0], 1e-4)

  def test_sum_is_the_mean_times_the_targets(self):
    tokens, _ = draw()
    drift = {}
    for reduce in ('mean', 'sum'):
      _, learner = learning(
        optimizer=_CHOICES.Sgd(), learning_rate=1e-3, reduce=reduce
      )
      read = compiling.jit(lambda t, f=learner.forward: f(init(), None, t)[1])
      state = read(tokens[:, :_FAST])
      drift[reduce] = state.levels['fast'].drift
      self.assertEqual(state.levels['slow'].drift.max(), 0)
    np.testing.assert_allclose(
      drift['sum'], (_FAST - 1) * drift['mean'], rtol=1e-3
    )

  def test_only_the_diverged_level_is_frozen(self):
    _, learner = learning(learning_rate=(1e3, 1e-2))
    tokens, _ = draw()
    read = compiling.jit(lambda s: learner.forward(init(), s, tokens))
    logits, state = read(learner.init_state(init(), _ROWS))
    self.assertTrue(np.all(np.isfinite(logits)))
    fast, slow = state.levels['fast'], state.levels['slow']
    np.testing.assert_array_equal(fast.frozen, [True, True])
    np.testing.assert_array_equal(fast.num_updates, [0, 0])
    assert_equal(
      jax.tree.map(lambda x: x[1], learned(fast)), own(init(), 'fast')
    )
    np.testing.assert_array_equal(slow.frozen, [False, False])
    np.testing.assert_array_equal(slow.num_updates, [2, 2])

  def test_only_the_row_that_is_not_finite_is_frozen(self):
    _, learner = learning()
    tokens, _ = draw()
    read = compiling.jit(lambda s: learner.forward(init(), s, tokens))
    state = learner.init_state(init(), _ROWS)
    slow = state.levels['slow']
    poison = jax.tree.map(lambda x: x.at[1].set(jnp.nan), slow.accumulated)
    state.levels['slow'] = slow._replace(accumulated=poison)
    logits, after = read(state)
    self.assertTrue(np.all(np.isfinite(logits)))
    np.testing.assert_array_equal(after.levels['slow'].frozen, [False, True])
    np.testing.assert_array_equal(after.levels['slow'].num_updates, [2, 0])
    np.testing.assert_array_equal(after.levels['fast'].frozen, [False, False])

  @pytest.mark.slow
  def test_meta_gradient_against_finite_differences(self):
    self.check_meta_gradient('next_token')

  @pytest.mark.slow
  def test_meta_gradient_of_in_segment_against_finite_differences(self):
    self.check_meta_gradient('in_segment')

  @pytest.mark.slow
  def test_meta_gradient_of_a_nested_chain(self):
    self.check_meta_gradient('next_token', 'nested')

  def check_meta_gradient(self, objective, connection='sequential'):
    self.enterContext(jax.enable_x64(True))
    chain = models.ChainConfig(connection)
    config = dataclasses.replace(_CONFIG, dtype='float64', chain=chain)
    tokens, reset = draw()
    targets = np.roll(tokens, -1, axis=1)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    params = init(np.float64)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    move = lambda step: jax.tree.map(
      lambda x, d: x + step * d, params, direction
    )
    slopes = {}
    for gradient in ('second_order', 'first_order'):
      # SGD: Adam's first step is a sign, which has no slope.
      _, learner = learning(
        config,
        optimizer=_CHOICES.Sgd(),
        learning_rate=0.3,
        gradient=gradient,
        objective=objective,
      )

      def loss(params, learner=learner):
        losses, _ = learner.losses(
          params, None, tokens, targets, cross_entropy, reset=reset
        )
        return jnp.mean(losses)

      value_and_grad = compiling.jit(jax.value_and_grad(loss))
      _, grads = value_and_grad(params)
      slopes[gradient] = sum(
        np.sum(g * d)
        for g, d in zip(
          jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True
        )
      )
      step = 1e-5
      finite = value_and_grad(move(step))[0] - value_and_grad(move(-step))[0]
      finite = finite / (2 * step)
    np.testing.assert_allclose(slopes['second_order'], finite, rtol=1e-6)
    self.assertGreater(abs(slopes['first_order'] - finite), 1e-3 * abs(finite))

  @parameterized.parameters(0.1, 10.0)
  def test_clips_as_optax_does(self, norm):
    gradients = {'a': jnp.array([3.0, 4.0]), 'b': jnp.full((2, 2), 0.5)}
    mine = levels.inner.make_optimizer(levels.InnerLevelConfig(clip_norm=norm))
    theirs = optax.chain(optax.clip_by_global_norm(norm), optax.sgd(1.0))
    found, expected = (
      opt.update(gradients, opt.init(gradients))[0] for opt in (mine, theirs)
    )
    assert_close(found, expected, 1e-6)

  def test_a_segment_with_gradient_zero_has_a_meta_gradient(self):
    self.check_gradient_zero(_CHOICES.AdamW())

  @pytest.mark.slow
  def test_a_segment_with_gradient_zero_has_a_meta_gradient_with_sgd(self):
    self.check_gradient_zero(_CHOICES.Sgd())

  def check_gradient_zero(self, optimizer):
    # Among the tokens of a segment with one token, the gradient is zero, and
    # clipping divides by its norm.
    _, learner = learning(
      optimizer=optimizer, objective='in_segment', clip_norm=1.0
    )
    tokens, _ = draw()
    tokens[:, :_SLOW] = 3

    def loss(params):
      logits, _ = learner.forward(params, None, tokens)
      return jnp.sum(jax.nn.log_softmax(logits)[..., 0])

    for leaf in jax.tree.leaves(compiling.jit(jax.grad(loss))(init())):
      self.assertTrue(np.all(np.isfinite(leaf)))

  @parameterized.named_parameters(
    (
      'count',
      {'update_every': (4,), 'learning_rate': 1.0},
      'one entry for each of the 2 levels',
    ),
    ('order', {'update_every': (8, 4)}, 'slower level before a faster one'),
    ('one', {'update_every': (1, 4)}, 'update_every=1 must be at least 2'),
    ('divisor', {'update_every': (4, 9)}, r'\[4, 9\], have no common divisor'),
    ('rate', {'learning_rate': -1.0}, 'learning_rate=-1.0 must be a finite'),
    ('rates', {'learning_rate': (1.0,) * 3}, 'one for each of'),
    ('optimizer', {'optimizer': 'adm'}, "'adm' must be a config of"),
    ('reduce', {'reduce': 'max'}, "reduce='max' must be one of 'mean', 'sum'"),
    ('gradient', {'gradient': 'third'}, "gradient='third' must be"),
    ('clip', {'clip_norm': 0.0}, 'clip_norm=0.0 must be above 0'),
    ('drift', {'max_drift': 0.0}, 'max_drift=0.0 must be above 0'),
    ('depth', {'depth': 1.5}, 'depth=1.5 must be above 0, and 1 at most'),
    (
      'objective',
      {'objective': 'l1'},
      "objective='l1' must be one of 'next_token'",
    ),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      learning(**changes)

  def test_refuses_a_nested_chain_without_multiples(self):
    chain = models.ChainConfig('nested')
    with self.assertRaisesRegex(errors.UserError, "'slow' .* no multiple of"):
      learning(dataclasses.replace(_CONFIG, chain=chain), update_every=(4, 6))

  def test_a_level_may_rest(self):
    _, learner = learning(update_every=(None, 4))
    state = jax.eval_shape(lambda p: learner.init_state(p, 1), init())
    self.assertEqual(list(state.levels), ['slow'])
    model, off = learning(update_every=(), learning_rate=0.1)
    self.assertEqual(off.forward.__qualname__, model.forward.__qualname__)
