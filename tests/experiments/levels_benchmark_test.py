"""The benchmark of levels at its smallest."""

import json
import pathlib

from absl.testing import absltest
import pytest

from experiments.benchmarks import levels
from tests import compiling


@pytest.mark.slow
class LevelsBenchmarkTest(absltest.TestCase):
  def test_writes_every_ratio(self):
    self.enterContext(compiling.quickly())
    workdir = pathlib.Path(self.create_tempdir().full_path)
    levels.run(levels.get_config('small'), str(workdir), 'train')
    summary = json.loads((workdir / 'summary.json').read_text())
    for variant in ('', '_dgd', '_all_blocks', '_all_blocks_local'):
      self.assertGreater(summary[f'session_over_frozen{variant}'], 0)
    # One block learns here in all, and what is local spares the logits' pass.
    self.assertLess(summary['bound'], 1)
    self.assertEqual(summary['bound'], summary['bound_all_blocks'])
    self.assertEqual(summary['bound'], summary['bound_dgd'])
    self.assertGreater(summary['bound_all_blocks_local'], summary['bound'])
    self.assertGreater(summary['flatness_to_1m'], 0)
    self.assertEqual(summary['flatness_tokens'], 64)
    self.assertEqual(summary['state_bytes_growth'], 1)
    # Far below 1 even where what is not kept for each segment is in it.
    self.assertLess(summary['meta_memory_exponent'], 0.75)
    self.assertGreater(summary['meta_memory_exponent'], 0)
