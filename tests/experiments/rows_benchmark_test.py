"""Tests of the benchmark over the rows of the sweep over Hope."""

import json
import pathlib

from absl.testing import absltest
import pytest

from experiments.benchmarks import rows
from nested_learning import errors
from tests import compiling


class RowsTest(absltest.TestCase):
  @pytest.mark.slow
  def test_page_has_ratios_and_states(self):
    self.enterContext(compiling.quickly())
    root = pathlib.Path(self.create_tempdir().full_path)
    rows.run(rows.get_config('small'), str(root), 'train')
    summary = json.loads((root / 'summary.json').read_text())
    self.assertEqual(summary['gated_deltanet_speed'], 1.0)
    self.assertGreater(summary['hope_speed'], 0)
    page = (root / 'report.md').read_text()
    self.assertIn(f'Hope has {summary["hope_speed"]:.2f} of the speed', page)
    # Two layers of four heads with two maps of 32 x 64 floats, or one of
    # 32 x 32, and three inputs of the convolution.
    cell = json.loads((root / 'cells/rows/speed.json').read_text())['values']
    self.assertGreater(cell['hope_state_bytes'], 2 * 4 * 2 * 32 * 64 * 4)
    self.assertGreater(cell['gated_deltanet_state_bytes'], 2 * 4 * 32 * 32 * 4)
    self.assertLess(
      3 * cell['gated_deltanet_state_bytes'], cell['hope_state_bytes']
    )

  def test_ratios_need_their_base(self):
    with self.assertRaisesRegex(errors.UserError, 'gated_deltanet'):
      rows.BenchmarkConfig(rows=('hope',))
    self.assertEqual(
      rows.get_config('hope,titans').rows, ('hope', 'titans', 'gated_deltanet')
    )
    with self.assertRaisesRegex(errors.UserError, "'nothing' is no row"):
      rows.measure(rows.get_config('nothing'))
