"""Reports of an evaluation by lm-evaluation-harness."""

from collections.abc import Iterator
from typing import Any

import jax

from experiments import report_files

# The metric of each task that the papers' tables show.
COMMONSENSE = {
  'wikitext': 'word_perplexity',
  'lambada_openai': 'acc',
  'piqa': 'acc',
  'hellaswag': 'acc_norm',
  'winogrande': 'acc',
  'arc_easy': 'acc',
  'arc_challenge': 'acc_norm',
  'social_iqa': 'acc',
  'boolq': 'acc',
}
# Nested Learning, table 2: perplexity of wikitext, accuracies, their mean.
PAPER = (
  ('Transformer++ 760M', 24.18, 37.1, 67.2, 43.8, 53.0, 65.6, 33.4, 39.1, 61.7),
  ('Titans 760M', 20.08, 38.1, 69.1, 48.5, 52.7, 66.2, 35.7, 40.3, 62.8),
  ('Hope 760M', 18.68, 38.8, 69.2, 49.1, 53.6, 66.8, 36.1, 41.2, 63.4),
  ('Transformer++ 1.3B', 17.92, 42.6, 71.4, 52.3, 54.1, 69.9, 36.5, 41.8, 58.4),
  ('Titans 1.3B', 15.60, 49.1, 73.1, 56.3, 59.8, 72.4, 40.8, 42.1, 61.0),
  ('Hope 1.3B', 14.39, 51.0, 73.9, 57.5, 61.2, 73.8, 42.7, 42.8, 61.4),
)
_NUM_SHOWN = 5  # generated texts of a task


def write(
  config: Any,
  workdir: str,
  about: dict[str, Any],
  found: dict[str, Any],
) -> None:
  """Writes the files of a run, and prints the table.

  Args:
    config: The experiment's config.
    workdir: The run's folder.
    about: The checkpoint: name, checkpoint, step, num_parameters, seconds.
    found: Return value of `lm_eval.simple_evaluate`.
  """
  lines = list(_lines(found))
  summary = about | {
    'lm_eval_version': found['lm_eval_version'],
    'device': jax.devices()[0].device_kind,
  }
  for line in lines:
    names = [line['task'], line['metric'], line.get('filter')]
    key = report_files.key('_'.join(filter(None, names)))
    summary[key] = line['value']
    if line['stderr'] is not None:
      summary[f'{key}_stderr'] = line['stderr']
  head = ('task', 'metric', 'value', 'standard error', 'documents')
  table = report_files.table(
    head,
    [
      (
        line['task'],
        ', '.join(filter(None, (line['metric'], line.get('filter')))),
        line['value'],
        '' if line['stderr'] is None else line['stderr'],
        line['num_documents'],
      )
      for line in lines
    ],
  )
  sections = [
    f'# {about["name"]} on tasks of lm-evaluation-harness',
    f'`{about["checkpoint"]}` after step {about["step"]}, '
    f'{about["num_parameters"]:,} parameters; lm_eval '
    f'{found["lm_eval_version"]}, {about["seconds"]:.0f} seconds.',
    table,
  ]
  ours = _commonsense_row(about['name'], summary)
  if ours is not None:
    summary['commonsense_average'] = ours[-1]
    sections += [_commonsense_section(ours)]
  sections += _answers(found)
  report_files.write(
    workdir,
    config,
    module='experiments.lm_eval',
    summary=summary,
    metrics=lines,
    sections=sections,
  )
  print(table)


def _lines(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Yields one mapping per task, metric and filter."""
  counts = found['n-samples']
  for task, values in found['results'].items():
    for key, value in values.items():
      metric, comma, name = key.partition(',')
      if not comma or metric.endswith('_stderr'):
        continue
      stderr = values.get(f'{metric}_stderr,{name}')
      line = {'task': task, 'metric': metric}
      if name != 'none':
        line['filter'] = name
      yield line | {
        'value': float(value),
        'stderr': stderr if isinstance(stderr, float) else None,
        'num_documents': counts.get(task, {}).get('effective', 0),
      }


def _commonsense_row(name: str, summary: dict[str, Any]) -> list[Any] | None:
  """Returns a row of the papers' table: perplexity, percentages, mean."""
  keys = [f'{task}_{metric}' for task, metric in COMMONSENSE.items()]
  if not all(key in summary for key in keys):
    return None
  perplexity, *accuracies = [summary[key] for key in keys]
  percent = [100 * accuracy for accuracy in accuracies]
  return [name, perplexity, *percent, sum(percent) / len(percent)]


def _commonsense_section(ours: list[Any]) -> str:
  rows = [[*row, sum(row[2:]) / len(row[2:])] for row in PAPER]
  head = ('model', *COMMONSENSE, 'mean')
  return (
    'Beside the numbers printed in arXiv:2512.24695, table 2 (perplexity of '
    'wikitext, then percentages; trained on 30B and 100B tokens):\n\n'
    + report_files.table(head, [ours, *rows])
  )


def _answers(found: dict[str, Any]) -> Iterator[str]:
  """Yields generated texts as sections, for the tasks with generation."""
  for task, samples in found.get('samples', {}).items():
    if found['configs'][task]['output_type'] != 'generate_until':
      continue
    rows = [
      [
        _code(text)
        for text in (
          sample['arguments'][0][0][-50:],
          sample['resps'][0][0],
          str(sample['target']),
        )
      ]
      for sample in samples[:_NUM_SHOWN]
    ]
    head = ('end of the prompt', 'written', 'right')
    yield f'## {task}\n\n' + report_files.table(head, rows)


def _code(text: str) -> str:
  """Formats a text as a cell of a table."""
  return '`' + repr(text).replace('`', "'").replace('|', '\\|') + '`'
