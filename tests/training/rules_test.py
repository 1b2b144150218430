"""Tests of training with other optimisers than AdamW."""

import dataclasses
import functools
import pathlib
import tempfile
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import configs
from nested_learning import data
from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning import optimizers
from nested_learning import parameters
from nested_learning import training
from nested_learning.training import matrices
from tests import compiling
from tests.training import tiny

kinds = optimizers.configs


class RulesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    tiny.share_executables(self)
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def config(self, *assignments, **changes):
    return configs.override(tiny.experiment(self.root, **changes), assignments)

  def update(self, config):
    """Returns the first updates, random gradients, and random parameters."""
    table = models.make_model(config.model).table
    optimizer = training.make_optimizer(config, table)
    rng = np.random.default_rng(0)
    draw = lambda p: rng.normal(size=p.shape).astype(np.float32)
    params, gradients = (parameters.map_params(draw, table) for _ in range(2))

    @compiling.jit
    def update(gradients, params):
      return optimizer.update(gradients, optimizer.init(params), params)[0]

    return update(gradients, params), gradients, params

  def test_a_level_has_an_optimizer_of_its_own(self):
    config = self.config(
      'train.warmup_steps=0',
      'train.clip_norm=1e9',
      'model.levels.0.optimizer=sgd',
    )
    self.assertEqual(
      {name: rule.NAME for name, rule in config.rules.items()},
      {'base': 'adamw', 'fast': 'sgd', 'slow': 'adamw'},
    )
    updates, gradients, params = self.update(config)
    rate, decay = config.train.learning_rate, config.train.weight_decay
    of_fast = lambda tree: tree['blocks']['levels']['fast']
    for name, decays in (('up', decay), ('norm', 0.0)):
      np.testing.assert_allclose(
        of_fast(updates)[name],
        -rate * (of_fast(gradients)[name] + decays * of_fast(params)[name]),
        rtol=1e-5,
        err_msg=name,
      )
    plain, *_ = self.update(self.config('train.warmup_steps=0'))
    np.testing.assert_allclose(
      updates['blocks']['mixer']['query'],
      plain['blocks']['mixer']['query'],
      rtol=1e-3,  # AdamW hardly depends on the length of the gradient
    )

  @parameterized.parameters('muon', 'm3')
  def test_matrices_are_those_of_the_model(self, name):
    config = self.config(
      'train.warmup_steps=0', 'train.weight_decay=0', f'train.optimizer={name}'
    )
    updates, *_ = self.update(config)
    mixer = updates['blocks']['mixer']
    for matrix in (
      mixer['query'].reshape(16, 16),  # [layers, embed, heads, head_dim]
      mixer['out'].reshape(16, 16),  # [layers, heads, head_dim, embed]
      updates['blocks']['levels']['fast']['up'][0],
    ):
      scale = 0.2 * 4 * config.train.learning_rate  # consistent_rms
      values = np.linalg.svd(matrix, compute_uv=False) / scale
      self.assertBetween(values.min(), 0.3, 1.6)
      self.assertBetween(values.max(), 0.6, 1.6)
    # Adam's first step has entries of one size.
    for vector in (updates['blocks']['norm'], updates['embedding']):
      self.assertLess(np.ptp(np.abs(vector)), 0.01 * np.abs(vector).max())

  @parameterized.parameters('hope', 'samba')  # memories, a pattern of mixers
  def test_matrices_of_a_family(self, family):
    model = dataclasses.replace(
      models.zoo.make_config(f'{family}_tiny'), max_length=128
    )
    config = tiny.experiment(self.root, model=model)
    table = models.make_model(model).table
    numbers = jax.tree.leaves(
      matrices.dimension_numbers(config),
      is_leaf=lambda x: not isinstance(x, dict),
    )
    is_param = lambda x: isinstance(x, parameters.Param)
    params = jax.tree.leaves_with_path(table, is_leaf=is_param)
    for (path, param), axes in zip(params, numbers, strict=True):
      name = parameters.path_name(path)
      if 'memory' in name:
        continue
      self.assertEqual(axes is not None, param.decay, name)
      if axes is not None:  # from the leading axes to the last ones
        order = (*axes.reduction_axis, *axes.output_axis)
        self.assertEqual(order, tuple(range(1, len(param.shape))), name)

  def test_adamw_traces_no_model(self):
    for name in ('adamw', 'sgd', 'preconditioned_momentum'):
      config = self.config(f'train.optimizer={name}')
      with mock.patch.object(matrices, '_make_loss') as made:
        training.make_optimizer(config, models.make_model(config.model).table)
      made.assert_not_called()


