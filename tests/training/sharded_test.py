"""A step on any mesh equals the step on one device, without sends in scans."""

import dataclasses
import functools
import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_learning import compilation
from nested_learning import data
from nested_learning import layers
from nested_learning import models
from nested_learning import optimizers
from nested_learning import parameters
from nested_learning import sharding
from nested_learning import training
from nested_learning.training import make_workload
from tests import compiling

_ROWS, _LENGTH, _VOCAB = 8, 32, 264
_MIXERS = {
  'transformer': layers.AttentionConfig(
    num_heads=4, num_kv_heads=4, head_dim=8
  ),
  'hope': layers.MemoryMixerConfig(
    num_heads=4, head_dim=8, chunk_size=8, chunk_size_others=8
  ),
}
# data, fsdp, context, model
_MESHES = (
  (8, 1, 1, 1),
  (1, 8, 1, 1),
  (2, 1, 1, 4),
  (2, 2, 1, 2),
  (1, 1, 1, 4),
  (1, 2, 2, 2),
)


# By name: the optimiser of the model, of its first and of its second level.
_RULES = {
  'adamw': (optimizers.configs.AdamW(), None, None),
  'others': (
    optimizers.configs.M3(slow_every=2, ns_steps=2),
    optimizers.configs.Dgd(),
    optimizers.configs.DeepMomentum(),
  ),
}


def _config(name, mesh=(1, 1, 1, 1), rules='adamw'):
  data_size, fsdp, context, model = mesh
  base, fast, slow = _RULES[rules]
  return training.ExperimentConfig(
    name=name,
    model=models.ModelConfig(
      vocab_size=_VOCAB,
      num_layers=1,
      embed_dim=32,
      mixer=_MIXERS[name],
      levels=(
        models.LevelConfig('fast', mlp_dim=16, optimizer=fast),
        models.LevelConfig('slow', 16, 2 * _ROWS * _LENGTH, slow),
      ),
      max_length=_LENGTH,
      remat='layer',
    ),
    data=data.DataConfig(
      source='none', sequence_length=_LENGTH, batch_size=_ROWS
    ),
    train=training.TrainConfig(
      optimizer=base, learning_rate=1e-3, warmup_steps=0
    ),
    mesh=sharding.MeshConfig(data_size, model, fsdp, context),
  )


def _batch():
  rng = np.random.default_rng(0)
  shape = _ROWS, _LENGTH
  return {
    'tokens': rng.integers(_VOCAB, size=shape).astype(np.int32),
    'targets': rng.integers(_VOCAB, size=shape).astype(np.int32),
    'mask': np.ones(shape, bool),
    'reset': rng.uniform(size=shape) < 0.05,
  }


class _Stepped:
  """Two steps on a mesh: the program, metrics and state after each."""

  def __init__(self, config):
    num = math.prod(dataclasses.astuple(config.mesh))
    mesh = sharding.make_mesh(config.mesh, devices=jax.devices()[:num])
    computed = make_workload.make_step_spec(config)
    model = computed.model
    optimizer = training.make_optimizer(config, model.table)
    with jax.set_mesh(mesh):
      self.abstract = training.abstract_state(config, model, optimizer, mesh)
      with compiling.quickly():
        traced = training.trace_step(config, computed, optimizer, mesh)
        self.compiled = traced.lower().compile()
      state = _start(dataclasses.replace(config, mesh=sharding.MeshConfig()))
      state = jax.device_put(
        state, jax.tree.map(lambda x: x.sharding, self.abstract)
      )
      rows = sharding.batch_sharding(mesh)
      batch = jax.device_put(_batch(), rows)
      self.metrics, self.states = [], []
      for _ in range(2):
        # An executable: a step that would compile again is refused.
        state, metrics = self.compiled(state, batch)
        self.metrics.append(jax.device_get(metrics))
        self.states.append(jax.device_get(state))
      self.shardings = jax.tree.map(lambda x: x.sharding, state)
      self.costs = compilation.analyze(self.compiled.as_text(), mesh.shape)


@functools.cache
def _start(config):
  model = models.make_model(config.model)
  optimizer = training.make_optimizer(config, model.table)
  init = compiling.jit(training.make_init(config, model, optimizer))
  return jax.device_get(init(jax.random.key(0)))


@functools.cache
def _alone(name, rules):
  return _Stepped(_config(name, rules=rules))


class ShardedTest(parameterized.TestCase):
  def check(self, name, mesh, rules='adamw'):
    alone = _alone(name, rules)
    found = _Stepped(_config(name, mesh, rules))
    for expected, actual in zip(alone.metrics, found.metrics, strict=True):
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        expected,
        actual,
      )
    # Adam divides by the gradient's size, so that digits lost in a gradient
    # next to nothing come back as a part of the learning rate, 1e-3.
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5),
      alone.states[0].params,
      found.states[0].params,
    )
    for path, sharded in jax.tree.leaves_with_path(found.shardings):
      named = functools.reduce(_child, path, found.abstract).sharding
      self.assertTrue(sharded.is_equivalent_to(named, 8), str(path))
    self.assertEmpty(found.costs.in_memory_loops)
    return found

  @parameterized.parameters((mesh,) for mesh in _MESHES)
  def test_transformer(self, mesh):
    found = self.check('transformer', mesh)
    kinds = {axes for _, axes in found.costs.sent_bytes}
    for axis, size in zip(sharding.AXES, mesh, strict=True):
      used = any(axis in axes.split('_') for axes in kinds)
      self.assertEqual(used, size > 1, axis)

  @pytest.mark.slow
  def test_other_optimizers(self):
    found = self.check('transformer', (2, 2, 1, 2), rules='others')
    levels = found.abstract.optimizer[1].levels
    state = levels['slow'].inner[0].inner_states['deep'].inner_state[0]
    layer = state.up['blocks']['levels']['slow']['gate']
    self.assertEqual(layer.sharding.spec, jax.P(None, 'model', None))

  @parameterized.parameters((mesh,) for mesh in _MESHES)
  @pytest.mark.slow
  def test_hope(self, mesh):
    found = self.check('hope', mesh)
    self.assertGreater(found.costs.memory_flops, 0)

  def test_nothing_is_sent_while_a_memory_is_written(self):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, model=2))
    layer = _MIXERS['hope'].make(embed_dim=32, dtype=jnp.float32)
    shardings = sharding.param_shardings(layer.table, mesh)

    def loss(params, x, reset):
      params = sharding.gather(params, layer.table)
      out, _ = layer.apply(params, None, x, layers.TokenInfo(reset))
      return jnp.sum(out**2)

    rows = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((_ROWS, _LENGTH, 32), jnp.float32, sharding=rows)
    reset = jax.ShapeDtypeStruct((_ROWS, _LENGTH), bool, sharding=rows)
    params = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      parameters.abstract(layer.table),
      shardings,
    )
    gradient = compiling.jit(jax.grad(loss), out_shardings=shardings)
    with jax.set_mesh(mesh):
      compiled = gradient.lower(params, x, reset).compile()
    found = compilation.analyze(compiled.as_text(), mesh.shape)
    self.assertEmpty(found.in_memory_loops)
    self.assertGreater(found.memory_flops, 0)
    for share in (found.traffic_share, found.result_share):
      self.assertBetween(share, 0.05, 0.95)
    self.assertNotEmpty(found.collectives)  # but before and after it is


def _child(tree, key):
  match key:
    case jax.tree_util.GetAttrKey(name=name):
      return getattr(tree, name)
    case jax.tree_util.SequenceKey(idx=index):
      return tree[index]
  return tree[key.key]
