"""Tests of associative recall and regression."""

from absl.testing import parameterized
import numpy as np

from nested_learning import errors
from nested_learning import tasks


def _rows(task, count=20, *, evaluating=False):
  for seed in range(count):
    yield task.make_row(np.random.default_rng(seed), evaluating=evaluating)


def _follow(stands_for, name):
  """Returns the value behind a name, and the number of aliases on the way."""
  hops = 0
  while stands_for[name] < 32:
    name, hops = stands_for[name], hops + 1
  return stands_for[name], hops


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


class AliasesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('values_first', [0, 1, 2]),
    ('values_last', [1, 2, 0]),
    ('backwards', [2, 1, 0]),
  )
  def test_answers_are_found_by_following_the_pairs(self, order, ranks):
    task = tasks.AliasesConfig(64, 4, num_hops=2, order=order)
    for row in _rows(task):
      pairs = row.tokens[: 2 * task.num_pairs].reshape(-1, 2)
      stands_for = dict(pairs.tolist())
      self.assertLen(stands_for, 12)

      told = [_follow(stands_for, name)[1] for name in pairs[:, 0]]
      self.assertEqual(told, np.repeat(ranks, 4).tolist())
      (places,) = np.nonzero(row.mask)
      self.assertCountEqual(row.tokens[places], stands_for)
      for place in places:
        value, _ = _follow(stands_for, row.tokens[place])
        self.assertEqual(row.targets[place], value)
        self.assertNotIn(row.targets[place], row.tokens[2 * task.num_pairs :])

  def test_the_last_aliases_count_in_evaluation(self):
    task = tasks.AliasesConfig(num_hops=2)
    for row in _rows(task, evaluating=True):
      names = row.tokens[: 2 * task.num_pairs : 2].tolist()
      asked = row.tokens[row.mask].tolist()
      self.assertLen(asked, 4)
      # With values first, the last aliases are told last.
      self.assertCountEqual(asked, names[-4:])

  def test_a_stretched_task_has_longer_chains(self):
    task = tasks.make_config('aliases_small').stretched(2)
    self.assertEqual((task.num_hops, task.num_tokens), (3, 64))

  @parameterized.parameters(
    ({'num_chains': 17}, 'num_chains=17 must be at most 16'),
    ({'num_hops': -1}, 'num_hops=-1'),
    ({'order': 'forwards'}, "order='forwards'"),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      tasks.AliasesConfig(**changes)


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
