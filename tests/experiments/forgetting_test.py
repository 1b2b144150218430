"""Tests of the experiment on what a map forgets."""

import json
import pathlib

from absl.testing import parameterized
import numpy as np

from experiments.optimizers import forgetting
from nested_learning import errors

_CONFIG = forgetting.ForgettingConfig(
  num_inputs=8,
  num_outputs=16,
  ranks=(2, 8),
  num_steps=12,
  shown_step=4,
  num_seeds=64,
)


class ForgettingTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 4)
  def test_delta_rule_keeps_what_it_does_not_read(self, rank):
    found = forgetting.measure(_CONFIG, 'DGD corrected, squared error', rank)
    # A step halves the memory along its input, on average over inputs that
    # lie alike in all directions.
    expected = (1 - 0.5 / rank) ** np.arange(1, 13)
    np.testing.assert_allclose(found['inside'], expected, atol=0.08)
    np.testing.assert_allclose(found['outside'], 1, atol=1e-5)
    share = rank / _CONFIG.num_inputs
    whole = share * found['inside'] + 1 - share
    np.testing.assert_allclose(found['whole'], whole, atol=0.03)

  @parameterized.parameters(
    'DGD printed, dot product', 'DGD corrected, squared error'
  )
  def test_it_is_gradient_descent_on_the_squared_error(self, name):
    found = forgetting.measure(_CONFIG, name, 2)
    expected = forgetting.measure(_CONFIG, 'gradient descent, squared error', 2)
    for part, values in found.items():
      np.testing.assert_allclose(values, expected[part], rtol=1e-4, atol=1e-5)

  def test_decay_is_the_same_everywhere(self):
    found = forgetting.measure(_CONFIG, 'the same with weight decay', 2)
    expected = (1 - 0.5 / 8) ** np.arange(1, 13)
    np.testing.assert_allclose(found['outside'], expected, rtol=1e-4)

  def test_page_says_what_comes_out(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    forgetting.run(_CONFIG, str(root / 'run'), 'train')
    text = (root / 'run/report.md').read_text()
    summary = json.loads((root / 'run/summary.json').read_text())
    inside = summary['dgd_printed_dot_product_rank_2_inside']
    self.assertIn(f'{inside:.3f} is left after 4 inputs in 2', text)
    self.assertIn('more is lost where inputs vary', text)

  def test_names_what_does_not_fit(self):
    with self.assertRaisesRegex(errors.UserError, r'ranks=\(9,\)'):
      forgetting.ForgettingConfig(num_inputs=8, ranks=(9,))
    with self.assertRaisesRegex(errors.UserError, 'shown_step=13'):
      forgetting.ForgettingConfig(num_steps=12, shown_step=13)
