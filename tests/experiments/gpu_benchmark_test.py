"""The benchmark of GPUs, with tiny models on a CPU."""

import dataclasses
import json
import pathlib
from unittest import mock

from absl.testing import parameterized

from experiments.benchmarks import gpu
from nested_learning import accelerators
from nested_learning import compilation
from nested_learning import errors
from tests import compiling


class GpuBenchmarkTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def run_small(self, **changes):
    config = dataclasses.replace(gpu.get_config('small'), **changes)
    with compiling.quickly():
      gpu.run(config, str(self.folder), 'train')
    return json.loads((self.folder / 'summary.json').read_text())

  def test_writes_rates_and_ratios(self):
    summary = self.run_small(families=('transformer', 'gated_deltanet'))
    self.assertEqual(summary['transformer_tiny/over_transformer'], 1.0)
    for family in ('transformer', 'gated_deltanet'):
      for name in ('tokens_per_second', 'model_flops', 'counted_bytes'):
        self.assertGreater(summary[f'{family}_tiny/{name}'], 0)
    self.assertNotIn('transformer_tiny/mfu', summary)  # a CPU has no peak

  def test_mfu_and_bandwidth_are_shares_of_the_peaks(self):
    kind = accelerators.GENERATIONS['h100']
    with mock.patch.object(accelerators, 'find_kind', lambda _: kind):
      summary = self.run_small(families=('transformer',))
    get = lambda name: summary[f'transformer_tiny/{name}']
    self.assertAlmostEqual(
      get('mfu'), get('model_flops') / get('seconds') / 989e12
    )
    self.assertAlmostEqual(
      get('bandwidth_share'), get('counted_bytes') / get('seconds') / 3352e9
    )

  def test_names_models_that_are_too_large(self):
    with mock.patch.object(
      compilation, 'compile', lambda _: (None, 'Used 90G of 80G hbm')
    ):
      self.run_small(families=('transformer', 'hope'))
    report = (self.folder / 'report.md').read_text()
    self.assertIn(
      'Larger than the memory: transformer_tiny, hope_tiny.', report
    )

  def test_levels_are_off_in_the_model_that_says_so(self):
    config = gpu.get_config()
    for name, is_on in (('hope_170m', True), ('hope_levels_off_170m', False)):
      experiment = gpu._experiment(config, name)
      self.assertEqual(experiment.inner.is_on, is_on)
      self.assertEqual(experiment.model.embed_dim, 768)

  def test_a_machine_without_a_gpu_is_one_line(self):
    with self.assertRaisesRegex(
      errors.UserError, r"^device='gpu', but JAX has found no GPU, .*:small\.$"
    ):
      gpu.run(gpu.get_config(), str(self.folder), 'train')

  @parameterized.parameters(
    ({'families': ('mamba',)}, "families=('mamba',) must be some of transf"),
    ({'sizes': ('13b',)}, "sizes=('13b',) must be some of tiny"),
    ({'num_steps': 0}, 'num_steps=0 must be at least 1'),
    ({'device': 'tpu'}, "device='tpu'"),
  )
  def test_refuses_what_it_cannot_measure(self, changes, message):
    with self.assertRaises(errors.UserError) as raised:
      gpu.GpuConfig(**changes)
    self.assertIn(message, str(raised.exception))
