"""A plot of one metric over the cells of a sweep."""

from collections.abc import Mapping, Sequence
import math

from matplotlib import figure as mpl_figure
from matplotlib import ticker

from launch.sweeps import cells as cells_lib
from launch.sweeps import results as results_lib


def make_figure(
  metric: str,
  cells: Sequence[cells_lib.Cell],
  values: Mapping[str, results_lib.Statistic],
) -> mpl_figure.Figure:
  """Draws a metric, with its spread over the seeds as error bars.

  Where the grid has a field of numbers, the first such field is the x axis and
  the other fields and the rows make lines; otherwise a cell is a line of text.

  Args:
    metric: Its name.
    cells: The cells, in their order.
    values: From the names of those cells that have one to the number.

  Returns:
    The figure.
  """
  shown = [
    cell
    for cell in cells
    if cell.name in values and math.isfinite(values[cell.name].mean)
  ]
  field = _number_field(cells)
  height = 4.0 if field else 1.2 + 0.3 * len(shown)
  figure = mpl_figure.Figure(figsize=(7, height), layout='tight')
  axes = figure.subplots()
  if field:
    _draw_curves(axes, field, shown, values)
    axes.set_ylabel(metric)
  else:
    _draw_cells(axes, shown, values)
    axes.set_xlabel(metric)
  return figure


def _draw_curves(axes, field, cells, values) -> None:
  """A curve over the field for each choice of everything else."""
  curves: dict[str, list[tuple[float, results_lib.Statistic]]] = {}
  for cell in cells:
    rest = [f'{p.split(".")[-1]}={v}' for p, v in cell.point if p != field]
    label = ', '.join([cell.row] * bool(cell.row) + rest)
    x = float(dict(cell.point)[field])
    curves.setdefault(label, []).append((x, values[cell.name]))
  for label, points in curves.items():
    points.sort(key=lambda point: point[0])
    axes.errorbar(
      [x for x, _ in points],
      [y.mean for _, y in points],
      [_length(y) for _, y in points],
      marker='.',
      capsize=3,
      label=label,
    )
  axes.set_xlabel(field)
  numbers = sorted({x for points in curves.values() for x, _ in points})
  if numbers and numbers[0] > 0 and numbers[-1] >= 4 * numbers[0]:
    axes.set_xscale('log', base=2)
  axes.set_xticks(numbers, [f'{x:g}' for x in numbers])
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  if len(curves) > 1:
    axes.legend(fontsize=8)


def _draw_cells(axes, cells, values) -> None:
  """A point for each cell, the first at the top."""
  places = range(len(cells))
  axes.errorbar(
    [values[cell.name].mean for cell in cells],
    places,
    xerr=[_length(values[cell.name]) for cell in cells],
    fmt='o',
    capsize=3,
  )
  axes.set_yticks(places, [cell.name for cell in cells])
  axes.margins(y=0.5 / max(len(cells), 1))
  axes.invert_yaxis()
  axes.grid(axis='x', alpha=0.4)


def _length(statistic: results_lib.Statistic) -> float:
  """Of an error bar, to either side."""
  return statistic.spread if math.isfinite(statistic.spread) else 0.0


def _number_field(cells: Sequence[cells_lib.Cell]) -> str | None:
  """The first field of the grid whose values are all numbers, two or more."""
  fields = cells[0].point if cells else ()
  for i, (path, _) in enumerate(fields):
    values = {cell.point[i][1] for cell in cells}
    if len(values) > 1 and all(map(_is_number, values)):
      return path
  return None


def _is_number(text: str) -> bool:
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False