class _Spy:
  """An optimiser whose state is the gradients and energies of the last step."""

  def init(self, params):
    return params, jax.tree.map(lambda _: jnp.zeros(()), params)

  def update(self, gradients, state, params, *, energy):
    del state, params
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    return zeros, (gradients, jax.tree.map(jnp.mean, energy))


@functools.cache
def _capture(*assignments):
  """Returns the gradients and energies of a batch with masked targets."""
  with tempfile.TemporaryDirectory() as root:
    config = configs.override(tiny.experiment(root), assignments)
    batch = next(data.make_iterator(config.data))
  del batch['document']
  batch['mask'] = np.random.default_rng(0).uniform(size=(8, 32)) < 0.3
  model = models.make_model(config.model)
  init = training.make_init(config, model, _Spy())
  step = training.make_step(config, model, _Spy())

  @compiling.jit
  def capture(key):
    return step(init(key), batch)[0].optimizer

  return capture(jax.random.key(0))


class DgdTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    tiny.share_executables(self)
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_samples_are_the_targets_of_all_micro_batches(self):
    gradients, energy = _capture('train.optimizer=dgd')
    # Inputs of these maps have entries of root mean square 1. The level is in
    # the last block, so that tokens without a target are no samples of it.
    of_fast = energy['blocks']['levels']['fast']
    np.testing.assert_allclose(of_fast['up'], 16.0, rtol=1e-3)
    np.testing.assert_allclose(of_fast['norm'], 0.0)
    parts, energy_of_parts = _capture(
      'train.optimizer=dgd', 'train.accumulate=4'
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients, parts)
    jax.tree.map(close, energy, energy_of_parts)

  def test_levels_of_others_have_their_plain_gradient(self):
    plain, _ = _capture('train.optimizer=dgd')
    mixed, energy = _capture(
      'model.levels.0.optimizer=dgd',
      'model.levels.0.optimizer.target=printed',
    )
    for name, other in plain['blocks']['levels'].items():
      same = np.allclose(
        other['up'], mixed['blocks']['levels'][name]['up'], atol=1e-5
      )
      self.assertEqual(same, name == 'slow')
    self.assertEqual(energy['blocks']['levels']['slow']['up'], 0)
    np.testing.assert_allclose(
      plain['embedding'], mixed['embedding'], atol=1e-5
    )

  @parameterized.parameters(
    (['train.optimizer=dgd'], "'fast' learns inside .*set model.levels.0.opt"),
    (
      ['model.levels.1.optimizer=dgd'],
      "'slow' learns .* set model.levels.1.op",
    ),
  )
  def test_refuses_levels_that_learn_inside_rows(self, assignments, message):
    inner = levels.make_inner((8, 16))
    config = configs.override(
      tiny.experiment(self.root, inner=inner), assignments
    )
    table = models.make_model(config.model).table
    with self.assertRaisesRegex(errors.UserError, message) as caught:
      training.make_optimizer(config, table)
    self.assertNotIn('\n', str(caught.exception))

  def test_refuses_a_level_without_maps(self):
    config = configs.override(
      tiny.experiment(self.root), ['model.levels.1.optimizer=dgd']
    )
    table = models.make_model(config.model).table
    none = jax.tree.map(lambda _: False, training.decay_mask(table))
    matrices.find_maps.cache_clear()
    with (
      mock.patch.object(
        optimizers.tracing.capture,
        'trace_maps',
        return_value=(none, {'w': ['sort']}),
      ),
      self.assertRaisesRegex(
        errors.UserError,
        r"no linear map in level 'slow'.*w \(sort\).*levels.1.optimizer=adamw",
      ),
    ):
      training.make_optimizer(config, table)
