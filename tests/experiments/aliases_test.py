"""Tests of the experiment on aliases."""

import json
import pathlib
from unittest import mock

from absl.testing import parameterized

from experiments import aliases
from nested_learning import errors

_CONFIG = aliases.AliasesConfig(hops=(0, 1, 2), num_streams=8)


class AliasesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('delta rule', 'values last', (1, 0, 0)),
    ('delta rule', 'values first', (1, 0, 0)),
    ('delta rule, two layers', 'values last', (1, 1, 0)),
    ('own targets', 'values first', (1, 1, 1)),
    ('own targets', 'values last', (1, 0, 0)),
    ('and keys', 'backwards', (1, 1, 1)),
    ('and keys', 'values last', (1, 1, 0)),
    ('and queries', 'values last', (1, 1, 1)),
    ('and queries', 'backwards', (1, 1, 0)),
  )
  def test_finds_values_by_what_learns(self, name, order, expected):
    right = aliases.measure(_CONFIG, aliases.ROWS[name], order)['right']
    for share, is_found in zip(right, expected, strict=True):
      if is_found:
        self.assertGreater(share, 0.8)
      else:
        self.assertLess(share, 0.65)

  def test_page_says_what_comes_out(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    config = aliases.AliasesConfig(num_streams=2, hops=(0, 3))
    right = {'right': [1.0, 0.625]}
    with mock.patch.object(aliases, 'measure', return_value=right):
      aliases.run(config, str(root), 'train')
    text = (root / 'report.md').read_text()
    self.assertIn('Of values that are 3 aliases away', text)
    self.assertIn('| own targets ', text)
    self.assertIn('1.00 / 0.62', text)
    summary = json.loads((root / 'summary.json').read_text())
    self.assertEqual(summary['and_queries_values_last_3'], 0.62)

  @parameterized.parameters(
    ({'hops': ()}, r'hops=\(\) must be one or more'),
    ({'num_units': 65}, 'num_units=65 must be from 1 to dim=64'),
    ({'num_streams': 0}, 'num_streams=0 must be at least 1'),
  )
  def test_names_what_does_not_fit(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      aliases.AliasesConfig(**changes)
