"""Measures how ill-conditioned inputs slow each optimiser.

A linear map is fitted to noiseless targets. The inputs' singular values fall
from 1 to 1 / condition; the least loss is 0.

Command:
  python launch/run.py --config=experiments/optimizers/least_squares.py \
    --workdir=runs/least_squares

Hardware: two CPU cores, a minute.
Results: experiments/results/optimizers/README.md.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.optimizers import rules

_NAME = 'least_squares'


@dataclasses.dataclass(frozen=True)
class LeastSquaresConfig:
  """The family of problems and the search."""

  num_inputs: int = 24
  num_outputs: int = 16
  conditions: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)  # of the inputs
  num_steps: int = 300
  num_rates: int = 13  # learning rates from 1e-3 to 10, evenly in the logarithm


def get_config() -> LeastSquaresConfig:
  """Returns the experiment."""
  return LeastSquaresConfig()


def run(config: LeastSquaresConfig, workdir: str, mode: str) -> None:
  """Fits every problem with every optimiser at the best of the same rates."""
  report_files.check_mode(mode)
  cells_lib.run_alone(
    make_task(config, rules.NAMES), config, workdir, module=__name__
  )


def make_task(
  config: LeastSquaresConfig, names: Sequence[str]
) -> cells_lib.Task:
  """Makes the task of some optimisers; see `rules.make_task`."""
  return rules.make_task(_NAME, config, names, _search, _report)


def _search(config, name):
  """Returns the values of a cell: rate and relative loss by condition."""
  rates = _rates(config)
  values = {}
  for condition in config.conditions:
    x, start, loss_fn = _make_problem(config, condition)
    batches = jnp.broadcast_to(x, (config.num_steps, *x.shape))
    swept = rules.sweep(name, loss_fn, start, batches, rates=rates)
    ends = jax.vmap(loss_fn, in_axes=(0, None))(swept.params, x)
    found = rules.best(ends)
    values[f'rate_{condition:g}'] = rates[found]
    values[f'condition_{condition:g}'] = ends[found] / loss_fn(start, x)
  return values


def _rates(config):
  return np.logspace(-3, 1, config.num_rates)


def _make_problem(config, condition):
  rng = np.random.default_rng(0)
  dim = config.num_inputs
  left, right = (np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(2))
  values = np.logspace(0, -np.log10(condition), dim) * dim**0.5
  x = jnp.array(left * values @ right, jnp.float32)
  target = jnp.array(rng.normal(size=(dim, config.num_outputs)), jnp.float32)
  start = {'kernel': jnp.zeros((dim, config.num_outputs))}

  def loss_fn(params, x):
    return 0.5 * jnp.mean(jnp.sum((x @ params['kernel'] - x @ target) ** 2, -1))

  return x, start, loss_fn


def _report(config, cells, folder):
  found = {
    name: [
      cells_lib.number(cell, f'condition_{c:g}') for c in config.conditions
    ]
    for name, cell in cells.items()
  }
  _plot(folder / 'least_squares.png', config, found)
  rows = sorted(
    ([n, *values] for n, values in found.items()), key=lambda row: row[-1]
  )
  return [
    '## Ill-conditioned least squares',
    f'Loss after {config.num_steps} steps over the loss at the start, each '
    f'optimiser at the best of {config.num_rates} rates from 1e-3 to 10 for '
    'that problem, falling linearly to zero. A condition is the largest over '
    'the smallest singular value of the inputs.',
    report_files.table(
      ('optimiser', *(f'condition {c:g}' for c in config.conditions)), rows
    ),
    '![Relative loss by condition number](least_squares.png)',
    *_outcomes(config, found),
    'The printed DGD minimises the loss plus 1/2 |W x|^2. With erase 1, the '
    'minimum is a map with half of every target as its output: a quarter of '
    'the loss.',
    rules.at_the_edge(
      {
        name: [cell.values[f'rate_{c:g}'] for c in config.conditions]
        for name, cell in cells.items()
      },
      _rates(config),
    ),
  ]


def _outcomes(config, found) -> list[str]:
  """Returns the lowest and the highest losses in words."""
  sentences = []
  for i in dict.fromkeys((0, len(config.conditions) - 1)):
    order = sorted(found, key=lambda name, i=i: found[name][i])
    shown = [f'{name} ({found[name][i]:.1e})' for name in order]
    sentences.append(
      f'At condition {config.conditions[i]:g} the lowest losses are those of '
      f'{", ".join(shown[:3])}, the highest that of {shown[-1]}.'
    )
  return [' '.join(sentences)]


def _plot(path, config, found):
  figure = mpl_figure.Figure(figsize=(8.5, 4.5), layout='constrained')
  axes = figure.subplots()
  for name, values in found.items():
    floored = np.maximum(values, 1e-14)
    axes.plot(
      config.conditions, floored, marker='.', label=name, **rules.style(name)
    )
  axes.set(xscale='log', yscale='log', xlabel='condition number of the inputs')
  axes.set_ylabel('final loss over first loss')
  axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  report_files.save_figure(figure, path)
