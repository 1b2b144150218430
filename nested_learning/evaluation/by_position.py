"""Loss by position in the context, memory writes on and off, as table and plot.

The two runs of a model read the same tokens, so their difference at a position,
the gain, compares like with like; the slope of one curve also depends on which
documents are long enough to have that position.
"""

import math
import pathlib

from matplotlib import figure as mpl_figure
import numpy as np

from nested_learning.evaluation import evaluate

_HEADER = 'position,num_tokens,loss,loss_writes_off,gain'


def gain_by_position(
  writes_on: evaluate.Evaluation, writes_off: evaluate.Evaluation
) -> np.ndarray:
  """Nats per token that writing saves at each position [t]."""
  return writes_off.loss_by_position - writes_on.loss_by_position


def write_table(
  path: pathlib.Path,
  writes_on: evaluate.Evaluation,
  writes_off: evaluate.Evaluation,
) -> None:
  """Writes the arrays as comma-separated values, one line per position."""
  columns = (
    np.arange(len(writes_on.totals.loss)),
    writes_on.totals.num_tokens,
    writes_on.loss_by_position,
    writes_off.loss_by_position,
    gain_by_position(writes_on, writes_off),
  )
  lines = [
    f'{int(position)},{int(count)},{on:.6f},{off:.6f},{gain:.6f}'
    for position, count, on, off, gain in zip(*columns, strict=True)
    if count
  ]
  path.write_text('\n'.join([_HEADER, *lines]) + '\n')


def mean_over_bins(
  evaluation: evaluate.Evaluation, edges: np.ndarray
) -> np.ndarray:
  """Mean loss in nats per token between successive positions `edges` [n + 1].

  Returns:
    float [n]; NaN where a bin has no token.
  """
  sums = lambda x: np.add.reduceat(x, edges[:-1])
  with np.errstate(invalid='ignore'):
    return sums(evaluation.totals.loss) / sums(evaluation.totals.num_tokens)


def bin_edges(num_positions: int, per_octave: int = 2) -> np.ndarray:
  """Edges 0, 1, 2, 3, 4, 6, 8, ..., num_positions, evenly spaced in log."""
  num_edges = per_octave * max(math.ceil(math.log2(num_positions)), 1)
  edges = 2 ** (np.arange(num_edges) / per_octave)
  edges = np.round(edges).astype(int)
  return np.unique([0, *edges[edges < num_positions], num_positions])


def plot(
  path: pathlib.Path,
  writes_on: evaluate.Evaluation,
  writes_off: evaluate.Evaluation,
) -> None:
  """Draws both losses and the gain, in bits per token, as a PNG file."""
  edges = bin_edges(len(writes_on.totals.loss))
  centers = (edges[:-1] + edges[1:] - 1) / 2 + 1
  on = mean_over_bins(writes_on, edges) / math.log(2)
  off = mean_over_bins(writes_off, edges) / math.log(2)
  figure = mpl_figure.Figure(figsize=(7, 6), layout='tight')
  losses, gain = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
  losses.plot(centers, off, 'o-', color='tab:gray', label='writes off')
  losses.plot(centers, on, 'o-', color='tab:blue', label='writes on')
  losses.set_ylabel('loss, bits per token')
  losses.legend()
  gain.axhline(0, color='black', linewidth=0.8)
  gain.plot(centers, off - on, 'o-', color='tab:green')
  gain.set_ylabel('gain, bits per token')
  gain.set_xlabel('position in the context, tokens')
  gain.set_xscale('log')
  figure.savefig(path, dpi=120)
