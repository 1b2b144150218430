"""The settings of suites."""

from absl.testing import absltest

from experiments import suites
from nested_learning import tasks


class MadTest(absltest.TestCase):
  def test_changes_one_setting_at_a_time(self):
    suite = suites.mad()
    counts = {name: len(settings) for name, settings in suite.items()}
    self.assertEqual(
      counts,
      {
        'recall': 1 + 3 + 3 + 4,
        'noisy_recall': 1 + 3 + 3 + 4 + 3,
        'fuzzy_recall': 1 + 3 + 3 + 4,
        'selective_copying': 1 + 3 + 2 + 3 + 4,
        'memorization': 1 + 5,
        'compression': 1 + 3 + 3 + 4,
      },
    )
    for name, settings in suite.items():
      self.assertEqual(settings['baseline'].task, tasks.make_config(name))
    self.assertEqual(suite['memorization']['baseline'].num_examples, 256)
    changed = suite['recall']['num_examples=800']
    self.assertEqual(changed.num_examples, 800)
    self.assertEqual(changed.task, suite['recall']['baseline'].task)
    longer = suite['fuzzy_recall']['num_tokens=1024'].task
    self.assertEqual(longer, tasks.FuzzyRecallConfig(num_tokens=1024))

  def test_every_setting_makes_rows(self):
    for settings in suites.mad().values():
      for data in settings.values():
        row = tasks.make_row(data, 0)
        self.assertLen(row.tokens, data.task.num_tokens)


if __name__ == '__main__':
  absltest.main()
