"""Bits per byte of long streams by position, with state carried to the end.

A stream is read three times: with nothing written, with memories, and with
memories and levels. All read the same tokens, so that the curves compare like
with like at every position; the slope of one curve also depends on the text.
"""

from collections.abc import Callable, Iterable, Mapping
import math
import pathlib
from typing import Any

import jax
from matplotlib import figure as mpl_figure
import numpy as np

from nested_learning import files
from nested_learning import models
from nested_learning.evaluation import bits_per_byte

_FIRST = 64  # positions of the first bin: single positions have few bytes


def make_evaluate_streams(
  reading: bits_per_byte.Reading,
) -> Callable[[Any, Iterable[Any]], bits_per_byte.Evaluation]:
  """Makes `evaluate(params, batches) -> Evaluation` of one stream per row.

  Args:
    reading: From `make_reading`. Where the attention of its model has no room
      for the next batch, it begins anew; levels go on.

  Returns:
    The function. Batches are as for `make_evaluate`, and each row continues the
    row of the batch before. Position 0 is the first token of the stream.
  """
  model = reading.model
  limit = models.max_stream_length(model.config)
  restart = None if model.reader is None else jax.jit(model.reader.restart)

  def evaluate(params, batches):
    pieces, state, age = [], None, 0
    for batch in batches:
      num_rows, num_tokens = batch['tokens'].shape
      is_full = limit is not None and age + num_tokens > limit
      if is_full and age and restart is not None:
        state, age = restart(params, state, np.ones(num_rows, bool)), 0
      elif state is None or is_full:
        state, age = reading.init_state(params, num_rows), 0
      _, sums, state = reading.read(params, state, batch)
      pieces.append(sums)
      age += num_tokens
    empty = bits_per_byte.Totals(*[np.zeros(0)] * 3)
    totals = jax.tree.map(lambda *x: np.concatenate(x), empty, *pieces)
    return bits_per_byte.make_evaluation(totals)

  return evaluate


def bits_per_byte_over_bins(
  evaluation: bits_per_byte.Evaluation, edges: np.ndarray
) -> np.ndarray:
  """Returns bits per byte between successive positions.

  Args:
    evaluation: The losses.
    edges: int [n + 1], positions in ascending order.

  Returns:
    float [n]; NaN where a bin has no text.
  """
  sums = lambda x: np.add.reduceat(x, edges[:-1])
  totals = evaluation.totals
  with np.errstate(invalid='ignore'):
    return sums(totals.loss) / sums(totals.num_bytes) / math.log(2)


def stream_edges(num_positions: int) -> np.ndarray:
  """Returns edges of bins of a stream: 0, 64, 91, 128, ..., num_positions."""
  edges = bits_per_byte.bin_edges(num_positions)
  return edges[(edges == 0) | (edges >= min(_FIRST, num_positions))]


def write_curves(
  path: pathlib.Path, curves: Mapping[str, bits_per_byte.Evaluation]
) -> None:
  """Writes bits per byte by position as comma-separated values.

  Args:
    path: The file.
    curves: Evaluations of the same streams, by name of the column.
  """
  first = next(iter(curves.values())).totals
  edges = stream_edges(len(first.loss))
  columns = [bits_per_byte_over_bins(x, edges) for x in curves.values()]
  num_bytes = np.add.reduceat(first.num_bytes, edges[:-1])
  lines = [','.join(['begin', 'end', 'num_bytes', *curves])]
  for begin, end, size, *values in zip(
    edges[:-1], edges[1:], num_bytes, *columns, strict=True
  ):
    if size:
      values = ','.join(f'{value:.6f}' for value in values)
      lines.append(f'{begin},{end},{size:.0f},{values}')
  files.write_whole(path, '\n'.join(lines) + '\n')


def plot_curves(
  path: pathlib.Path, curves: Mapping[str, bits_per_byte.Evaluation]
) -> None:
  """Draws bits per byte by position, on a logarithmic axis, as a PNG file.

  Args:
    path: The file.
    curves: Evaluations of the same streams, by label.
  """
  figure = mpl_figure.Figure(figsize=(7, 4), layout='tight')
  axes = figure.subplots()
  for label, evaluation in curves.items():
    edges = stream_edges(len(evaluation.totals.loss))
    values = bits_per_byte_over_bins(evaluation, edges)
    centers = np.sqrt(np.maximum(edges[:-1], edges[1] / 2) * edges[1:])
    axes.plot(centers, values, 'o-', label=label)
  axes.set_xscale('log', base=2)
  axes.set_xlabel('position in the stream, tokens')
  axes.set_ylabel('bits per byte')
  axes.legend()
  figure.savefig(path, dpi=120)
