import pathlib

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_learning import layers
from nested_learning import models
from nested_learning import parameters
from nested_learning import training
from tests.training import tiny


class ScheduleTest(parameterized.TestCase):
  def test_rises_then_falls_on_a_cosine(self):
    config = training.TrainConfig(
      num_steps=104, learning_rate=1.0, warmup_steps=4, final_fraction=0.2
    )
    schedule = training.make_schedule(config)
    rates = [float(schedule(step)) for step in range(105)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(rates[54], 0.6, atol=1e-6)
    np.testing.assert_allclose(rates[104], 0.2, atol=1e-6)
    self.assertEqual(rates[4:], sorted(rates[4:], reverse=True))

  @parameterized.parameters((0, 1.0), (1, 1.0), (1000, 0.1))
  def test_first_rate(self, warmup_steps, expected):
    config = training.TrainConfig(
      num_steps=10, learning_rate=1.0, warmup_steps=warmup_steps
    )
    first = training.make_schedule(config)(0)
    np.testing.assert_allclose(first, expected, atol=1e-6)


class OptimizerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_decays_matrices_alone(self):
    mixer = layers.MemoryMixerConfig(num_heads=2, head_dim=8)
    config = tiny.experiment(self.root, model={'mixer': mixer})
    table = models.make_model(config.model).table
    decayed = {
      parameters.path_name(path)
      for path, value in jax.tree.leaves_with_path(training.decay_mask(table))
      if value
    }
    levels = {
      f'blocks/levels/{level}/{name}'
      for level in ('fast', 'slow')
      for name in ('gate', 'up', 'down')
    }
    mixers = {f'blocks/mixer/{name}' for name in ('in', 'gate', 'out')}
    self.assertEqual(decayed, levels | mixers)

  @parameterized.parameters(*models.zoo.FAMILIES)
  def test_decayed_parameters_of_a_family(self, family):
    config = models.zoo.make_config(f'{family}_tiny')
    table = models.make_model(config).table
    for path, param in jax.tree.leaves_with_path(
      table, is_leaf=lambda x: isinstance(x, parameters.Param)
    ):
      name = parameters.path_name(path)
      # Checked by name here, where no user chose the names.
      small = 'norm', 'bias', 'conv', 'memory', 'powers', 'embedding'
      is_matrix = len([axis for axis in param.axes if axis != 'layers']) > 1
      expected = is_matrix and not any(word in name for word in small)
      self.assertEqual(param.decay, expected, name)

  def test_names_of_levels_do_not_change_what_is_decayed(self):
    names = 'slow_memory', 'convex', 'norm', 'bias'
    levels = tuple(models.LevelConfig(name, mlp_dim=8) for name in names)
    config = tiny.experiment(self.root, model={'levels': levels})
    mask = training.decay_mask(models.make_model(config.model).table)
    for name in names:
      decayed = mask['blocks']['levels'][name]
      self.assertEqual(
        decayed, {'norm': False, 'gate': True, 'up': True, 'down': True}
      )

  def test_each_level_steps_on_its_own_clock(self):
    # 256 tokens per step: 'slow' takes every second step.
    config = tiny.experiment(self.root, train={'warmup_steps': 0})
    model = models.make_model(config.model)
    optimizer = training.make_optimizer(config, model.table)
    params = jax.jit(model.init_params)(jax.random.key(0))
    state = optimizer.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(optimizer.update)
    moved = []
    for _ in range(4):
      updates, state = update(gradients, state, params)
      levels = updates['blocks']['levels']
      moved.append([bool(jnp.any(levels[n]['up'])) for n in ('fast', 'slow')])
    self.assertTrue(all(fast for fast, _ in moved))
    self.assertEqual(sum(slow for _, slow in moved), 2)

  def test_one_level_is_clipped_adamw(self):
    levels = (models.LevelConfig('only', mlp_dim=16),)
    config = tiny.experiment(self.root, model={'levels': levels})
    model = models.make_model(config.model)
    ours = training.make_optimizer(config, model.table)
    plain = optax.chain(
      optax.clip_by_global_norm(config.train.clip_norm),
      optax.adamw(
        training.make_schedule(config.train),
        b1=0.9,
        b2=0.95,
        weight_decay=config.train.weight_decay,
        mask=training.decay_mask(model.table),
      ),
    )
    params = jax.jit(model.init_params)(jax.random.key(0))
    states = ours.init(params), plain.init(params)
    ours_update, plain_update = jax.jit(ours.update), jax.jit(plain.update)
    for step in range(3):
      gradients = jax.tree.map(lambda p, s=step: p * (s + 1) + 0.1, params)
      left, ours_state = ours_update(gradients, states[0], params)
      right, plain_state = plain_update(gradients, states[1], params)
      states = ours_state, plain_state
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), left, right
      )
