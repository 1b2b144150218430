"""The page of `experiments/streams.py`: tables, curves and what they say."""

from collections.abc import Mapping, Sequence
import json
import pathlib

from matplotlib import figure as mpl_figure
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from launch import provenance
from nested_learning import files

TASK = 'streams'
_PLOT = 'streams.png'
_TITLES = {
  'hope': 'Hope',
  'gated_deltanet': 'Gated DeltaNet',
  'transformer': 'Transformer++, window',
}
_CURVES = {
  'nothing': 'nothing written',
  'memories': 'memories',
  'levels': 'memories and levels',
  'calibration': 'memories and calibration',
}
_FROM = 2**13  # tokens; the gain is that of the stream from here on
_WANTED = 0.05  # bits per byte


def write_page(
  store: cells_lib.Store, folder: pathlib.Path, names: Sequence[str]
) -> dict[str, float]:
  """Writes README.md, the plot, cells and summary.json.

  Args:
    store: The cells.
    folder: Folder of the page.
    names: Names of the models, in order.

  Returns:
    The numbers of summary.json.
  """
  folder.mkdir(parents=True, exist_ok=True)
  cells = cells_lib.read(store, TASK)
  names = [name for name in names if _has(cells, name)]
  summary = _numbers(cells, names)
  _plot(cells, names, folder / _PLOT)
  sections = [
    '# Long streams',
    'Models of `experiments/quickstart.py`, of the same number of parameters '
    'within 3 per cent, trained alike with one seed, read files that they have '
    'not seen, end to end, with their state carried and never reset. Bits per '
    'byte, with nothing written, with memories written, and with levels that '
    'learn as well. The control `calibration` learns a temperature and a bias '
    'over the vocabulary in place of the levels, on the clock of the fastest '
    'one. Learning rates of levels and of the calibration were chosen for each '
    'model on other streams of the held-out text, from one grid that goes on '
    'where its end is best.',
    *[_sentence(summary, name) for name in names],
    f'![Bits per byte by position in the stream]({_PLOT})',
    '## By position',
    _table(cells, names, 'files'),
    '## The same files in another order',
    'The documents of each stream are shuffled. A gain that comes from '
    'neighbouring files alone would be gone.',
    _table(cells, names, 'other'),
    '## Rates',
    _rates(cells, names),
    '## How it was made',
    _provenance(cells),
  ]
  files.write_whole(folder / 'README.md', '\n\n'.join(sections) + '\n')
  content = json.dumps(report_files.finite(summary), indent=2) + '\n'
  files.write_whole(folder / 'summary.json', content)
  cells_lib.publish(store, TASK, folder)
  return summary


def _has(cells, name) -> bool:
  return all(
    f'{name} {kind} files' in cells
    for kind in ('nothing', 'levels', 'calibration')
  )


def _get(cells, name, kind, order) -> Mapping | None:
  """Returns the values of a curve; a model without memories writes nothing."""
  for found in (kind, 'nothing') if kind == 'memories' else (kind,):
    if f'{name} {found} {order}' in cells:
      return cells[f'{name} {found} {order}'].values
  return None


def _between(values, begin, end=None) -> float:
  """Returns bits per byte between two positions that are edges of bins."""
  edges = np.asarray(values['edges'])
  inside = edges[:-1] >= begin
  if end is not None:
    inside &= edges[1:] <= end
  bits, size = (np.asarray(values[key])[inside] for key in ('bits', 'bytes'))
  return float(bits.sum() / size.sum()) if size.sum() else float('nan')


def _ranges(values) -> list[tuple[int, int]]:
  """Returns the ranges 0-4K, 4K-8K, 8K-16K, ... to the end of the stream."""
  last = values['edges'][-1]
  ends = [min(4096, last)]
  while ends[-1] < last:
    ends.append(min(2 * ends[-1], last))
  return list(zip([0, *ends[:-1]], ends, strict=True))


