"""Report, metrics and summary of experiments that have their own `run`."""

from collections.abc import Mapping, Sequence
import datetime
from importlib import metadata
import io
import json
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from typing import Any

from matplotlib import figure as mpl_figure

from nested_learning import configs
from nested_learning import errors
from nested_learning import files
from nested_learning import markdown

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


def check_mode(mode: str) -> None:
  """Raises `errors.UserError` for modes that need a trained language model.

  Args:
    mode: The flag --mode; only 'train' passes.
  """
  if mode != 'train':
    raise errors.UserError(
      f'--mode={mode} needs one trained language model, which this experiment '
      'does not leave; use --mode=train.'
    )


def key(name: str) -> str:
  """Returns a name as a key of summary.json: lower case and underscores."""
  return re.sub(r'[^a-z0-9.]+', '_', name.lower()).strip('_')


def finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a mapping in which numbers that JSON does not have are strings."""
  return {
    name: str(value)
    if isinstance(value, float) and not math.isfinite(value)
    else value
    for name, value in numbers.items()
  }


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a Markdown table; floats get four digits."""
  return markdown.table(head, [[_text(cell) for cell in row] for row in rows])


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
    workdir: Folder of the run.
    config: Config of the experiment.
    module: Name of the experiment's module.
    summary: Numbers and strings. JSON has no NaN and no infinity, so these
      become strings.
    metrics: One mapping per line.
    sections: Sections of the report, in Markdown.
  """
  folder = pathlib.Path(workdir)
  lines = [json.dumps(finite(line)) + '\n' for line in metrics]
  summary_text = json.dumps(finite(summary), indent=2) + '\n'
  for name, text in (
    ('config.json', configs.to_json(config, run=module)),
    ('metrics.jsonl', ''.join(lines)),
    ('report.md', '\n\n'.join(sections) + '\n'),
    ('summary.json', summary_text),  # its presence says: finished
  ):
    files.write_whole(folder / name, text)


def _text(cell):
  return f'{cell:.4g}' if isinstance(cell, float) else str(cell)


def save_figure(figure: mpl_figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure as PNG, whole or not at all."""
  image = io.BytesIO()
  figure.savefig(image, dpi=90)
  files.write_whole(path, image.getvalue())


def provenance() -> dict[str, str]:
  """Returns the command, commit, machine, date and software of this process.

  A commit ends in '-dirty' if files of the code differ from it; results do not
  count.
  """
  versions = [f'{name} {metadata.version(name)}' for name in _PACKAGES]
  return {
    'command': portable(shlex.join(['python', *sys.argv])),
    'commit': _commit(),
    'machine': f'{num_cores()} cores, {_processor()}',
    'date': datetime.date.today().isoformat(),
    'software': ', '.join([f'Python {platform.python_version()}', *versions]),
  }


def portable(command: str) -> str:
  """Returns a command without the folders that absolute paths begin with."""
  return re.sub(r"(?<![\w.])/(?:[^\s/'=]+/)+", '', command)


def num_cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _commit() -> str:
  """Returns the commit of the code, or 'unknown'."""
  git = ['git', '-C', str(_ROOT)]
  changes = [
    'status', '--porcelain', '--untracked-files=no', '--', '.',
    ':!experiments/results',
  ]  # fmt: skip
  try:
    commit, changed = (
      subprocess.run(
        [*git, *arguments], capture_output=True, text=True, check=True
      ).stdout.strip()
      for arguments in (['rev-parse', '--short', 'HEAD'], changes)
    )
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
  return f'{commit}-dirty' if changed else commit


def _processor() -> str:
  """Returns the name of the processor."""
  path = pathlib.Path('/proc/cpuinfo')
  if path.is_file():
    for line in path.read_text(encoding='utf-8').splitlines():
      name, _, value = line.partition(':')
      if name.strip() == 'model name':
        return value.strip()
  return platform.processor() or platform.machine()
