"""Runs eleven optimisers on the oscillating landscape of NL, eq. 53.

psi(r, theta) = r^2 + k (r - theta + a sin(omega r))^2, from (-3.5, 2): a narrow
valley that winds around r = theta and falls to 0 at the origin.

Command:
  python launch/run.py --config=experiments/optimizers/landscape.py \
    --workdir=runs/landscape

Hardware: two CPU cores, half a minute. Results (landscape.png, and a table),
psi after 300 steps, each at its best rate: preconditioned momentum 9e-12, Adam
2e-8, M3 without second moment 3e-5, Muon 1e-3, DGD 3e-3, momentum and delta
momentum 8e-3, M3 1e-2, gradient descent 2e-2, deep momentum 6e-2. Delta
momentum is the first below 0.1 (18 steps), but Adam ends far lower. The end of
M3 is sensitive to rounding: another order of its products gave 6e-3, and 2e-6
without second moment.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np

from experiments import report_files
from experiments.optimizers import rules


@dataclasses.dataclass(frozen=True)
class LandscapeConfig:
  """The landscape and the search; the paper gives only the starting point."""

  stiffness: float = 10.0  # k
  amplitude: float = 0.5  # a
  frequency: float = 5.0  # omega, radians per unit of r
  num_steps: int = 300
  num_rates: int = 31  # learning rates from 1e-4 to 10, evenly in the logarithm


def get_config(arg: str | None = None) -> LandscapeConfig:
  """Returns the experiment; takes no argument."""
  del arg
  return LandscapeConfig()


def run(config: LandscapeConfig, workdir: str, mode: str) -> None:
  """Searches the rates and draws the best trajectory of each optimiser."""
  report_files.check_mode(mode)

  def height(r, theta):
    wave = config.amplitude * jnp.sin(config.frequency * r)
    return r**2 + config.stiffness * (r - theta + wave) ** 2

  def loss_fn(params, x):
    # The point is a linear map of the constant input 1, so that rules for
    # matrices, and DGD, which needs inputs, apply.
    r, theta = (x @ params['point'])[0]
    return height(r, theta)

  rates = np.logspace(-4, 1, config.num_rates)
  start = {'point': jnp.array([[[-3.5, 2.0]]])}
  inputs = jnp.ones((config.num_steps, 1, 1))
  rows, summary, metrics, paths = [], {}, [], {}
  for name in rules.NAMES:
    sweep = rules.sweep(
      name, loss_fn, start, inputs, rates=rates, keep_path=True
    )
    finals = np.array(
      jax.vmap(lambda p: loss_fn({'point': p}, inputs[0]))(
        sweep.params['point'][:, 0]
      )
    )
    found = rules.best(finals)
    path = np.array(sweep.path['point'][found, 0, :, 0])
    losses = sweep.losses[found, 0]
    below = np.flatnonzero(losses < 0.1)
    reached = int(below[0]) if below.size else f'> {config.num_steps}'
    stable = int(np.sum(np.isfinite(finals) & (finals < losses[0])))
    paths[name] = path
    final, rate = float(finals[found]), float(rates[found])
    rows.append((name, rate, final, reached, stable))
    summary[f'{report_files.key(name)}_final'] = final
    summary[f'{report_files.key(name)}_rate'] = rate
    metrics += [
      {'optimizer': name, 'step': step, 'loss': float(loss)}
      for step, loss in enumerate(losses)
    ]
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  _draw(folder / 'landscape.png', height, paths, rows)
  head = (
    'optimiser', 'best rate', f'psi after {config.num_steps}',
    'steps to psi < 0.1', f'rates of {config.num_rates} that descend',
  )  # fmt: skip
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=[
      '# The oscillating landscape',
      '![Trajectories over the contours](landscape.png)',
      report_files.table(head, sorted(rows, key=lambda row: row[2])),
      'Every optimiser at the best of the same rates, decayed linearly to '
      'zero. The point is a 1 x 2 matrix with the input 1. To orthogonalise '
      'its gradient is to normalise it, so that steps of Muon and M3 have the '
      'same length on any slope. DGD erases the output for that input, which '
      'is the point itself: it also pulls to the origin, where the minimum '
      'happens to be.',
    ],
  )


def _draw(path, height, paths, rows):
  """Draws one panel per optimiser: its trajectory over the contours."""
  figure = mpl_figure.Figure(figsize=(13, 9.5), layout='constrained')
  panels = figure.subplots(3, 4, sharex=True, sharey=True).ravel()
  r, theta = np.meshgrid(np.linspace(-4.5, 2.5, 300), np.linspace(-4.5, 3, 300))
  z = np.array(height(r, theta))
  for axes in panels[len(paths) :]:
    axes.set_axis_off()
  for axes, (_name, points), row in zip(
    panels, paths.items(), rows, strict=False
  ):
    axes.contourf(
      r, theta, np.log10(z + 1e-2), levels=24, cmap='Blues_r', alpha=0.9
    )
    axes.plot(*points.T, color='#d1495b', linewidth=1.1)
    axes.plot(*points.T, '.', color='#d1495b', markersize=2.5)
    axes.plot(*points[0], 'o', color='white', markeredgecolor='black')
    axes.plot(
      0, 0, '*', color='#edae49', markersize=13, markeredgecolor='black'
    )
    title = f'{row[0]}\nrate {row[1]:.2g}, end {row[2]:.1e}'
    axes.set_title(title, fontsize=10)
    axes.set_xlim(-4.5, 2.5)
    axes.set_ylim(-4.5, 3)
  figure.supxlabel('r')
  figure.supylabel('theta')
  figure.savefig(path, dpi=110)
