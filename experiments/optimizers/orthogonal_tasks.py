"""Measures what optimisers forget of a task when they learn an orthogonal one.

One linear map learns task A, then task B, whose inputs are orthogonal to A's
(NL eq. 45). The gradients of B do not change the map's outputs on A, so that
any loss on A is due to the optimiser. Its state is kept from A to B.

Command:
  python launch/run.py --config=experiments/optimizers/orthogonal_tasks.py \
    --workdir=runs/orthogonal_tasks

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

_NAME = 'orthogonal_tasks'


@dataclasses.dataclass(frozen=True)
class OrthogonalTasksConfig:
  """Sizes and the search."""

  num_inputs: int = 32  # half of them for either task
  num_outputs: int = 16
  num_steps: int = 200  # per task
  num_rates: int = 13  # learning rates from 1e-3 to 10, evenly in the logarithm


def get_config() -> OrthogonalTasksConfig:
  """Returns the experiment."""
  return OrthogonalTasksConfig()


def run(config: OrthogonalTasksConfig, workdir: str, mode: str) -> None:
  """Trains on A then B at the rate that learns both best; measures A again."""
  report_files.check_mode(mode)
  cells_lib.run_alone(
    make_task(config, rules.NAMES), config, workdir, module=__name__
  )


def make_task(
  config: OrthogonalTasksConfig, names: Sequence[str]
) -> cells_lib.Task:
  """Makes the task of some optimisers; see `rules.make_task`."""
  return rules.make_task(_NAME, config, names, _search, _report)


def _search(config, name):
  """Returns the values of a cell; losses are over those of the start."""
  first, second, start, loss_fn = _make_tasks(config)
  batches = jnp.stack([first] * config.num_steps + [second] * config.num_steps)
  rates = _rates(config)
  swept = rules.sweep(
    name,
    loss_fn,
    start,
    batches,
    rates=rates,
    observe=lambda p: jnp.stack([loss_fn(p, first), loss_fn(p, second)]),
  )
  curves = swept.observed / loss_fn(start, first)  # [rate, step, task]
  # The best rate has the lowest sum of each task's loss after its training.
  after_first, after_second = curves[:, config.num_steps - 1], curves[:, -1]
  found = rules.best(after_first[:, 0] + after_second[:, 1])
  return {
    'rate': rates[found],
    'first_after_first': after_first[found, 0],
    'first_after_second': after_second[found, 0],
    'second_after_second': after_second[found, 1],
    'first': curves[found, ::5, 0],  # every fifth step
  }


def _rates(config):
  return np.logspace(-3, 1, config.num_rates)


def _make_tasks(config):
  rng = np.random.default_rng(0)
  dim = config.num_inputs
  axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0] * (dim / 2) ** 0.5
  first, second = (jnp.array(part, jnp.float32) for part in np.split(axes, 2))
  target = jnp.array(rng.normal(size=(dim, config.num_outputs)), jnp.float32)
  start = {'kernel': jnp.zeros((dim, config.num_outputs))}

  def loss_fn(params, x):
    return 0.5 * jnp.mean(jnp.sum((x @ params['kernel'] - x @ target) ** 2, -1))

  return first, second, start, loss_fn


def _report(config, found, folder):
  _plot(folder / 'orthogonal_tasks.png', config, found)
  keys = ('first_after_first', 'first_after_second', 'second_after_second')
  rows = [
    (name, cell.values['rate'], *(cells_lib.number(cell, key) for key in keys))
    for name, cell in found.items()
  ]
  rows.sort(key=lambda row: row[3])
  return [
    '## Orthogonal tasks: forgetting of the first',
    f'Losses over the loss of the untrained map, {config.num_steps} steps a '
    f'task, each optimiser at the best of {config.num_rates} rates from 1e-3 '
    'to 10, falling linearly to zero.',
    report_files.table(
      ('optimiser', 'rate', 'A after A', 'A after B', 'B after B'),
      rows,
    ),
    '![Loss of the first task](orthogonal_tasks.png)',
    # Losses below are rounding errors of float32.
    'No more of the first task than 1e-6 is lost by '
    f'{", ".join(row[0] for row in rows if row[3] < 1e-6) or "none"}; '
    f'{rows[-1][0]} keeps it worst ({rows[-1][3]:.1e}). Behind an untrained '
    'map on it: '
    f'{", ".join(row[0] for row in rows if row[3] > 1) or "none"}.',
    'A gradient of B is orthogonal to the inputs of A, and so is any sum of '
    'such gradients. Dividing it entry by entry leaves that space. '
    'Orthogonalising does not, but while a momentum still holds gradients of '
    'A, they get the same weight as those of B; a slow one holds them long.',
    rules.at_the_edge(
      {name: [cell.values['rate']] for name, cell in found.items()},
      _rates(config),
    ),
  ]


def _plot(path, config, found):
  figure = mpl_figure.Figure(figsize=(8.5, 4.5), layout='constrained')
  axes = figure.subplots()
  for name, cell in found.items():
    losses = np.array(cell.values['first'], float)
    steps = 1 + 5 * np.arange(len(losses))
    axes.plot(steps, np.maximum(losses, 1e-12), label=name, **rules.style(name))
  axes.axvline(config.num_steps, color='black', linewidth=0.8)
  axes.set(yscale='log', xlabel='step (A, then B)', ylabel='loss of task A')
  axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  report_files.save_figure(figure, path)
