"""Report, metrics and summary of experiments that have their own `run`."""

from collections.abc import Mapping, Sequence
import io
import json
import math
import pathlib
import re
from typing import Any

from matplotlib import figure as mpl_figure

from launch import provenance
from nested_learning import configs
from nested_learning import errors
from nested_learning import files
from nested_learning import markdown

MADE = '## How it was made'  # title of the section on the source of a page


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
    sections: Sections of the report, in Markdown; if none of them is MADE, the
      command, commit, machine, date and software of this process are added.
  """
  folder = pathlib.Path(workdir)
  if MADE not in sections:
    made = provenance.listed([provenance.provenance()], {})
    sections = [*sections, MADE, made]
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
