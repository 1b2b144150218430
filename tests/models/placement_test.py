"""Tests of memories beside attention, and of levels made of MLPs."""

import dataclasses

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import configs
from nested_learning import errors
from nested_learning import layers
from nested_learning import levels
from nested_learning import models
from nested_learning import subtrees
from tests import compiling
from tests.models import contract_test

_TOKENS = np.random.default_rng(0).integers(11, size=(2, 24)).astype(np.int32)
_SANDWICH = layers.NormConfig(offset=1.0, place='both')
_BASE = models.ModelConfig(
  vocab_size=11,
  num_layers=4,
  embed_dim=8,
  mixer=layers.AttentionConfig(2, 1, head_dim=4),
  levels=(models.LevelConfig('mlp', 12),),
  max_length=24,
)
_GEMMA = dataclasses.replace(
  _BASE,
  norm=_SANDWICH,
  levels=(models.LevelConfig('mlp', 12, mlp=layers.MlpConfig(norm=_SANDWICH)),),
)
_MEMORY = layers.MemoryMixerConfig(2, 4, chunk_size=8, chunk_size_others=8)


def short(family):
  """Returns the memory of a family, with chunks of 8 tokens."""
  return contract_test.shorten(models.zoo.make_config(f'{family}_tiny').mixer)


def make(config):
  params = compiling.jit(models.make_model(config).init_params)(
    jax.random.key(0)
  )
  # As after training: no scale is exactly one.
  noise = np.random.default_rng(1)
  return config, jax.tree.map(
    lambda x: x + jnp.asarray(0.1 * noise.normal(size=x.shape), x.dtype), params
  )


def read(config, params, inner=None):
  model = models.make_model(config, inner)
  return compiling.jit(lambda p: model.forward(p, None, _TOKENS)[0])(params)


def read_by_operation(config, params):
  """Reads without a compiled program.

  XLA compiles layers in a row and layers in a loop to programs whose sums round
  differently.
  """
  with jax.disable_jit():
    return np.asarray(
      models.make_model(config).forward(params, None, _TOKENS)[0]
    )


def gradient(config, params):
  model = models.make_model(config)

  def loss(params):
    logits, _ = model.forward(params, None, _TOKENS)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits[:, :-1], _TOKENS[:, 1:]
    )
    return jnp.mean(losses)

  return compiling.jit(jax.grad(loss))(params)


def norms(tree):
  """Returns the norm of every leaf below a memory, by the end of its path."""
  return {
    path.partition('/memory/')[2]: float(jnp.linalg.norm(x))
    for path, x in zip(subtrees.paths(tree), jax.tree.leaves(tree), strict=True)
    if '/memory/' in path
  }


class AddMemoryTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('hope', _BASE, _MEMORY),
    ('tnt', _BASE, short('tnt')),
    (
      'window_and_norms_after',
      dataclasses.replace(
        _GEMMA,
        mixer=dataclasses.replace(_BASE.mixer, window=5, num_sinks=2),
      ),
      short('titans'),
    ),
  )
  def test_keeps_the_logits_and_learns(self, base, memory):
    config, params = make(base)
    expected = read(config, params)
    config, params = models.add_memory(config, params, memory, layers=(1, 3))
    np.testing.assert_array_equal(read(config, params), expected)
    # The output alone has a gradient, and all others after its first step.
    first = gradient(config, params)
    alive = {name for name, x in norms(first).items() if x > 0}
    self.assertEqual(alive, {'out'})
    params = jax.tree.map(lambda w, g: w - 0.1 * g, params, first)
    second = norms(gradient(config, params))
    for name, norm in second.items():
      self.assertGreater(norm, 0, name)
    self.assertFalse(np.array_equal(read(config, params), expected))

  def test_layers(self):
    config, params = models.add_memory(*make(_BASE), _MEMORY)
    self.assertEqual(config.placement.memory_layers, (2, 3))
    self.assertLen(config.blocks, 4)
    self.assertLen(params['blocks'], 4)
    # Every second layer is a pattern of two.
    config, params = models.add_memory(*make(_BASE), _MEMORY, layers=(1, 3))
    self.assertLen(config.blocks, 2)
    self.assertEqual(params['blocks']['1']['norm'].shape, (2, 8))
    config, params = models.add_memory(*make(_BASE), _MEMORY, layers=range(4))
    self.assertLen(config.blocks, 1)
    self.assertIn('memory', params['blocks']['mixer'])

  def test_splits_of_a_stream_and_generation(self):
    config, params = models.add_memory(*make(_BASE), _MEMORY, layers=(2,))
    params['blocks']['2']['mixer']['memory']['out'] += 0.1
    model = models.make_model(config)
    read = compiling.jit(model.forward)
    whole, _ = read(params, None, _TOKENS)
    state = model.init_state(params, 2)
    for cut in np.split(_TOKENS, [7, 8, 19], axis=1):
      logits, state = read(params, state, cut)
    np.testing.assert_allclose(logits, whole[:, 19:], atol=2e-5)

  def test_refusals(self):
    config, params = make(_BASE)
    with self.assertRaisesRegex(errors.UserError, 'layer 4, and .* 0 to 3'):
      models.add_memory(config, params, _MEMORY, layers=(4,))
    both = models.add_memory(config, params, _MEMORY, layers=(0,))
    with self.assertRaisesRegex(errors.UserError, r'\(0,\) have a memory'):
      models.add_memory(*both, _MEMORY)
    hope = dataclasses.replace(_BASE, mixer=_MEMORY)
    with self.assertRaisesRegex(errors.UserError, 'MemoryMixerConfig; a mem'):
      models.add_memory(hope, params, _MEMORY, layers=(0,))
    with self.assertRaisesRegex(errors.UserError, 'memory_layers='):
      models.PlacementConfig(memory=_MEMORY)

  def test_from_the_command_line(self):
    config = configs.override(
      _BASE,
      [
        'placement.memory=MemoryMixerConfig',
        'placement.memory.num_heads=2',
        'placement.memory.head_dim=4',
        'placement.memory_layers=1,3',
      ],
    )
    self.assertLen(config.blocks, 2)
    self.assertEqual(configs.from_json(configs.to_json(config)), config)

  def test_levels_from_the_command_line(self):
    config = configs.override(
      _GEMMA, ['levels=fast,slow', 'placement.levels=last_quarter']
    )
    expected, _ = models.stack_levels(
      _GEMMA, make(_GEMMA)[1], ('fast', 'slow'), placement='last_quarter'
    )
    self.assertEqual(config, expected)
    self.assertEqual(configs.from_json(configs.to_json(config)), config)
    config = configs.override(
      config, ['placement.levels=slow,(fast,slow),slow,slow']
    )
    table = (('slow',), ('fast', 'slow'), ('slow',), ('slow',))
    self.assertEqual(config.placement.levels, table)
    self.assertEqual(configs.from_json(configs.to_json(config)), config)


class StackLevelsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('cycle', 'cycle', ['fast', 'slow'] * 2),
    ('last_quarter', 'last_quarter', ['slow'] * 3 + ['fast']),
    (
      'table',
      (('slow',), ('slow',), ('fast',)),
      ['slow', 'slow', 'fast', 'slow'],
    ),
  )
  def test_rates_of_zero_keep_the_logits(self, placement, expected):
    base, params = make(_GEMMA)
    before = read_by_operation(base, params)
    config, stacked = models.stack_levels(
      base, params, ('fast', 'slow'), placement=placement
    )
    found = [config.blocks[i % len(config.blocks)].levels for i in range(4)]
    self.assertEqual([x.name for (x,) in found], expected)
    after = read_by_operation(config, stacked)
    np.testing.assert_array_equal(after, before)
    inner = levels.make_inner((8, 24), learning_rate=0.0)
    np.testing.assert_allclose(read(config, stacked, inner), before, atol=1e-5)

  def test_every_level_learns_at_its_own_clock(self):
    config, params = models.stack_levels(
      *make(_BASE), ('fast', 'slow'), placement='last_quarter'
    )
    inner = levels.make_inner((8, 24), learning_rate=(0.1, 0.01))
    model = models.make_model(config, inner)
    _, state = compiling.jit(lambda p: model.forward(p, None, _TOKENS))(params)
    health = levels.measure_health(state)
    self.assertEqual(health['fast'].num_updates[0], 3)
    self.assertEqual(health['slow'].num_updates[0], 1)
    for level in health.values():
      self.assertGreater(level.drift[0], 0)

  def test_local_losses_of_stacked_levels(self):
    config, params = models.stack_levels(*make(_BASE), ('fast', 'slow'))
    inner = levels.make_inner(
      (8, 24), learning_rate=0.1, objective=('l2', 'dot'), depth=1.0
    )
    model = models.make_model(config, inner)
    _, state = compiling.jit(lambda p: model.forward(p, None, _TOKENS))(params)
    for level in levels.measure_health(state).values():
      self.assertGreater(level.drift[0], 0)

  def test_memories_and_levels_together(self):
    base, params = make(_BASE)
    expected = read(base, params)
    both = models.stack_levels(base, params, ('fast', 'slow'))
    both = models.add_memory(*both, _MEMORY, layers=(3,))
    other = models.add_memory(base, params, _MEMORY, layers=(3,))
    other = models.stack_levels(*other, ('fast', 'slow'))
    self.assertEqual(both[0], other[0])
    np.testing.assert_allclose(read(*both), expected, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, both[1], other[1])

  def test_the_levels_of_labels(self):
    config, params = models.stack_levels(*make(_BASE), ('fast', 'slow'))
    labels = models.level_labels(config, of='chain')
    self.assertEqual(labels['blocks']['1']['levels']['slow']['up'], 'slow')
    self.assertEqual(labels['blocks']['1']['norm'], 'base')
    jax.tree.map(lambda *_: None, labels, params)  # one structure

  def test_refusals(self):
    config, params = make(_BASE)
    for names, placement, message in (
      (('a', 'b', 'c'), 'last_quarter', 'is for two levels'),
      (('a', 'b'), (('a',), ('c',)), "'b' is in one of them"),
      (('a', 'b'), 'often', "levels='often' must be all, cycle"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        models.stack_levels(config, params, names, placement=placement)


class AddLevelTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_after_a_norm_the_output_starts_at_zero(self, stacked):
    config, params = make(_GEMMA)
    expected = read(config, params)
    if stacked:
      config, params = models.stack_levels(config, params, ('fast', 'slow'))
    config, params = models.add_level(config, params, name='slower')
    np.testing.assert_array_equal(read(config, params), expected)
    place = params['blocks']['0'] if stacked else params['blocks']
    np.testing.assert_array_equal(place['levels']['slower']['norm_after'], -1)
    # A norm of zeros would multiply the gradient by 1 / sqrt(epsilon).
    found = gradient(config, params)['blocks']
    found = (found['0'] if stacked else found)['levels']
    old = found['fast' if stacked else 'mlp']['norm_after']
    ratio = optax.tree.norm(found['slower']) / optax.tree.norm(old)
    self.assertBetween(ratio, 0.05, 20)

  def test_refuses_another_width(self):
    config, params = make(_BASE)
    wide = dataclasses.replace(config.levels[0], name='wide', mlp_dim=13)
    config = dataclasses.replace(config, levels=(*config.levels, wide))
    with self.assertRaisesRegex(errors.UserError, 'mlp_dim=13 in place of 12'):
      models.complete(config, params, jax.random.key(0))
