"""Rows of recall, copying and memorisation, against what they mean."""

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from nested_learning import tasks


def _rows(task, count=20, *, evaluating=False):
  for seed in range(count):
    yield task.make_row(np.random.default_rng(seed), evaluating=evaluating)


class MqarTest(parameterized.TestCase):
  @parameterized.parameters(0, 8, 30)
  def test_the_answer_is_the_last_value_of_the_key(self, num_rewrites):
    task = tasks.MqarConfig(256, 128, num_pairs=8, num_rewrites=num_rewrites)
    replaced = 0
    for row in _rows(task):
      pairs = row.tokens[: 2 * task.num_writes].reshape(-1, 2)
      value = dict(pairs.tolist())  # a later pair replaces an earlier one
      self.assertLen(value, 8)
      self.assertLen(set(pairs[:, 1]), task.num_writes)
      places = np.flatnonzero(row.mask)
      self.assertTrue((places >= 2 * task.num_writes).all())
      self.assertCountEqual(row.tokens[places], value)
      for place in places:
        self.assertEqual(row.targets[place], value[row.tokens[place]])
      first = dict(pairs[::-1].tolist())
      replaced += sum(value[key] != first[key] for key in value)
    self.assertEqual(replaced > 0, num_rewrites > 0)

  def test_queries_follow_the_power_law(self):
    task = tasks.MqarConfig(64, 40, num_pairs=1, random_filler=False)
    places = [int(np.flatnonzero(r.mask)[0]) for r in _rows(task, 4000)]
    expected = np.arange(1, 20) ** (0.01 - 1)
    shares = np.bincount((np.array(places) - 2) // 2, minlength=19) / 4000
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)

  def test_the_filler_is_blank_if_asked(self):
    task = tasks.MqarConfig(64, 40, num_pairs=4, random_filler=False)
    for row in _rows(task):
      self.assertEqual(np.count_nonzero(row.tokens), 8 + 4)


class RecallTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.4)
  def test_values_of_repeated_keys_count_in_evaluation(self, noise):
    task = tasks.RecallConfig(32, 64, num_noise_ids=16, noise=noise)
    for row in _rows(task, evaluating=True):
      seen = {}
      self.assertFalse(row.mask[1::2].any())
      for key, value, target, counts in zip(
        row.tokens[::2],
        row.tokens[1::2],
        row.targets[::2],
        row.mask[::2],
        strict=True,
      ):
        if key >= 16:  # noise
          self.assertFalse(counts)
          continue
        self.assertEqual(value, target)
        self.assertEqual(counts, key in seen)
        self.assertEqual(seen.setdefault(key, value), value)
      self.assertTrue(row.mask[-2])

  def test_every_token_counts_in_training(self):
    for row in _rows(tasks.RecallConfig()):
      np.testing.assert_array_equal(row.tokens[1:], row.targets[:-1])
      self.assertTrue(row.mask[:-1].all())
      self.assertFalse(row.mask[-1])

  def test_the_share_of_noise(self):
    task = tasks.RecallConfig(32, num_noise_ids=16, noise=0.4)
    noisy = np.mean([row.tokens[::2] >= 16 for row in _rows(task, 200)])
    self.assertAlmostEqual(noisy, 0.4, delta=0.02)

  def test_motifs_that_count_were_read_before(self):
    task = tasks.FuzzyRecallConfig()
    for row in _rows(task, 50, evaluating=True):
      sequence = [*row.tokens, row.targets[-1]]
      text = ''.join(chr(token) for token in sequence)
      end = len(text)
      begin = int(np.flatnonzero(row.mask)[-1]) + 1
      while row.mask[begin - 2]:
        begin -= 1
      asked = text[begin - 3 : end]
      self.assertLen(asked[:3], 3)
      self.assertTrue(all(ord(token) < 7 for token in asked[:3]))
      self.assertTrue(all(7 <= ord(token) < 15 for token in asked[3:]))
      self.assertIn(asked, text[: begin - 3])

  def test_motifs_of_every_length_are_keys_in_training(self):
    lengths = set()
    for row in _rows(tasks.FuzzyRecallConfig()):
      is_key = row.tokens < 7
      edges = np.flatnonzero(np.diff(is_key))
      lengths.update(np.diff(edges).tolist())
      self.assertTrue(row.mask.all())
    self.assertContainsSubset({1, 2, 3}, lengths)


class CopyingTest(parameterized.TestCase):
  def test_copies_what_is_not_blank(self):
    task = tasks.SelectiveCopyingConfig()
    for row in _rows(task):
      copied = row.tokens[row.tokens < 14]
      np.testing.assert_array_equal(copied, row.targets[row.mask])
      self.assertEqual(row.mask.nonzero()[0].tolist(), [*range(240, 256)])
      self.assertEqual(row.tokens[239], 15)
      self.assertEqual((row.tokens == 15).sum(), 1)
      self.assertNotEqual(row.tokens[238], 14)  # no blank behind the last

  def test_blanks_are_anywhere(self):
    counts = np.zeros(256)
    for row in _rows(tasks.SelectiveCopyingConfig(), 400):
      counts += row.tokens == 14
    self.assertBetween(counts[:200].min(), 250, 400)


class MemorizationTest(parameterized.TestCase):
  def test_the_table_is_the_same_for_all_rows(self):
    table = {}
    for row in _rows(tasks.MemorizationConfig()):
      self.assertTrue((row.tokens[1::2] == 255).all())
      for key, value in zip(row.tokens[::2], row.targets[1::2], strict=True):
        self.assertEqual(table.setdefault(key, value), value)
        self.assertBetween(value, 127, 254)
    self.assertLen(set(table.values()), len(table))
    other = tasks.MemorizationConfig(map_seed=1)
    (row,) = _rows(other, 1)
    self.assertNotEqual(table[row.tokens[0]], row.targets[1])


class RegressionTest(parameterized.TestCase):
  def test_least_squares_of_the_points_before_finds_the_target(self):
    task = tasks.RegressionConfig(num_dims=3, num_points=8)
    for row in _rows(task):
      x, y = row.tokens[::2], row.tokens[1::2, 0]
      np.testing.assert_array_equal(row.targets[::2], y)
      weights = np.linalg.lstsq(x[:5], y[:5], rcond=None)[0]
      np.testing.assert_allclose(x[5:] @ weights, y[5:], atol=1e-3)

  def test_errors_of_least_squares_are_the_published_ones(self):
    task = tasks.RegressionConfig(num_dims=5, num_points=6)
    error = np.zeros(6)
    for row in _rows(task, 3000):
      x, y = row.tokens[::2], row.tokens[1::2, 0]
      for k in range(6):
        weights = np.linalg.lstsq(x[:k], y[:k], rcond=None)[0]
        error[k] += (x[k] @ weights - y[k]) ** 2 / 5 / 3000
    expected = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    np.testing.assert_allclose(error, expected, atol=0.06)


if __name__ == '__main__':
  absltest.main()
