import pathlib

from absl.testing import absltest
import numpy as np

from nested_learning import evaluation


def make_evaluation(losses, counts):
  losses, counts = np.array(losses), np.array(counts, float)
  return evaluation.Evaluation(
    evaluation.Totals(losses * counts, counts, counts)
  )


class ByPositionTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    counts = [4, 2, 1, 0]
    self.on = make_evaluation([3.0, 2.0, 1.0, 0.0], counts)
    self.off = make_evaluation([3.0, 2.5, 2.0, 0.0], counts)
    self.root = pathlib.Path(self.create_tempdir().full_path)

  def test_gain_is_what_writing_saves(self):
    gain = evaluation.gain_by_position(self.on, self.off)
    np.testing.assert_allclose(gain, [0.0, 0.5, 1.0, np.nan])

  def test_bins_weigh_tokens(self):
    edges = np.array([0, 1, 3, 4])
    means = evaluation.mean_over_bins(self.on, edges)
    np.testing.assert_allclose(means, [3.0, 5.0 / 3.0, np.nan])

  def test_edges_cover_every_position_once(self):
    for num_positions in (1, 2, 3, 64, 100, 1024):
      edges = evaluation.bin_edges(num_positions)
      self.assertEqual((edges[0], edges[-1]), (0, num_positions))
      self.assertTrue(np.all(np.diff(edges) > 0))
    self.assertLess(len(edges), 25)

  def test_table_has_a_line_per_position_that_was_seen(self):
    path = self.root / 'table.csv'
    evaluation.write_table(path, self.on, self.off)
    self.assertEqual(
      path.read_text().splitlines(),
      [
        'position,num_tokens,loss,loss_writes_off,gain',
        '0,4,3.000000,3.000000,0.000000',
        '1,2,2.000000,2.500000,0.500000',
        '2,1,1.000000,2.000000,1.000000',
      ],
    )

  def test_plot_is_an_image(self):
    path = self.root / 'plot.png'
    evaluation.plot(path, self.on, self.off)
    self.assertEqual(path.read_bytes()[1:4], b'PNG')


if __name__ == '__main__':
  absltest.main()
