"""Tests of recall, copying and memorisation."""

from absl.testing import parameterized
import numpy as np

from nested_learning import tasks


def _rows(task, count=20, *, evaluating=False):
  for seed in range(count):
    yield task.make_row(np.random.default_rng(seed), evaluating=evaluating)


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
  def test_targets_are_the_tokens_that_are_not_blank(self):
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
