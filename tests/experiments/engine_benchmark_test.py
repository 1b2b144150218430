"""The engine's benchmark runs at a small size and leaves what a run leaves."""

import json
import pathlib

from absl.testing import absltest
import pytest

from experiments.benchmarks import engine
from nested_learning import errors


class EngineBenchmarkTest(absltest.TestCase):
  @pytest.mark.slow
  def test_writes_every_ratio(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    engine.run(engine.get_config('small'), str(folder), 'train')
    summary = json.loads((folder / 'summary.json').read_text(encoding='utf-8'))
    for name in (
      'chunk_over_token_loop',
      'hope_over_transformer',
      'flatness_1k_32k',
      'flatness_1k_32k_work',
      'decode_flatness_1k_100k',
      'share_of_matmul_rate',
    ):
      self.assertGreater(summary[name], 0, name)
    self.assertEqual(summary['state_bytes_100k_over_1k'], 1)
    self.assertTrue((folder / 'report.md').is_file())
    self.assertTrue((folder / 'metrics.jsonl').is_file())
    self.assertTrue((folder / 'config.json').is_file())

  def test_refuses_other_sizes_and_modes(self):
    with self.assertRaisesRegex(errors.UserError, "'huge' must be 'small'"):
      engine.get_config('huge')
    with self.assertRaisesRegex(errors.UserError, '--mode=eval'):
      engine.run(engine.get_config('small'), 'unused', 'eval')