def _numbers(cells, names) -> dict[str, float]:
  numbers = {}
  for name in names:
    numbers[f'{name}_rows'] = cells[f'{name} trained'].values['bits_per_byte']
    for order in ('files', 'other'):
      for kind in _CURVES:
        values = _get(cells, name, kind, order)
        if values is None:
          continue
        begin = min(_FROM, values['edges'][-1] // 2)
        key = f'{name}_{kind}' + ('' if order == 'files' else '_other_order')
        numbers[key] = values['bits_per_byte']
        late = [edge for edge in values['edges'] if edge >= begin][0]
        numbers[f'{key}_late'] = _between(values, late)
  return numbers


def _sentence(numbers, name) -> str:
  """Returns what comes out for one model."""
  memories, learned, calibrated = (
    numbers[f'{name}_{kind}_late']
    for kind in ('memories', 'levels', 'calibration')
  )
  gain, by_calibration = memories - learned, memories - calibrated
  reached = 'at least' if gain >= _WANTED else 'less than'
  text = (
    f'**{_TITLES[name]}**: from token {_FROM:,} on, levels that learn give '
    f'{gain:.3f} bits per byte, {reached} the {_WANTED} that were wanted '
    f'({memories:.3f} to {learned:.3f}); '
  )
  if gain > 0:
    share = by_calibration / gain
    text += (
      f'the calibration alone gives {by_calibration:.3f}, {share:.0%} of it'
    )
  else:
    text += f'the calibration gives {by_calibration:.3f}'
  other = f'{name}_levels_other_order_late'
  if other in numbers:
    rest = numbers[f'{name}_memories_other_order_late'] - numbers[other]
    text += f'; with the files in another order, levels give {rest:.3f}'
  return text + '.'


def _table(cells, names, order) -> str:
  some = _get(cells, names[0], 'nothing', order)
  if some is None:
    return 'Not measured yet.'
  ranges = _ranges(some)
  short = lambda x: f'{x // 1024}K' if x >= 1024 else str(x)
  head = ['model', 'curve', *[f'{short(a)}-{short(b)}' for a, b in ranges]]
  rows = []
  for name in names:
    for kind, label in _CURVES.items():
      values = _get(cells, name, kind, order)
      if values is not None:
        found = [_between(values, *limits) for limits in ranges]
        rows.append([_TITLES[name], label, *[f'{x:.3f}' for x in found]])
  return report_files.table(head, rows)


def _rates(cells, names) -> str:
  rows = []
  for name in names:
    for kind in ('levels', 'calibration'):
      start = f'{name} {kind} search '
      found = {
        float(cell.removeprefix(start)): cells[cell].values['bits_per_byte']
        for cell in cells
        if cell.startswith(start)
      }
      tried = ', '.join(f'{k:g}: {found[k]:.3f}' for k in sorted(found))
      best = cells[f'{name} {kind} files'].settings['rate']
      rows.append([_TITLES[name], kind, f'{best:g}', tried])
  head = ('model', 'learns', 'rate', 'bits per byte of the search, by rate')
  return report_files.table(head, rows)


def _provenance(cells) -> str:
  settings = next(iter(cells.values())).settings
  more = {
    key: ', '.join(f'{k} {v}' for k, v in settings[key].items())
    for key in ('streams', 'search')
  }
  return provenance.listed([cell.source for cell in cells.values()], more)


def _plot(cells, names, path) -> None:
  """Draws a panel per model, the four curves by position."""
  figure = mpl_figure.Figure(figsize=(4 * len(names), 4), layout='tight')
  panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
  for axes, name in zip(panels, names, strict=True):
    for kind, label in _CURVES.items():
      values = _get(cells, name, kind, 'files')
      edges, bits, size = (
        np.asarray(values[key], float) for key in ('edges', 'bits', 'bytes')
      )
      centers = np.sqrt(np.maximum(edges[:-1], edges[1] / 2) * edges[1:])
      style = '--' if kind == 'calibration' else '.-'
      axes.plot(centers, bits / size, style, label=label)
    axes.set_xscale('log', base=2)
    axes.set_xlabel('position in the stream, tokens')
    axes.set_title(_TITLES[name])
  panels[0].set_ylabel('bits per byte')
  panels[0].legend()
  report_files.save_figure(figure, path)
