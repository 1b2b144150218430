"""Every task at its published and at its small settings, by name.

    config = tasks.make_config('mqar_small', num_pairs=8)

A capable model learns a `_small` setting in minutes on two cores.
"""

import dataclasses
import difflib
from typing import Any

from nested_learning import errors
from nested_learning.tasks.documents import DocumentConfig
from nested_learning.tasks.in_context import AliasesConfig
from nested_learning.tasks.in_context import MqarConfig
from nested_learning.tasks.in_context import RegressionConfig
from nested_learning.tasks.mad import CompressionConfig
from nested_learning.tasks.mad import FuzzyRecallConfig
from nested_learning.tasks.mad import MemorizationConfig
from nested_learning.tasks.mad import RecallConfig
from nested_learning.tasks.mad import SelectiveCopyingConfig
from nested_learning.tasks.needles import NeedleConfig
from nested_learning.tasks.ruler import RulerConfig
from nested_learning.tasks.state_tracking import FormalLanguageConfig
from nested_learning.tasks.state_tracking import GROUPS
from nested_learning.tasks.state_tracking import WordProblemConfig
from nested_learning.tasks.stories import StoryConfig

TaskConfig = (
  AliasesConfig
  | CompressionConfig
  | DocumentConfig
  | FormalLanguageConfig
  | FuzzyRecallConfig
  | MemorizationConfig
  | MqarConfig
  | NeedleConfig
  | RecallConfig
  | RegressionConfig
  | RulerConfig
  | SelectiveCopyingConfig
  | StoryConfig
  | WordProblemConfig
)


def _make_tasks() -> dict[str, Any]:
  tasks: dict[str, Any] = {
    # Zoology's figure 2.
    'mqar': MqarConfig(8192, 256, num_pairs=16, random_filler=False),
    'mqar_64': MqarConfig(8192, 64, num_pairs=4, random_filler=False),
    'mqar_128': MqarConfig(8192, 128, num_pairs=8, random_filler=False),
    'mqar_512': MqarConfig(8192, 512, num_pairs=64, random_filler=False),
    # Based's largest row in training and in the test.
    'mqar_based': MqarConfig(8192, 256, num_pairs=64),
    'mqar_based_1024': MqarConfig(8192, 1024, num_pairs=256),
    'mqar_small': MqarConfig(128, 64, num_pairs=16),
    'mqar_rewritten_small': MqarConfig(
      64, 64, num_pairs=8, num_rewrites=8, random_filler=False
    ),
    'aliases_small': AliasesConfig(),
    # MAD's baselines.
    'recall': RecallConfig(),
    'noisy_recall': RecallConfig(32, num_noise_ids=16, noise=0.2),
    'fuzzy_recall': FuzzyRecallConfig(),
    'selective_copying': SelectiveCopyingConfig(),
    'memorization': MemorizationConfig(),
    'compression': CompressionConfig(),
    'selective_copying_small': SelectiveCopyingConfig(
      num_tokens=64, num_copied=8
    ),
    'fuzzy_recall_small': FuzzyRecallConfig(num_tokens=64, motif_size=2),
    # Based's documents; JRT's, which are read twice.
    'documents': DocumentConfig(4096, 8, 40, vocabulary='bytes'),
    'documents_small': DocumentConfig(),
    'documents_twice_small': DocumentConfig(num_readings=2),
    # Garg et al.'s linear functions.
    'regression': RegressionConfig(),
    'regression_small': RegressionConfig(num_dims=5, num_points=16),
  }
  # RULER's eight: haystack, key, value, keys, values, queries.
  for name, setting in {
    'niah_single_1': ('noise', 'words', 'numbers', 1, 1, 1),
    'niah_single_2': ('essay', 'words', 'numbers', 1, 1, 1),
    'niah_single_3': ('essay', 'words', 'uuids', 1, 1, 1),
    'niah_multikey_1': ('essay', 'words', 'numbers', 4, 1, 1),
    'niah_multikey_2': ('needles', 'words', 'numbers', 1, 1, 1),
    'niah_multikey_3': ('needles', 'uuids', 'uuids', 1, 1, 1),
    'niah_multivalue': ('essay', 'words', 'numbers', 1, 4, 1),
    'niah_multiquery': ('essay', 'words', 'numbers', 4, 1, 4),
  }.items():
    haystack, key, value, num_keys, num_values, num_queries = setting
    counts = {
      'num_keys': num_keys,
      'num_values': num_values,
      'num_queries': num_queries,
    }
    tasks[name] = RulerConfig(
      haystack=haystack, key_type=key, value_type=value, **counts
    )
    # The same in tokens; a UUID is longer than a number.
    tasks[f'{name}_small'] = NeedleConfig(
      128 if num_values * num_queries == 1 else 192,
      haystack=haystack,
      key_tokens=2 if key == 'uuids' else 1,
      value_tokens=8 if value == 'uuids' else 4,
      **counts,
    )
  for name in ('parity', 'anbn', 'anbncn', 'shuffle2', '(aa)*', '(abab)*'):
    tasks[name.strip('()*')] = FormalLanguageConfig(name)
  for name in GROUPS:
    tasks[name.lower()] = WordProblemConfig(name)
  for name in ('qa1', 'qa2', 'qa3'):
    num_facts = {'qa1': 6, 'qa2': 10, 'qa3': 16}[name]
    tasks[name] = StoryConfig(
      name, 4096, num_facts=num_facts, vocabulary='bytes'
    )
    tasks[f'{name}_small'] = StoryConfig(name, 256, num_facts=num_facts)
  return tasks


TASKS = _make_tasks()


def make_config(name: str, **changes) -> TaskConfig:
  """Returns the config of a named task.

  Args:
    name: One of `TASKS`.
    **changes: Fields with other values.

  Returns:
    The config.

  Raises:
    errors.UserError: There is no such task or field, or the settings are not
      possible.
  """
  if name not in TASKS:
    nearest = difflib.get_close_matches(name, TASKS, n=3, cutoff=0)
    raise errors.UserError(
      f'no task {name!r}; the nearest are {", ".join(nearest)}.'
    )
  config = TASKS[name]
  known = [field.name for field in dataclasses.fields(config)]
  for field in changes:
    if field not in known:
      (nearest,) = difflib.get_close_matches(field, known, n=1, cutoff=0)
      raise errors.UserError(
        f'task {name!r} has no field {field!r}; the nearest is {nearest}.'
      )
  return dataclasses.replace(config, **changes)
