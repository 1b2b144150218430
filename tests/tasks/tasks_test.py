"""Tests of every task: deterministic, well formed, checked."""

import dataclasses
import itertools

from absl.testing import parameterized
import numpy as np

from nested_learning import configs
from nested_learning import errors
from nested_learning import tasks


def _small(name):
  """Returns a task of the registry with short text."""
  config = tasks.TASKS[name]
  if config.num_tokens > 2000:
    return dataclasses.replace(config, num_tokens=1536)
  return config


class EveryTaskTest(parameterized.TestCase):
  @parameterized.parameters(*tasks.TASKS)
  def test_rows_are_well_formed(self, name):
    task = _small(name)
    data = tasks.TaskDataConfig(task, seed=3)
    for split, index in itertools.product(('train', 'validation'), range(4)):
      row = tasks.make_row(data, index, split=split)
      self.assertLen(row.tokens, task.num_tokens)
      self.assertEqual(row.targets.shape, row.mask.shape)
      self.assertTrue(row.mask.any())
      if task.vocab_size:
        self.assertEqual(row.tokens.dtype, np.int32)
        self.assertBetween(row.tokens.min(), 0, task.vocab_size - 1)
        self.assertBetween(row.targets.min(), 0, task.vocab_size - 1)
        self.assertLess(row.targets.max(), task.vocab_size)
      again = tasks.make_row(data, index, split=split)
      for a, b in zip(row, again, strict=True):
        np.testing.assert_array_equal(a, b)

  @parameterized.parameters(*tasks.TASKS)
  def test_rows_differ_by_index_split_and_seed(self, name):
    data = tasks.TaskDataConfig(_small(name))
    other = dataclasses.replace(data, seed=1)

    def rows(data, split, begin):
      made = [
        tasks.make_row(data, index, split=split)
        for index in range(begin, begin + 8)
      ]
      return np.stack([np.ravel(row.targets * row.mask) for row in made])

    first = rows(data, 'train', 0)
    for differing in (
      rows(data, 'train', 8),
      rows(data, 'validation', 0),
      rows(other, 'train', 0),
    ):
      self.assertTrue((first != differing).any())

  @parameterized.parameters(*sorted(set(tasks.TASKS) - {'compression'}))
  def test_stretched_rows_are_longer(self, name):
    task = _small(name)
    longer = task.stretched(2)
    self.assertEqual(longer.num_tokens, 2 * task.num_tokens)
    self.assertEqual(longer.vocab_size, task.vocab_size)
    self.assertLen(
      longer.make_row(np.random.default_rng(0)).tokens, 2 * task.num_tokens
    )

  @parameterized.parameters(*tasks.TASKS)
  def test_is_a_config(self, name):
    longer = (2, 4) if name != 'compression' else ()
    data = tasks.TaskDataConfig(tasks.TASKS[name], longer=longer)
    self.assertEqual(configs.from_json(configs.to_json(data)), data)

  def test_unknown_names_get_the_nearest(self):
    with self.assertRaisesRegex(
      errors.UserError, "'mqr'; the nearest are mqar"
    ):
      tasks.make_config('mqr')
    with self.assertRaisesRegex(errors.UserError, "'num_pair'.* is num_pairs"):
      tasks.make_config('mqar', num_pair=3)
    self.assertEqual(tasks.make_config('mqar', num_pairs=3).num_pairs, 3)

  @parameterized.parameters(
    ('mqar_small', {'num_pairs': 64}, 'num_pairs=64 .* most the 63 keys'),
    ('mqar_small', {'num_pairs': 20}, 'num_tokens=64 .* at least 80'),
    ('mqar_small', {'num_tokens': 65}, 'num_tokens=65 must be even'),
    ('mqar_small', {'num_rewrites': 60}, 'num_rewrites=60 .* at most 48'),
    ('recall', {'noise': 0.5}, 'num_noise_ids=0 must be at least 1'),
    ('recall', {'num_noise_ids': 15}, 'vocab_size=16 must be at least 17'),
    ('fuzzy_recall', {'motif_size': 8}, 'motif_size=8 .* the 7 keys'),
    ('selective_copying', {'num_copied': 128}, 'num_tokens=256 .* above 257'),
    ('memorization', {'num_tokens': 7}, 'num_tokens=7 must be even'),
    ('compression', {'num_tokens': 1}, 'num_tokens=1 must be at least 2'),
    ('niah_single_1_small', {'num_tokens': 38}, 'num_tokens=38 .* at least 45'),
    (
      'niah_single_1_small',
      {'haystack': 'hay'},
      "'hay' must be one of 'noise'",
    ),
    ('niah_single_1_small', {'num_keys': 65}, 'num_keys=65 .* the 64 keys'),
    ('niah_single_1_small', {'num_queries': 2}, 'num_queries=2 .* num_keys=1'),
    ('niah_multikey_1', {'num_keys': 41}, 'num_keys=41 must be .* at most 40'),
    ('parity', {'language': 'dyck'}, "language='dyck' must be one of 'parity'"),
    ('abab', {'min_length': 49}, r'max_length=50 .* multiple of 4 between'),
    ('s5', {'group': 'S6'}, "group='S6' must be one of"),
    ('qa3', {'num_facts': 2}, 'num_facts=2 must be at least 3'),
    ('qa1_small', {'num_tokens': 100}, 'num_tokens=100 must be at least 128'),
    ('documents', {'max_attributes': 49}, 'max_attributes=49 .* most the 48'),
    ('documents_small', {'num_tokens': 30}, 'num_tokens=30 .* at least 37'),
    ('regression', {'num_dims': 0}, 'num_dims=0 must be at least 1'),
  )
  def test_impossible_settings_are_refused(self, name, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      tasks.make_config(name, **changes)

  def test_compression_has_one_length(self):
    with self.assertRaisesRegex(errors.UserError, 'set data.longer=()'):
      tasks.TaskDataConfig(tasks.TASKS['compression'], longer=(2,))
