"""The page of `experiments/streams.py`: tables, curves and what they say."""

from collections.abc import Mapping, Sequence
import pathlib

from matplotlib import figure as mpl_figure
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from launch import provenance

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
  names = [name for name in names if _seeds(cells, name)]
  summary = _numbers(cells, names)
  _plot(cells, names, folder / _PLOT)
  sections = [
    '# Long streams',
    'Models of `experiments/quickstart.py`, of the same number of parameters '
    'within 3 per cent, trained alike, read files that they have not seen, end '
    'to end, with their state carried and never reset. Bits per byte, with '
    'nothing written, with memories written, and with levels that learn as '
    'well; means over the seeds of training, ± the sample standard deviation. '
    'The control `calibration` learns a temperature and a bias over the '
    'vocabulary in place of the levels, on the clock of the fastest one. '
    'Learning rates of levels and of the calibration were chosen for each '
    'model with the first seed on other streams of the held-out text, from one '
    'grid that goes on where its end is best.',
    *[_sentence(cells, summary, name) for name in names],
    f'![Bits per byte by position in the stream]({_PLOT})',
    '## By position',
    _table(cells, names, 'files'),
    '## The same files in another order',
    'The documents of each stream are shuffled. A gain that comes from '
    'neighbouring files alone would be gone.',
    _table(cells, names, 'other'),
    '## Rates',
    _rates(cells, names),
    report_files.MADE,
    _provenance(cells),
  ]
  cells_lib.write_results(store, [TASK], folder, sections, summary)
  return summary


def cell_name(model: str, seed: int, cell: str) -> str:
  """Returns the name of a cell of a model that was trained with a seed."""
  return f'{model} seed_{seed} {cell}'


def _seeds(cells, name) -> list[int]:
  """Returns the seeds whose curves are all there."""
  kinds = ('nothing', 'levels', 'calibration')
  done = lambda i: all(cell_name(name, i, f'{x} files') in cells for x in kinds)
  return [i for i in range(len(cells)) if done(i)]


def _get(cells, name, kind, order) -> list[Mapping]:
  """Returns a curve of each seed; a model without memories writes nothing."""
  for found in (kind, 'nothing') if kind == 'memories' else (kind,):
    names = [
      cell_name(name, seed, f'{found} {order}') for seed in _seeds(cells, name)
    ]
    values = [cells[x].values for x in names if x in cells]
    if values:
      return values
  return []


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


def _late(values) -> float:
  """Returns bits per byte of the later part of a stream."""
  begin = min(_FROM, values['edges'][-1] // 2)
  return _between(values, min(x for x in values['edges'] if x >= begin))


def _gains(cells, name, kind, order) -> list[float]:
  """Returns what something that learns gives in the later part, by seed."""
  memories, learned = (_get(cells, name, x, order) for x in ('memories', kind))
  return [_late(x) - _late(y) for x, y in zip(memories, learned, strict=False)]


def _numbers(cells, names) -> dict[str, float]:
  numbers = {}

  def put(key, found):
    if found:
      numbers.update(report_files.summarize(key, found))

  for name in names:
    trained = [cell_name(name, i, 'trained') for i in _seeds(cells, name)]
    put(f'{name}_rows', [cells[x].values['bits_per_byte'] for x in trained])
    for order, end in (('files', ''), ('other', '_other_order')):
      for kind in _CURVES:
        curves = _get(cells, name, kind, order)
        key = f'{name}_{kind}{end}'
        put(key, [x['bits_per_byte'] for x in curves])
        put(f'{key}_late', [_late(x) for x in curves])
      for kind in ('levels', 'calibration'):
        gains = _gains(cells, name, kind, order)
        put(f'{name}_{kind}{end}_gain', gains)
  return numbers


def _sentence(cells, numbers, name) -> str:
  """Returns what comes out for one model."""

  def show(key):
    spread = numbers.get(f'{name}_{key}_spread')
    end = '' if spread is None else f' ± {spread:.3f}'
    return f'{numbers[f"{name}_{key}"]:.3f}{end}'

  gain = numbers[f'{name}_levels_gain']
  reached = 'at least' if gain >= _WANTED else 'less than'
  text = (
    f'**{_TITLES[name]}** (seeds: {len(_seeds(cells, name))}): from token '
    f'{_FROM:,} on, levels that learn give {show("levels_gain")} bits per '
    f'byte, {reached} the {_WANTED} that were wanted '
    f'({show("memories_late")} to {show("levels_late")}); the calibration '
    f'alone gives {show("calibration_gain")}'
  )
  if gain > 0:
    text += f', {numbers[f"{name}_calibration_gain"] / gain:.0%} of it'
  if f'{name}_levels_other_order_gain' in numbers:
    other = show('levels_other_order_gain')
    text += f'; with the files in another order, levels give {other}'
  return text + '.'


def _table(cells, names, order) -> str:
  some = _get(cells, names[0], 'nothing', order)
  if not some:
    return 'Not measured yet.'
  ranges = _ranges(some[0])
  short = lambda x: f'{x // 1024}K' if x >= 1024 else str(x)
  head = ['model', 'curve', *[f'{short(a)}-{short(b)}' for a, b in ranges]]
  rows = []
  for name in names:
    for kind, label in _CURVES.items():
      curves = _get(cells, name, kind, order)
      if curves:
        found = [[_between(x, *limits) for x in curves] for limits in ranges]
        shown = map(report_files.mean_and_spread, found)
        rows.append([_TITLES[name], label, *shown])
  return report_files.table(head, rows)


def _rates(cells, names) -> str:
  rows = []
  for name in names:
    for kind in ('levels', 'calibration'):
      start = cell_name(name, 0, f'{kind} search ')
      found = {
        float(cell.removeprefix(start)): cells[cell].values['bits_per_byte']
        for cell in cells
        if cell.startswith(start)
      }
      tried = ', '.join(f'{k:g}: {found[k]:.3f}' for k in sorted(found))
      best = cells[cell_name(name, 0, f'{kind} files')].settings['rate']
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
  """Draws a panel per model, the curves by position, means over seeds."""
  figure = mpl_figure.Figure(figsize=(4 * len(names), 4), layout='tight')
  panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
  for axes, name in zip(panels, names, strict=True):
    for kind, label in _CURVES.items():
      curves = _get(cells, name, kind, 'files')
      edges = np.asarray(curves[0]['edges'], float)
      bits, size = (
        np.sum([np.asarray(x[key], float) for x in curves], axis=0)
        for key in ('bits', 'bytes')
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
