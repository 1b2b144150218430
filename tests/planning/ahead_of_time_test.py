"""Tests ahead-of-time compilation, for CPUs and, if installed, with libtpu."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap
from unittest import mock

from absl.testing import parameterized
import jax
import pytest

from nested_learning import accelerators
from nested_learning import compilation
from nested_learning import configs
from nested_learning import data
from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning import parameters
from nested_learning import sharding
from nested_learning import training
from nested_learning.planning import ahead_of_time
from nested_learning.planning import suggestions
from nested_learning.planning import tables
from tests import compiling
from tests.training import tiny

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_TOPOLOGY = accelerators.find('v5e:2x4')
_BATCH = data.DataConfig(
  source='none',  # nothing is read
  tokenizer='none.model',
  sequence_length=64,
  batch_size=16,
)


def _config(name='transformer', **mesh):
  if name == 'transformer':
    model = dataclasses.replace(
      tiny.MODEL, levels=(models.LevelConfig('mlp', mlp_dim=32),)
    )
  else:
    model = models.zoo.make_config(name)
  return training.ExperimentConfig(
    name=name,
    model=dataclasses.replace(model, vocab_size=264, remat='layer'),
    data=_BATCH,
    mesh=sharding.MeshConfig(**mesh),
  )


class AheadOfTimeTest(parameterized.TestCase):
  def test_summary(self):
    config = _config(data=2, fsdp=2, model=2)
    with compiling.quickly():
      summary = ahead_of_time.compile_for(config, _TOPOLOGY, jax.devices())
    self.assertTrue(summary['fits'])
    self.assertEqual(
      summary['mesh'], {'data': 2, 'fsdp': 2, 'context': 1, 'model': 2}
    )
    # The devices do together what the step is, and nothing twice.
    self.assertAlmostEqual(summary['flops_ratio'], 1.0, delta=0.02)
    # One recomputation of the blocks is all that is beyond the model.
    self.assertBetween(summary['flops'] / summary['model_flops'], 1.0, 4 / 3)
    self.assertEqual(summary['collectives_in_memory_scans'], 0)
    for name in ('flops', 'traffic', 'results'):  # a Transformer has none
      self.assertEqual(summary[f'{name}_in_memories'], 0.0)
    self.assertBetween(summary['collective_share'], 0.001, 0.5)
    for kind in ('all_gather_fsdp', 'all_reduce_model'):
      self.assertGreater(summary[f'collective_bytes_{kind}'], 0)
    self.assertLess(summary['decode']['flops'], summary['flops'] / 100)
    self.assertLess(summary['step_seconds_overlapped'], summary['step_seconds'])
    json.dumps(summary)  # has nothing that JSON has not
    # What is handed over is the state where the table says, and a batch.
    mesh = sharding.make_mesh(config.mesh)
    model = models.make_model(config.model)
    state = training.abstract_state(
      config, model, training.make_optimizer(config, model.table), mesh
    )
    kept = sharding.bytes_per_device(
      state, jax.tree.map(lambda x: x.sharding, state)
    )
    batch = 16 * 64 * (4 + 4 + 1 + 1) // 4
    self.assertAlmostEqual(summary['argument_bytes'], kept + batch, delta=2048)
    whole = 3 * 4 * summary['parameters']  # Adam has two moments
    self.assertLess(summary['argument_bytes'], whole / 3)
    text = tables.describe(config, summary)
    self.assertIn('| all_gather_fsdp', text)
    self.assertIn('| blocks/mixer/out', text)
    self.assertIn('heads: model, embed: fsdp', text)

  def test_compiles_decoding_with_levels_that_learn(self):
    config = dataclasses.replace(
      _config(), inner=levels.make_inner((8,), objective='dot')
    )
    model = models.make_model(config.model, config.inner)
    mesh = sharding.make_mesh(config.mesh)
    abstract = training.abstract_state(
      config, model, training.make_optimizer(config, model.table), mesh
    )
    traced = ahead_of_time._trace_decode(config, model, abstract.params, mesh)
    logits, _ = traced.out_info
    self.assertEqual(logits.shape, (16, 1, 264))

  def test_counts_flops_of_a_traced_step(self):
    function = lambda a, b: jax.numpy.tanh(a @ b) @ b
    x = jax.ShapeDtypeStruct((8, 8), 'float32')
    self.assertEqual(
      compilation.jaxpr_flops(jax.jit(function).trace(x, x).jaxpr),
      compilation.matmul_flops(function, x, x),
    )

  @parameterized.parameters(
    ({'data': 8, 'model': 4, 'fsdp': 1}, 16, 'does not use the 8 devices'),
    ({'data': 1, 'model': 8}, 16, "'heads' of size 2 .* mesh.model"),
    ({'data': 8}, 12, '12 rows .* multiple of the 8 devices'),
    ({'data': -1}, 4, '4 rows .* over 4 of 8 devices, .* mesh.model'),
  )
  def test_rejects_before_compiling(self, mesh, rows, message):
    config = dataclasses.replace(
      _config(**mesh), data=dataclasses.replace(_BATCH, batch_size=rows)
    )
    with mock.patch.object(compilation, 'compile') as compiles:
      with self.assertRaisesRegex(errors.UserError, message):
        ahead_of_time.compile_for(config, _TOPOLOGY, jax.devices())
    compiles.assert_not_called()

  def test_rejects_a_folder_that_holds_a_run(self):
    folder = self.create_tempdir()
    folder.create_file('config.json')
    with self.assertRaisesRegex(errors.UserError, 'holds a run'):
      ahead_of_time.run(_config(), _TOPOLOGY, pathlib.Path(folder.full_path))

  @parameterized.parameters(('v5e', 'libtpu'), ('h100', 'plugin for CUDA'))
  def test_names_the_missing_compiler(self, name, missing):
    with (
      mock.patch.object(importlib.util, 'find_spec', return_value=None),
      mock.patch.dict(os.environ),
    ):
      os.environ.pop('TPU_LIBRARY_PATH', None)
      topology = accelerators.find(f'{name}:2x2')
      with self.assertRaisesRegex(errors.UserError, f'{missing}.*pip install'):
        compilation.find_devices(topology)


class SuggestionsTest(parameterized.TestCase):
  def find(self, fits):
    """Searches where a program compiles if `fits(config)`."""
    seen = []

    def try_one(config, devices):
      seen.append(config)
      return None if fits(config) else 'Used 20G of 15.75G hbm'

    with mock.patch.object(suggestions, '_try', try_one):
      return suggestions.find(_config(), _TOPOLOGY, jax.devices()), seen

  def test_takes_the_first_that_fits(self):
    (config, tried), seen = self.find(lambda config: True)
    self.assertLen(tried, 1)
    self.assertIs(config, seen[0])
    self.assertEqual(config.mesh, sharding.MeshConfig(data=1, fsdp=8))
    self.assertEqual(config.train.accumulate, 1)

  def test_continues_with_meshes_that_need_less_memory(self):
    (config, tried), seen = self.find(lambda c: c.train.accumulate > 1)
    self.assertEqual([one['fits'] for one in tried], [False, True])
    self.assertLen(seen, 2)
    kept = lambda c: c.micro_batch_size * c.mesh.model
    self.assertLess(kept(seen[1]), kept(seen[0]))
    text = tables.describe_tried(tried)
    self.assertIn('15.75G', text)
    self.assertIn('--set=mesh.model=1 --set=mesh.fsdp=8', text)

  @parameterized.parameters(
    ('sgd', 0, 0), ('adamw', 2, 2), ('ademamix', 3, 3), ('m3', 2, 4)
  )
  def test_counts_the_state_of_the_optimizer(self, name, least, most):
    config = configs.override(_config(), [f'train.optimizer={name}'])
    table = models.make_model(config.model).table
    share = suggestions._share_of_optimizer(config, table)
    self.assertBetween(share, least, most + 0.01)  # and some counters
    if name == 'm3':  # 4 for matrices, 2 for the embedding and norms
      rest = 264 * 16 + 3 * 16
      matrices = parameters.count(table) - rest
      expected = (4 * matrices + 2 * rest) / (matrices + rest)
      self.assertAlmostEqual(share, expected, delta=0.01)

  def test_rejects_if_nothing_fits(self):
    with self.assertRaisesRegex(errors.UserError, 'nothing fits of .*remat'):
      self.find(lambda config: False)

  def test_rejects_if_no_mesh_divides(self):
    config = dataclasses.replace(
      _config(), data=dataclasses.replace(_BATCH, batch_size=3)
    )
    with self.assertRaisesRegex(errors.UserError, '3 rows'):
      suggestions.find(config, _TOPOLOGY, jax.devices())


class CompilerTest(parameterized.TestCase):
  """The compilers of accelerators, where they are installed."""

  @pytest.mark.extra
  def test_compiles_for_tpus(self):
    self.compile_for_tpus('transformer')

  @pytest.mark.slow
  def test_compiles_hope_for_tpus(self):
    # Of a single chunk, the compiler drops the loop and with it what the
    # backward pass recomputes, which the count of operations has.
    self.compile_for_tpus('hope_tiny', sequence_length=128)

  @pytest.mark.slow
  def test_scans_on_gpus_have_no_collectives(self):
    if not any(
      importlib.util.find_spec('jax_plugins')
      and importlib.util.find_spec(f'jax_plugins.xla_cuda{version}')
      for version in (12, 13)
    ):
      self.skipTest('no plugin for CUDA is installed')
    summary, _ = self.compile(
      f"""configs.override(
        configs.load({str(_ROOT / 'experiments' / 'hope.py:170m')!r}),
        ['model.num_layers=1', 'data.sequence_length=256',
         'data.batch_size=16', 'inner.levels=()'],
      )""",
      'h100:1x8',
    )
    self.assertEqual(summary['collectives_in_memory_scans'], 0)
    self.assertGreater(summary['flops_in_memories'], 0)
    self.assertAlmostEqual(summary['flops_ratio'], 1.0, delta=0.02)

  def compile_for_tpus(self, name, sequence_length=64):
    if not (
      importlib.util.find_spec('libtpu') or os.environ.get('TPU_LIBRARY_PATH')
    ):
      self.skipTest("libtpu is not installed: pip install '.[tpu]'")
    summary, printed = self.compile(
      f"""configs.override(
        ahead_of_time_test._config({name!r}, data=2, fsdp=2),
        ['data.sequence_length={sequence_length}'],
      )""",
      'v5e:2x2',
    )
    self.assertTrue(summary['fits'])
    self.assertAlmostEqual(summary['flops_ratio'], 1.0, delta=0.02)
    self.assertGreater(summary['collective_bytes_reduce_scatter_fsdp'], 0)
    self.assertBetween(summary['mfu_estimate'], 0.0, summary['mfu_bound'])
    self.assertIn(f'# {name} on v5e:2x2', printed)

  def compile(self, config, topology):
    """Returns summary and output of a process, since libtpu may end it."""
    code = f"""
import pathlib
from nested_learning import accelerators
from nested_learning import configs
from nested_learning import planning
from tests.planning import ahead_of_time_test

config = {textwrap.dedent(config)}
topology = accelerators.find({topology!r})
planning.run(config, topology, pathlib.Path('.'))
"""
    folder = self.create_tempdir().full_path
    path = [str(_ROOT), os.environ.get('PYTHONPATH', '')]
    result = subprocess.run(
      [sys.executable, '-c', code],
      cwd=folder,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, path))},
      capture_output=True,
      text=True,
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    summary = json.loads(pathlib.Path(folder, 'summary.json').read_text())
    return summary, result.stdout
