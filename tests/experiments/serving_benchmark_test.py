"""The benchmark of the server at its smallest, and a short soak."""

import json
import pathlib

from absl.testing import absltest
import pytest

from experiments.benchmarks import serving
from tests import compiling


@pytest.mark.slow
class ServingBenchmarkTest(absltest.TestCase):
  def test_writes_every_number(self):
    self.enterContext(compiling.quickly())
    workdir = pathlib.Path(self.create_tempdir().full_path)
    serving.run(serving.get_config('small'), str(workdir), 'train')
    summary = json.loads((workdir / 'summary.json').read_text())
    for way in ('learning', 'resting', 'alone'):
      for count in (1, 3):
        self.assertGreater(summary[f'tokens_per_second_{way}_{count}'], 0)
        first = summary[f'first_{way}_{count}_p50']
        self.assertLess(first, summary[f'seconds_{way}_{count}_p95'])
    self.assertEqual(summary['soak_requests'], 60)
    self.assertEqual(summary['soak_arrays'], 0)
    self.assertEqual(summary['soak_failed'], 0)
    self.assertLess(summary['soak_growth'], 1.2)
