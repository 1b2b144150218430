"""Runs that train a part of a pretrained model."""

import contextlib
import io

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from nested_learning import configs
from nested_learning import errors
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning import subtrees
from nested_learning import training
from nested_learning.pretrained import tensors as tensors_lib
from nested_learning.training import checkpoint_files
from nested_learning.training import lora
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import sharded_step
from nested_learning.training import step as step_lib
from nested_learning.training import trainable
from nested_learning.training import trainer
from tests import compiling
from tests.training import pretrained_runs_test

_MEMORY = (
  'model.placement.memory=MemoryMixerConfig',
  'model.placement.memory.num_heads=2',
  'model.placement.memory.head_dim=4',
  'model.placement.memory.adaptive=',
  'model.placement.memory.kind=matrix',
  'model.placement.memory.initial=zero',
  'model.placement.memory.target=value',
  'model.placement.memory.chunk_size=8',
  'model.placement.memory_layers=1',
)


class TrainableTest(pretrained_runs_test.Imports):
  def experiment(self, *changes, **settings):
    """Imports a model in bfloat16; returns an experiment on it."""
    base = self.imported(dtype=ml_dtypes.bfloat16, **settings)
    (self.root / 'text.txt').write_text(pretrained_runs_test.TEXT * 100)
    return configs.override(
      base,
      [
        f'data.source={self.root / "text.txt"}',
        f'data.cache_dir={self.root / "cache"}',
        'data.sequence_length=16',
        'data.validation_fraction=0',
        'train.num_steps=2',
        'train.warmup_steps=0',
        'train.learning_rate=1e-2',
        'generate.num_tokens=2',
        'generate.prompt=a',
        *changes,
      ],
    )

  def train(self, config, name='tuned'):
    with compiling.quickly(), contextlib.redirect_stdout(io.StringIO()):
      training.run(config, self.root / name, 'train')

  def moved(self, config, name='tuned'):
    """Returns the paths of the parameters that training changed."""
    before = self.restore(config, self.workdir)
    after = self.restore(config, self.root / name)
    return {
      path
      for path, a, b in zip(
        subtrees.paths(before),
        jax.tree.leaves(before),
        jax.tree.leaves(after),
        strict=True,
      )
      if not np.array_equal(a, b)
    }

  def test_memories_alone(self):
    config = self.experiment(*_MEMORY, 'train.trainable=memory')
    self.train(config)
    moved = self.moved(config)
    self.assertNotEmpty(moved)
    for path in moved:
      self.assertStartsWith(path, 'blocks/1/mixer/memory/')
    # The checkpoint holds nothing else, and names the base.
    folder = self.root / 'tuned' / 'checkpoints' / '2'
    manifest = checkpoint_files.read_manifest(folder)
    for path in manifest['arrays']:
      if not path.startswith(('guard/', 'optimizer/')):
        self.assertStartsWith(path, 'params/blocks/1/mixer/memory/')
    self.assertLen(manifest['base_fingerprint'], 16)
    # The frozen parameters keep their type.
    params = self.restore(config, self.root / 'tuned')
    self.assertEqual(params['embedding'].dtype, jnp.bfloat16)
    # A run goes on from it.
    longer = configs.override(config, ['train.num_steps=3'])
    self.train(longer)
    self.assertTrue((self.root / 'tuned' / 'checkpoints' / '3').is_dir())

  @parameterized.parameters(
    ('lora', (), r'blocks/mixer/(query|key|value|out)'),
    ('levels', (), r'blocks/levels/mlp/.*'),
    ('*norm', (), r'norm|blocks/norm|blocks/levels/mlp/norm'),
    (
      'memory+lora',
      _MEMORY,
      r'blocks/[01]/mixer/(attention/)?(query|key|value|out)'
      r'|blocks/1/mixer/memory/.*',
    ),
  )
  def test_parts(self, part, changes, pattern):
    config = self.experiment(*changes, f'train.trainable={part}')
    self.train(config)
    for path in self.moved(config):
      self.assertRegex(path, f'^({pattern})$')
    self.assertNotEmpty(self.moved(config))

  def test_frozen_parameters_cost_no_optimiser_and_are_sharded(self):
    config = self.experiment(
      *_MEMORY, 'train.trainable=memory', 'data.batch_size=8', 'mesh.fsdp=4'
    )
    model = models.make_model(config.model)
    optimizer = optimizer_lib.make_optimizer(config, model.table)
    mesh = trainer.make_mesh(config)
    state = sharded_step.abstract_state(config, model, optimizer, mesh)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    own = parameters.count(trainable.trained_table(config, model.table))
    self.assertEqual(count(state.params), own)
    self.assertBetween(count(state.optimizer), 2 * own, 2 * own + 20)  # Adam
    self.assertEqual(count(state.frozen), parameters.count(model.table) - own)
    self.assertEqual(
      state.frozen['embedding'].sharding,
      sharding.param_shardings(model.table, mesh)['embedding'],
    )
    self.assertEqual(
      {x.dtype for x in jax.tree.leaves(state.frozen)},
      {jnp.dtype(jnp.bfloat16)},
    )

  def test_gradients_are_those_of_the_whole_model(self):
    config = self.experiment(*_MEMORY, 'train.trainable=memory')
    whole = configs.override(config, ['train.trainable=all'])
    norms = []
    for run in (config, whole):
      model = models.make_model(run.model)
      optimizer = optimizer_lib.make_optimizer(run, model.table)
      tokens = np.random.default_rng(0).integers(30, size=(2, 16))
      batch = {
        'tokens': tokens,
        'targets': np.roll(tokens, -1, 1),
        'mask': np.ones((2, 16), bool),
        'reset': np.zeros((2, 16), bool),
      }
      params = self.restore(config, self.workdir)
      state = step_lib.make_init(run, model, optimizer)(
        jax.random.key(0), params
      )
      step = compiling.jit(step_lib.make_step(run, model, optimizer))
      after, metrics = step(state, batch)
      norms.append(metrics['gradient_norm'])
      if run is config:
        jax.tree.map(np.testing.assert_array_equal, after.frozen, state.frozen)
    self.assertGreater(norms[1], norms[0])
    self.assertGreater(norms[0], 0)

  def test_refuses_another_base(self):
    config = self.experiment('train.trainable=levels')
    self.train(config)
    folder = self.workdir / 'pretrained'
    tensors = {
      name: tensors_lib.from_array(np.array(tensor.read()))
      for name, tensor in tensors_lib.open_folder(folder).items()
    }
    norm = tensors['model.norm.weight'].read()
    tensors['model.norm.weight'] = tensors_lib.from_array(norm * 2)
    tensors_lib.write_folder(folder, tensors)
    with self.assertRaisesRegex(
      errors.UserError, 'was trained on another base .fingerprint .*set base'
    ):
      self.restore(config, self.root / 'tuned')
    with self.assertRaisesRegex(errors.UserError, 'on another base'):
      self.train(configs.override(config, ['train.num_steps=3']))

  def test_refusals(self):
    config = self.experiment()
    for changes, message in (
      (['train.trainable=memory'], "has no parameter 'memory'; name all"),
      (['train.trainable=block/*'], "has no parameter 'block/\\*'"),
      (['train.trainable=lora', 'base=none'], 'which are random where base'),
      (['train.trainable=lora', 'train.optimizer=dgd'], '=dgd needs the inp'),
      (['train.lora_rank=0'], 'train.lora_rank=0 must be at least 1'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        self.train(configs.override(config, changes))

  def test_refuses_other_parts_of_a_checkpoint(self):
    config = self.experiment('train.trainable=*norm')
    self.train(config)
    other = configs.override(config, ['train.trainable=levels'])
    with self.assertRaisesRegex(
      errors.UserError, r"train.trainable='\*norm', and this config has 'lev"
    ):
      self.restore(other, self.root / 'tuned')


class LoraTest(absltest.TestCase):
  def test_changes_are_low_rank_and_begin_at_zero(self):
    config = models.zoo.make_config('transformer_tiny')
    model = models.make_model(config)
    params = compiling.jit(model.init_params)(jax.random.key(0))
    changes = parameters.init(jax.random.key(1), lora.table(model.table, 3))
    same = lora.merge(params, changes)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    rng = np.random.default_rng(0)
    changes = jax.tree.map(lambda x: rng.normal(size=x.shape), changes)
    merged = lora.merge(params, changes)
    for name in ('query', 'out'):
      change = merged['blocks']['mixer'][name] - params['blocks']['mixer'][name]
      matrix = change.reshape(2, *((-1, 32) if name == 'out' else (32, -1)))
      rank = np.linalg.matrix_rank(np.asarray(matrix), tol=1e-4)
      np.testing.assert_array_equal(rank, 3)
