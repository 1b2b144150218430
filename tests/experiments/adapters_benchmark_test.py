"""Tests of the benchmark of training parts, on a tiny checkpoint."""

import dataclasses
import json
import pathlib

from absl.testing import absltest
import pytest

from experiments.benchmarks import adapters
from nested_learning import errors
from tests import compiling
from tests.experiments import pretrained_streams_test


class AdaptersBenchmarkTest(absltest.TestCase):
  def run_small(self, **changes):
    root = pathlib.Path(self.create_tempdir().full_path)
    config = dataclasses.replace(
      adapters.get_config('bound'),
      source=pretrained_streams_test.write_model(root / 'llama'),
      num_tokens=16,
      memory_layers=(1,),
      memory_heads=1,
      memory_dim=4,
      **changes,
    )
    adapters.run(config, str(root / 'run'), 'train')
    return json.loads((root / 'run/summary.json').read_text())

  def test_counts_less_where_less_is_trained(self):
    found = self.run_small(variants=('levels', 'all'))
    self.assertEqual(list(found), ['bound_levels', 'bound_all'])
    # Forward and backward of everything are three times the forward pass,
    # without what recomputes a product.
    self.assertBetween(found['bound_all'], 0.25, 1 / 3 + 0.01)
    self.assertGreater(found['bound_levels'], 1.25 * found['bound_all'])

  @pytest.mark.slow
  def test_times_every_part(self):
    self.enterContext(compiling.quickly())
    found = self.run_small(repeats=1)
    for name in adapters.VARIANTS:
      self.assertGreater(found[name], 0)

  def test_refuses_other_parts(self):
    with self.assertRaisesRegex(errors.UserError, 'variants'):
      adapters.BenchmarkConfig(variants=('norms',))
