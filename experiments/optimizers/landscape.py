"""Runs every optimiser on the oscillating landscape of NL, eq. 53.

psi(r, theta) = r^2 + k (r - theta + a sin(omega r))^2, from (-3.5, 2): a narrow
valley that winds around r = theta and falls to 0 at the origin.

Command:
  python launch/run.py --config=experiments/optimizers/landscape.py \
    --workdir=runs/landscape

Hardware: two CPU cores, a minute.
Results: experiments/results/optimizers/README.md.
"""

from collections.abc import Sequence
import dataclasses

import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.optimizers import rules

_NAME = 'landscape'


@dataclasses.dataclass(frozen=True)
class LandscapeConfig:
  """The landscape and the search; the paper gives only the starting point."""

  stiffness: float = 10.0  # k
  amplitude: float = 0.5  # a
  frequency: float = 5.0  # omega, radians per unit of r
  num_steps: int = 300
  num_rates: int = 31  # learning rates from 1e-4 to 10, evenly in the logarithm


def get_config() -> LandscapeConfig:
  """Returns the experiment."""
  return LandscapeConfig()


def run(config: LandscapeConfig, workdir: str, mode: str) -> None:
  """Searches the rates and draws the best trajectory of each optimiser."""
  report_files.check_mode(mode)
  cells_lib.run_alone(
    make_task(config, rules.NAMES), config, workdir, module=__name__
  )


def make_task(config: LandscapeConfig, names: Sequence[str]) -> cells_lib.Task:
  """Makes the task of some optimisers; see `rules.make_task`."""
  return rules.make_task(_NAME, config, names, _search, _report)


def height(config: LandscapeConfig, r, theta):
  """Returns psi(r, theta)."""
  wave = config.amplitude * jnp.sin(config.frequency * r)
  return r**2 + config.stiffness * (r - theta + wave) ** 2


def _search(config, name):
  """Returns the values of a cell."""

  def loss_fn(params, x):
    # The point is a linear map of the constant input 1, so that rules for
    # matrices, and DGD, which needs inputs, apply.
    r, theta = (x @ params['kernel'])[0]
    return height(config, r, theta)

  rates = np.logspace(-4, 1, config.num_rates)
  start = {'kernel': jnp.array([[-3.5, 2.0]])}
  swept = rules.sweep(
    name,
    loss_fn,
    start,
    jnp.ones((config.num_steps, 1, 1)),
    rates=rates,
    observe=lambda params: params['kernel'][0],
  )
  ends = height(config, *swept.params['kernel'][:, 0].T)
  found = rules.best(ends)
  first = swept.losses[0, 0]
  below = np.flatnonzero(swept.losses[found] < 0.1)
  return {
    'rate': rates[found],
    'end': ends[found],
    'steps_to_0.1': below[0] if below.size else None,
    'rates_that_descend': np.sum(np.isfinite(ends) & (ends < first)),
    'path': np.concatenate([start['kernel'], swept.observed[found]]),
  }


def _report(config, found, folder):
  order = sorted(found, key=lambda name: cells_lib.number(found[name], 'end'))
  _draw(folder / 'landscape.png', config, {name: found[name] for name in order})
  rows = []
  for name in order:
    values = found[name].values
    reached = values['steps_to_0.1']
    reached = f'> {config.num_steps}' if reached is None else reached
    descends = values['rates_that_descend']
    rows.append((name, values['rate'], values['end'], reached, descends))
  head = (
    'optimiser', 'best rate', f'psi after {config.num_steps} steps',
    'steps to psi < 0.1', f'rates of {config.num_rates} that descend',
  )  # fmt: skip
  return [
    '## The oscillating landscape',
    'psi(r, theta) = r^2 + k (r - theta + a sin(omega r))^2 (eq. 53) from '
    f'(-3.5, 2), with k = {config.stiffness:g}, a = {config.amplitude:g} and '
    f'omega = {config.frequency:g}; each optimiser at the best of '
    f'{config.num_rates} rates from 1e-4 to 10, falling linearly to zero.',
    report_files.table(head, rows),
    '![Trajectories over the contours](landscape.png)',
    f'{order[0]} ends lowest and {order[-1]} highest. {_first_below(found)}',
    'The point is a 1 x 2 matrix with the input 1. To orthogonalise its '
    'gradient is to normalise it, so that steps of Muon and M3 have the same '
    'length on any slope. The printed DGD erases the output for that input, '
    'which is the point itself: it also pulls to the origin, where the minimum '
    'happens to be.',
  ]


def _first_below(found) -> str:
  """Returns the first optimiser below 0.1 in words."""
  steps = {
    name: cell.values['steps_to_0.1']
    for name, cell in found.items()
    if cell.values['steps_to_0.1'] is not None
  }
  if not steps:
    return 'None is ever below 0.1.'
  first = min(steps, key=steps.get)
  return f'{first} is the first below 0.1, after {steps[first]} steps.'


def _draw(path, config, cells):
  """Draws one panel per optimiser: its trajectory over the contours."""
  columns = 5
  lines = -(-len(cells) // columns) or 1
  figure = mpl_figure.Figure(
    figsize=(2.5 * columns, 2.7 * lines), layout='constrained'
  )
  panels = figure.subplots(
    lines, columns, sharex=True, sharey=True, squeeze=False
  ).ravel()
  r, theta = np.meshgrid(np.linspace(-4.5, 2.5, 150), np.linspace(-4.5, 3, 150))
  z = np.array(height(config, r, theta))
  for axes in panels[len(cells) :]:
    axes.set_axis_off()
  for axes, (name, cell) in zip(panels, cells.items(), strict=False):
    points = np.array(cell.values['path'], float).T
    axes.contourf(
      r, theta, np.log10(z + 1e-2), levels=16, cmap='Blues_r', alpha=0.9
    )
    axes.plot(*points, '.-', color='#d1495b', linewidth=1.0, markersize=2.0)
    axes.plot(*points[:, 0], 'o', color='white', markeredgecolor='black')
    axes.plot(0, 0, '*', color='#edae49', markersize=11, markeredgecolor='k')
    rate, end = cell.values['rate'], cells_lib.number(cell, 'end')
    axes.set_title(f'{name}\nrate {rate:.2g}, end {end:.1e}', fontsize=9)
    axes.set_xlim(-4.5, 2.5)
    axes.set_ylim(-4.5, 3)
  figure.supxlabel('r')
  figure.supylabel('theta')
  report_files.save_figure(figure, path)
