"""The benchmark beside PyTorch, without PyTorch."""

import dataclasses
import json
import pathlib
import sys

from absl.testing import absltest

from experiments.benchmarks import peers
from nested_learning import errors

_RATES = {'train_16': 2.0, 'mac': 4.0, 'lmm_16': 8.0, 'decode': 16.0}


class PeersBenchmarkTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def test_divides_by_the_rates_of_the_peers(self):
    program = self.folder / 'python'
    program.write_text(f"#!/bin/sh\necho noise\necho '{json.dumps(_RATES)}'\n")
    program.chmod(0o755)
    config = dataclasses.replace(peers.get_config('small'), python=str(program))
    peers.run(config, str(self.folder / 'run'), 'train')
    path = self.folder / 'run' / 'summary.json'
    summary = json.loads(path.read_text('utf-8'))
    for peer, rate in _RATES.items():
      ours = [
        name
        for name in summary
        if name.startswith(peer) and f'{name}_ratio' in summary
      ]
      self.assertNotEmpty(ours, peer)
      for name in ours:
        self.assertGreater(summary[name], 0)
        self.assertAlmostEqual(summary[f'{name}_ratio'], summary[name] / rate)

  def test_says_what_to_install(self):
    config = dataclasses.replace(
      peers.get_config('small'), python=sys.executable
    )
    with self.assertRaisesRegex(
      errors.UserError, 'cannot run the peers: .*torch.*what to install'
    ):
      peers.run(config, str(self.folder), 'train')
    config = dataclasses.replace(config, python=str(self.folder / 'none'))
    with self.assertRaisesRegex(errors.UserError, 'cannot be started: No such'):
      peers.run(config, str(self.folder), 'train')
