"""The page of `experiments/pretrained/streams.py`."""

from collections.abc import Mapping, Sequence
import pathlib

from matplotlib import figure as mpl_figure
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from launch import provenance

TASK = 'pretrained_streams'
_CONTROLS = {
  'plain': 'alone',
  'calibrated': 'calibrated',
  'cache': 'with the cache',
  'both': 'with both',
}
_CONTROL = 'frozen'  # the arm that all others are compared with
_WIDE = 'frozen_wide'  # the control with four times the window


def write_page(
  store: cells_lib.Store, folder: pathlib.Path, arms: Sequence[str]
) -> dict[str, float]:
  """Writes README.md, plots, cells and summary.json.

  Args:
    store: The cells.
    folder: Folder of the page.
    arms: Names of all arms, in order.

  Returns:
    The numbers of summary.json.
  """
  folder.mkdir(parents=True, exist_ok=True)
  cells = cells_lib.read(store, TASK)
  by_text: dict[str, dict[str, cells_lib.Cell]] = {}
  for name in sorted(cells, key=lambda name: _place(name, arms)):
    text, arm = name.split(' ', 1)
    by_text.setdefault(text, {})[arm] = cells[name]
  sections, summary = [], {}
  for text, found in by_text.items():
    sections += _text_sections(text, found, arms, folder)
    summary |= {
      f'{text}_{report_files.key(arm)}_{key}': cells_lib.number(cell, key)
      for arm, cell in found.items()
      for key in (*(f'{name}_bits_per_byte' for name in _CONTROLS),)
    }
  page = [
    '# A pretrained model on streams that it has not seen',
    'SmolLM2-135M-Instruct reads a text once, with a window of attention and '
    'four sinks. Every token is predicted before anything learns from it, and '
    "tokens of planted facts do not count. The text 'sources' is code of this "
    "repository, and 'pages' are its pages; both are younger than the model. "
    'One model and one pass: differences of a few per cent between arms are '
    'none.',
    '- *calibrated* mixes the predictions with those of a learned temperature '
    'and of a learned bias of every token (two rates).\n'
    '- *with the cache* adds a cache of the n-grams of the stream so far, of '
    'several orders and weights.\n'
    '- *with both* is a cache over the calibrated predictions.\n\n'
    'Mixtures weigh by past losses, so that nothing is chosen in hindsight. A '
    'control is added to both sides: what an arm gains in the last column is '
    'what neither unigrams nor copied n-grams give.',
    *(sections or ['No cell is finished.']),
    report_files.MADE,
    provenance.listed(
      [cell.source for cell in cells.values()], {'cells': str(len(cells))}
    ),
  ]
  cells_lib.write_results(store, [TASK], folder, page, summary)
  return summary


def _place(name: str, arms: Sequence[str]) -> tuple[str, int]:
  text, arm = name.split(' ', 1)
  return text, arms.index(arm)


def _text_sections(text, cells, arms, folder) -> list[str]:
  (num_tokens, *_), (window, *_) = (
    [cell.settings[key] for cell in cells.values()]
    for key in ('num_tokens', 'window')
  )
  missing = [arm for arm in arms if arm not in cells]
  plot = f'{text}.png'
  _plot(cells, folder / plot)
  head = ('arm', *_CONTROLS.values(), 'gain with both', 'CPU s', 'levels, MB')
  rows = [
    (
      arm,
      *(cells_lib.number(cell, f'{x}_bits_per_byte') for x in _CONTROLS),
      _gain(cells, cell),
      round(cells_lib.number(cell, 'cpu_seconds')),
      f'{cells_lib.number(cell, "level_bytes") / 1e6:.1f}',
    )
    for arm, cell in cells.items()
  ]
  sections = [
    f'## {text}: {num_tokens:,} tokens',
    f'Bits per byte, with a window of {window} tokens (`wide`: four times, '
    '`twice`: twice as many). The gain is that over the frozen model with the '
    'same controls.',
    report_files.table(head, rows),
    *_verdict(cells),
    f'![Bits per byte by position]({plot})',
    'Recall: log-odds in nats of a planted code over the codes of other facts, '
    'asked after the stream with its state, by how often the fact was told; '
    'mean ± standard error over facts. Of the frozen model, they are the bias '
    'of the question. Then, bits per byte of another text, read afterwards.',
    _recall(cells),
  ]
  if missing:
    sections.append(f'Not run yet: {", ".join(missing)}.')
  return sections


def _verdict(cells) -> list[str]:
  """Compares the best arm that learns with a longer window that does not."""
  both = lambda arm: cells_lib.number(cells[arm], 'both_bits_per_byte')
  learn = [arm for arm in cells if not arm.startswith(_CONTROL)]
  if _CONTROL not in cells or not learn:
    return []
  best = min(learn, key=both)
  sentence = (
    f'Of the arms that learn, {best} gains most beyond the controls: '
    f'{_gain(cells, cells[best])}.'
  )
  if _WIDE in cells:
    sentence += (
      ' The frozen model gains '
      f'{_gain(cells, cells[_WIDE])} from four times the window.'
    )
  return [sentence]


def _gain(cells, cell) -> str:
  if _CONTROL not in cells:
    return ''
  both = [
    cells_lib.number(x, 'both_bits_per_byte') for x in (cell, cells[_CONTROL])
  ]
  return f'{1 - both[0] / both[1]:.1%}'


def _recall(cells: Mapping[str, cells_lib.Cell]) -> str:
  values = next(iter(cells.values())).values
  told = sorted(set(values['tellings']))
  rows = []
  for arm, cell in cells.items():
    margins = np.array(cell.values['margins'], float)
    tellings = np.array(cell.values['tellings'])
    shown = [_mean(margins[tellings == n]) for n in told]
    other = cells_lib.number(cell, 'other_bits_per_byte')
    rows.append((arm, *shown, _mean(margins), other))
  nearest, farthest = min(values['distances']), max(values['distances'])
  table = report_files.table(
    ('arm', *(f'told {n}' for n in told), 'all', 'another text'), rows
  )
  return (
    f'{table}\n\n{len(values["margins"])} facts, last told {nearest:,} to '
    f'{farthest:,} tokens before the question.'
  )


def _mean(x: np.ndarray) -> str:
  error = f' ± {x.std(ddof=1) / len(x) ** 0.5:.2f}' if len(x) > 1 else ''
  return f'{x.mean():.2f}{error}'


def _plot(cells, path: pathlib.Path) -> None:
  """Plots bits per byte over position, alone and with both controls."""
  figure = mpl_figure.Figure(figsize=(9, 4), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  for ax, name in zip(axes, ('plain', 'both'), strict=True):
    for arm, cell in cells.items():
      edges = np.array(cell.values['edges'])
      bits = np.array(cell.values['bits'][name]) / cell.values['bytes']
      ax.plot((edges[1:] + edges[:-1]) / 2, bits, 'o-', label=arm)
    ax.set_xlabel('position in the stream, tokens')
    ax.set_title(_CONTROLS[name])
  axes[0].set_ylabel('bits per byte')
  axes[0].legend()
  report_files.save_figure(figure, path)
