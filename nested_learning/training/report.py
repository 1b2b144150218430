"""Writes the report of a run: one page with tables and plots."""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

from matplotlib import figure as mpl_figure

from nested_learning import configs
from nested_learning import files
from nested_learning import markdown
from nested_learning.training import config as config_lib
from nested_learning.training import goodput
from nested_learning.training import metrics as metrics_lib
from nested_learning.training import profiling
from nested_learning.training import workload as workload_lib

LOSS_PLOT = 'loss.png'
SAMPLE = 'sample.txt'


def write_report(
  workdir: pathlib.Path,
  config: config_lib.ExperimentConfig,
  workload: workload_lib.Workload,
  summary: Mapping[str, Any],
) -> None:
  """Writes `report.md` and its plots.

  Args:
    workdir: The run's folder, with metrics.jsonl, a sample, and the files of
      the workload's summary.
    config: The experiment.
    workload: Its workload.
    summary: The numbers of summary.json.
  """
  lines = metrics_lib.read_metrics(workdir / 'metrics.jsonl')
  _plot_loss(workdir / LOSS_PLOT, lines, workload.watched)
  sections = [
    f'# {config.name}',
    workload.verdict(summary),
    markdown.table(('', ''), [(k, _text(v)) for k, v in summary.items()]),
    '## Time\n\n' + _time(workdir, lines),
    f'## Loss\n\n![Training and validation loss]({LOSS_PLOT})',
    *workload.sections(summary),
    '## Levels\n\n' + _levels(config, lines),
  ]
  sample = workdir / SAMPLE
  if sample.exists():
    text = sample.read_text(encoding='utf-8', errors='replace')
    sections.append(f'## Sample\n\n{markdown.fenced(text)}')
  sections.append(
    f'## Config\n\n{markdown.fenced(configs.to_json(config), "json")}'
  )
  report = '\n\n'.join(sections) + '\n'
  files.write_whole(workdir / 'report.md', report)


def _plot_loss(
  path: pathlib.Path,
  lines: list[Mapping[str, Any]],
  watched: tuple[str, str],
) -> None:
  """Plots the training loss and, below it, the watched validation number."""
  figure = mpl_figure.Figure(figsize=(7, 5), layout='tight')
  losses, below = figure.subplots(2, 1, sharex=True)
  for axes, name, label in (
    (losses, 'loss', 'training loss per target'),
    (below, f'validation/{watched[0]}', f'validation, {watched[1]}'),
  ):
    points = [
      (line['step'], line[name]) for line in lines if line.get(name) is not None
    ]
    if points:
      axes.plot(*zip(*points, strict=True), '.-' if axes is below else '-')
    axes.set_ylabel(label)
  below.set_xlabel('step')
  figure.savefig(path, dpi=120)


def _time(workdir: pathlib.Path, lines: list[Mapping[str, Any]]) -> str:
  """Returns a table of the wall time by part, and links to profiles."""
  found = [x for x in map(goodput.parts_of, lines) if x is not None]
  seconds = found[-1] if found else {}
  total = sum(seconds.values()) or 1.0
  rows = [
    (part, f'{value:,.1f}', f'{value / total:.1%}', goodput.PARTS[part])
    for part, value in seconds.items()
    if value
  ]
  text = 'Wall time from the first start to the last step and its evaluation'
  if found:
    text += f'; goodput {goodput.goodput(seconds):.1%}'
  parts = [f'{text}.', markdown.table(('', 's', 'share', 'spent on'), rows)]
  for folder in profiling.find(workdir):
    path = folder.relative_to(workdir).as_posix()
    parts.append(
      f'Profile: [{folder.name}]({path}), for `tensorboard --logdir={path}` '
      'with the plugin xprof.'
    )
  return '\n\n'.join(parts)


def _levels(
  config: config_lib.ExperimentConfig, lines: list[Mapping[str, Any]]
) -> str:
  """Returns a table of the levels' updates, from the last lines of metrics."""
  clocks = {level.name: level.train_every for level in config.model.levels}
  last: dict[str, Any] = {}
  for line in lines:
    last.update({k: v for k, v in line.items() if k.startswith('levels/')})
  names = dict.fromkeys(key.split('/')[1] for key in last)
  rows = []
  for name in names:
    get = lambda field, name=name: last.get(f'levels/{name}/{field}') or 0.0
    num_updates = int(get('num_updates'))
    rows.append(
      (
        name,
        f'{clocks.get(name) or config.batch_tokens:,}',
        f'{num_updates:,}' if num_updates else 'none: it never learned',
        f'{get("gradient_norm"):.3g}',
        f'{get("update_ratio"):.3g}',
      )
    )
  header = (
    'level',
    'tokens per update',
    'updates',
    'gradient norm',
    'update / weights',
  )
  return markdown.table(header, rows)


def _text(value: Any) -> str:
  if isinstance(value, float) and math.isfinite(value):
    return f'{value:,.4f}'
  return f'{value:,}' if isinstance(value, int) else str(value)
