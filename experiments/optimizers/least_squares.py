"""Measures how ill-conditioned inputs slow each optimiser.

A linear map is fitted to noiseless targets. The inputs' singular values fall
from 1 to 1 / condition; the least loss is 0.

Command:
  python launch/run.py --config=experiments/optimizers/least_squares.py \
    --workdir=runs/least_squares

Hardware: two CPU cores, a minute. Results (least_squares.png, and a table): at
condition 1000 the loss falls to 6e-7 of its start with Muon, 3e-5 with Adam,
5e-5 with preconditioned momentum, 1e-4 with momentum, delta momentum and M3,
4e-4 with deep momentum, and 1e-3 with gradient descent; DGD stays at 1/4. At
condition 1, gradient descent is best, and M3 is behind all others but DGD.
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
class LeastSquaresConfig:
  """The family of problems and the search."""

  num_inputs: int = 24
  num_outputs: int = 16
  conditions: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)  # of the inputs
  num_steps: int = 300
  num_rates: int = 13  # learning rates from 1e-3 to 10, evenly in the logarithm


def get_config(arg: str | None = None) -> LeastSquaresConfig:
  """Returns the experiment; takes no argument."""
  del arg
  return LeastSquaresConfig()


def run(config: LeastSquaresConfig, workdir: str, mode: str) -> None:
  """Fits every problem with every optimiser at the best of the same rates."""
  report_files.check_mode(mode)
  rates = np.logspace(-3, 1, config.num_rates)
  finals, summary, metrics = {name: [] for name in rules.NAMES}, {}, []
  for condition in config.conditions:
    x, start, loss_fn = _make_problem(config, condition)
    batches = jnp.broadcast_to(x, (config.num_steps, *x.shape))
    first = float(loss_fn(jax.tree.map(lambda leaf: leaf[0], start), x))
    for name in rules.NAMES:
      sweep = rules.sweep(name, loss_fn, start, batches, rates=rates)
      final = _measure(loss_fn, x, sweep.params)
      found = rules.best(final)
      relative = float(final[found]) / first
      finals[name].append(relative)
      summary[f'{report_files.key(name)}_condition_{condition:g}'] = relative
      metrics.append(
        {
          'optimizer': name,
          'condition': condition,
          'rate': float(rates[found]),
          'relative_loss': relative,
        }
      )
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  _plot(folder / 'least_squares.png', config, finals)
  rows = sorted(([n, *values] for n, values in finals.items()), key=_last)
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=[
      '# Ill-conditioned least squares',
      f'Loss after {config.num_steps} steps over loss at the start, each at '
      f'the best of {config.num_rates} rates for that problem, decayed to '
      'zero.',
      report_files.table(
        ('optimiser', *(f'condition {c:g}' for c in config.conditions)), rows
      ),
      '![Relative loss by condition number](least_squares.png)',
      'DGD minimises the loss plus 1/2 |W x|^2. With erase 1, the minimum is '
      'a map with half of every target as its output: a quarter of the loss.',
    ],
  )


def _measure(loss_fn, x, params):
  return rules.measure(jax.jit(lambda p: loss_fn(p, x)), params)[:, 0]


def _make_problem(config, condition):
  rng = np.random.default_rng(0)
  dim = config.num_inputs
  left, right = (np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(2))
  values = np.logspace(0, -np.log10(condition), dim) * dim**0.5
  x = jnp.array(left * values @ right, jnp.float32)
  target = jnp.array(rng.normal(size=(dim, config.num_outputs)), jnp.float32)
  start = {'kernel': jnp.zeros((1, dim, config.num_outputs))}

  def loss_fn(params, x):
    return 0.5 * jnp.mean(jnp.sum((x @ params['kernel'] - x @ target) ** 2, -1))

  return x, start, loss_fn


def _last(row):
  return row[-1]


def _plot(path, config, finals):
  figure = mpl_figure.Figure(figsize=(8.5, 4.5), layout='constrained')
  axes = figure.subplots()
  for i, (name, values) in enumerate(finals.items()):
    style = {'color': f'C{i % 10}', 'linestyle': ('-', '--')[i // 10]}
    floored = np.maximum(values, 1e-14)
    axes.plot(config.conditions, floored, marker='.', label=name, **style)
  axes.set(xscale='log', yscale='log', xlabel='condition number of the inputs')
  axes.set_ylabel('final loss over first loss')
  axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=110)
