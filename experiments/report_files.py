"""What an experiment that is no training run leaves in its folder."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import re
from typing import Any

from nested_learning import configs
from nested_learning import errors


def check_mode(mode: str) -> None:
  """Refuses the modes that need a language model.

  Args:
    mode: As from the command line.

  Raises:
    errors.UserError: If it is not 'train'.
  """
  if mode != 'train':
    raise errors.UserError(
      f'--mode={mode} needs one trained language model, which this experiment '
      'does not leave; use --mode=train.'
    )


def key(name: str) -> str:
  """A name as a key of summary.json."""
  return re.sub(r'[^a-z0-9.]+', '_', name.lower()).strip('_')


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A table in Markdown; numbers get four digits."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(
    '| ' + ' | '.join(_text(cell) for cell in line) + ' |' for line in lines
  )


def write(
  workdir: str,
  config: Any,
  *,
  module: str,
  summary: Mapping[str, Any],
  metrics: Sequence[Mapping[str, Any]],
  sections: Sequence[str],
) -> None:
  """Writes config.json, metrics.jsonl, report.md and, last, summary.json.

  Args:
    workdir: The run's folder.
    config: The experiment's config.
    module: Name of the experiment's module.
    summary: Flat; numbers and strings. Numbers that are not finite (a run that
      diverged) become strings, which JSON has.
    metrics: One mapping per line.
    sections: Of the report, in Markdown.
  """
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(
    configs.to_json(config, run=module), encoding='utf-8'
  )
  lines = [json.dumps(_finite(line)) + '\n' for line in metrics]
  (folder / 'metrics.jsonl').write_text(''.join(lines), encoding='utf-8')
  (folder / 'report.md').write_text(
    '\n\n'.join(sections) + '\n', encoding='utf-8'
  )
  (folder / 'summary.json').write_text(
    json.dumps(_finite(summary), indent=2) + '\n', encoding='utf-8'
  )


def _finite(line):
  return {
    name: str(value)
    if isinstance(value, float) and not math.isfinite(value)
    else value
    for name, value in line.items()
  }


def _text(cell):
  return f'{cell:.4g}' if isinstance(cell, float) else str(cell)
