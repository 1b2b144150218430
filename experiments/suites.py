"""Suites of tasks, with every setting whose results are averaged.

References:
  Poli et al., Mechanistic Design and Scaling of Hybrid Architectures,
    arXiv:2403.17844, 2024, appendix B (MAD's settings; its score of a task is
    the mean accuracy over them, that of the suite the mean over tasks).
"""

from nested_learning import tasks

_NUM_EXAMPLES = 12_800
_FEWER_EXAMPLES = (6400, 3200, 1600, 800)
_RECALL = {
  'vocab_size': (32, 64, 128),
  'num_tokens': (256, 512, 1024),
  'num_examples': _FEWER_EXAMPLES,
}
# One change at a time to a baseline.
_MAD = {
  'recall': _RECALL,
  'noisy_recall': {
    # 16 ids are noise; keys and values are as many as in the other tasks.
    **_RECALL,
    'vocab_size': (48, 80, 144),
    'noise': (0.4, 0.6, 0.8),
  },
  'fuzzy_recall': _RECALL,
  'selective_copying': {
    'vocab_size': (32, 64, 128),
    'num_tokens': (512, 1024),
    'num_copied': (32, 64, 96),
    'num_examples': _FEWER_EXAMPLES,
  },
  'memorization': {'vocab_size': (512, 1024, 2048, 4096, 8192)},
  'compression': {
    'vocab_size': (32, 64, 128),
    'num_tokens': (64, 128, 256),
    'num_examples': _FEWER_EXAMPLES,
  },
}


def mad(
  batch_size: int = 128, seed: int = 12345
) -> dict[str, dict[str, tasks.TaskDataConfig]]:
  """Returns MAD's six tasks: the baseline and its changes, one at a time.

  Args:
    batch_size: Rows per step.
    seed: Seed of the rows.

  Returns:
    From the task's name to its settings, named by their change, such as
    'baseline' and 'vocab_size=32'. MAD trains each for 200 passes over its
    examples and reports `macro_accuracy`.
  """
  suite = {}
  for name, changes in _MAD.items():
    suite[name] = {'baseline': _setting(name, batch_size, seed)}
    for field, values in changes.items():
      for value in values:
        setting = _setting(name, batch_size, seed, **{field: value})
        suite[name][f'{field}={value}'] = setting
  return suite


def _setting(name, batch_size, seed, **changes) -> tasks.TaskDataConfig:
  most = 256 if name == 'memorization' else _NUM_EXAMPLES
  num_examples = changes.pop('num_examples', most)
  task = tasks.make_config(name, **changes)
  return tasks.TaskDataConfig(
    task, batch_size=batch_size, num_examples=num_examples, seed=seed
  )
