"""Measures of a sequence of tasks, against numbers worked out by hand."""

from absl.testing import absltest
import numpy as np

from nested_learning import errors
from nested_learning.evaluation import continual


class ContinualScoresTest(absltest.TestCase):
  def test_by_hand(self):
    scores = [[0.8, 0.1, 0.0], [0.9, 0.7, 0.2], [0.3, 0.5, 0.6]]
    got = continual.continual_scores(scores, untrained=[0.0, 0.05, 0.1])
    self.assertAlmostEqual(got.final, 1.4 / 3)
    self.assertAlmostEqual(got.average, (0.8 + 0.8 + 1.4 / 3) / 3)
    # The first task was best after the second one, before it was forgotten.
    self.assertAlmostEqual(got.forgetting, ((0.9 - 0.3) + (0.7 - 0.5)) / 2)
    self.assertAlmostEqual(got.backward, ((0.3 - 0.8) + (0.5 - 0.7)) / 2)
    self.assertAlmostEqual(got.forward, ((0.1 - 0.05) + (0.2 - 0.1)) / 2)

  def test_nothing_to_forget(self):
    got = continual.continual_scores([[0.5]], [0.1])
    self.assertEqual(got, (0.5, 0.5, 0, 0, 0))

  def test_no_forward_transfer_without_a_start(self):
    self.assertTrue(np.isnan(continual.continual_scores(np.eye(3)).forward))

  def test_refuses_what_is_no_matrix_of_tasks(self):
    with self.assertRaisesRegex(errors.UserError, 'square'):
      continual.continual_scores(np.zeros((2, 3)))
    with self.assertRaisesRegex(errors.UserError, 'each of 2 tasks'):
      continual.continual_scores(np.zeros((2, 2)), [0.0])


if __name__ == '__main__':
  absltest.main()
