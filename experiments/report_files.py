"""Report, metrics and summary of experiments that have their own `run`."""

from collections.abc import Iterable, Mapping, Sequence
import io
import json
import math
import pathlib
import re
from typing import Any

from matplotlib import figure as mpl_figure
import numpy as np

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


def to_json(summary: Mapping[str, Any]) -> str:
  """Returns the text of summary.json."""
  return json.dumps(finite(summary), indent=2) + '\n'


def mean_and_spread(values: Iterable[float]) -> str:
  """Formats mean and sample standard deviation over seeds or streams."""
  return ' ± '.join(f'{x:.3f}' for x in summarize('x', values).values())


def summarize(key: str, values: Iterable[float]) -> dict[str, float]:
  """Returns the mean of some numbers as `key`, and `key_spread` of several."""
  values = np.asarray(list(values), np.float64)
  summary = {key: float(np.mean(values))}
  if len(values) > 1:
    summary[f'{key}_spread'] = float(np.std(values, ddof=1))
  return summary


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a Markdown table; floats get four digits."""
  return markdown.table(head, [[_text(cell) for cell in row] for row in rows])


def write(
  workdir: str,
  config: Any,
  *,
  module: str,
  summary: Mapping[str, Any],
  sections: Sequence[str],
  metrics: Sequence[Mapping[str, Any]] = (),
) -> None:
  """Writes config.json, metrics.jsonl, report.md and, last, summary.json.

  Args:
    workdir: Folder of the run.
    config: Config of the experiment.
    module: Name of the experiment's module.
    summary: Numbers and strings. JSON has no NaN and no infinity, so these
      become strings.
    sections: Sections of the report, in Markdown; if none of them is MADE, the
      command, commit, machine, date and software of this process are added.
    metrics: One mapping per line.
  """
  folder = pathlib.Path(workdir)
  if MADE not in sections:
    made = provenance.listed([provenance.provenance()], {})
    sections = [*sections, MADE, made]
  lines = [json.dumps(finite(line)) + '\n' for line in metrics]
  for name, text in (
    ('config.json', configs.to_json(config, run=module)),
    ('metrics.jsonl', ''.join(lines)),
    ('report.md', '\n\n'.join(sections) + '\n'),
    ('summary.json', to_json(summary)),  # its presence says: finished
  ):
    files.write_whole(folder / name, text)


def write_numbers(
  workdir: str,
  config: Any,
  *,
  module: str,
  summary: Mapping[str, float],
  title: Sequence[str],
) -> None:
  """Writes and prints the numbers of a benchmark.

  Args:
    workdir: Folder of the run.
    config: Config of the benchmark.
    module: Name of the benchmark's module.
    summary: The numbers.
    title: Sections before their table.
  """
  rows = list(summary.items())
  write(
    workdir,
    config,
    module=module,
    summary=summary,
    metrics=[{'name': name, 'value': value} for name, value in rows],
    sections=[*title, table(('', ''), rows)],
  )
  for name, value in rows:
    print(f'{name}: {value:.4g}')


def _text(cell):
  return f'{cell:.4g}' if isinstance(cell, float) else str(cell)


def save_figure(figure: mpl_figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure as PNG, whole or not at all."""
  image = io.BytesIO()
  figure.savefig(image, dpi=90)
  files.write_whole(path, image.getvalue())
