"""Measures what optimisers forget of a task when they learn an orthogonal one.

One linear map learns task A, then task B, whose inputs are orthogonal to A's
(NL eq. 45). The gradients of B do not change the map's outputs on A, so that
any loss on A is due to the optimiser. Its state is kept from A to B.

Command:
  python launch/run.py --config=experiments/optimizers/orthogonal_tasks.py \
    --workdir=runs/orthogonal_tasks

Hardware: two CPU cores, half a minute. Results (orthogonal_tasks.png, and a
table), loss of A after B over that of an untrained map: gradient descent 6e-14,
delta momentum 9e-10, momentum 8e-8, DGD at erase 0.01 1e-4 (as before B, to
four digits), Muon 3e-3, deep momentum 0.13, Adam 0.47, M3 without second moment
0.58, M3 8.5 (at rate 1; 0.55 at 0.22, which learns both tasks nearly as well).
M3's slow momentum, which is meant to preserve old tasks, keeps pushing along
A's gradients with full weight long after A was learned.
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
class OrthogonalTasksConfig:
  """Sizes and the search."""

  num_inputs: int = 32  # half of them for either task
  num_outputs: int = 16
  num_steps: int = 200  # per task
  num_rates: int = 13  # learning rates from 1e-3 to 10, evenly in the logarithm


def get_config(arg: str | None = None) -> OrthogonalTasksConfig:
  """Returns the experiment; takes no argument."""
  del arg
  return OrthogonalTasksConfig()


def run(config: OrthogonalTasksConfig, workdir: str, mode: str) -> None:
  """Trains on A then B at the rate that learns both best; measures A again."""
  report_files.check_mode(mode)
  first, second, start, loss_fn = _make_tasks(config)
  batches = jnp.stack([first] * config.num_steps + [second] * config.num_steps)
  rates = np.logspace(-3, 1, config.num_rates)
  untrained = float(loss_fn(jax.tree.map(lambda x: x[0], start), first))
  evaluate = jax.jit(lambda p: (loss_fn(p, first), loss_fn(p, second)))
  rows, curves, summary, metrics = [], {}, {}, []
  for name in rules.NAMES:
    sweep = rules.sweep(
      name, loss_fn, start, batches, rates=rates, keep_path=True
    )
    # The best rate has the lowest sum of each task's loss after its training.
    learned = sweep.losses[:, 0, config.num_steps - 1]
    found = rules.best(learned + sweep.losses[:, 0, -1])
    path = sweep.path['kernel'][found, 0]
    curve = np.array([evaluate({'kernel': kernel}) for kernel in path])
    curves[name] = curve / untrained
    after_first, kept = curves[name][config.num_steps, 0], curves[name][-1, 0]
    row = (name, float(rates[found]), float(after_first), float(kept))
    rows.append((*row, float(curves[name][-1, 1])))
    summary[f'{report_files.key(name)}_first_after_first'] = float(after_first)
    summary[f'{report_files.key(name)}_first_after_second'] = float(kept)
    summary[f'{report_files.key(name)}_second'] = float(curves[name][-1, 1])
    metrics += [
      {'optimizer': name, 'step': i, 'first': float(a), 'second': float(b)}
      for i, (a, b) in enumerate(curves[name])
    ]
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  _plot(folder / 'orthogonal_tasks.png', config, curves)
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=metrics,
    sections=[
      '# Orthogonal tasks: forgetting of the first',
      'Losses over the loss of the untrained map.',
      report_files.table(
        ('optimiser', 'rate', 'A after A', 'A after B', 'B after B'),
        sorted(rows, key=lambda row: row[3]),
      ),
      '![Loss of the first task](orthogonal_tasks.png)',
      'A gradient of B is orthogonal to the inputs of A, and so is any sum of '
      'such gradients. Dividing it entry by entry leaves that space. '
      'Orthogonalising does not, but while a momentum still holds gradients of '
      'A, they get the same weight as those of B; a slow one holds them long.',
    ],
  )


def _make_tasks(config):
  rng = np.random.default_rng(0)
  dim = config.num_inputs
  axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0] * (dim / 2) ** 0.5
  first, second = (jnp.array(part, jnp.float32) for part in np.split(axes, 2))
  target = jnp.array(rng.normal(size=(dim, config.num_outputs)), jnp.float32)
  start = {'kernel': jnp.zeros((1, dim, config.num_outputs))}

  def loss_fn(params, x):
    return 0.5 * jnp.mean(jnp.sum((x @ params['kernel'] - x @ target) ** 2, -1))

  return first, second, start, loss_fn


def _plot(path, config, curves):
  figure = mpl_figure.Figure(figsize=(9, 4.5), layout='constrained')
  axes = figure.subplots()
  for i, (name, curve) in enumerate(curves.items()):
    style = {'color': f'C{i % 10}', 'linestyle': ('-', '--')[i // 10]}
    axes.plot(np.maximum(curve[:, 0], 1e-12), label=name, **style)
  axes.axvline(config.num_steps, color='black', linewidth=0.8)
  axes.set(yscale='log', xlabel='step (A, then B)', ylabel='loss of task A')
  axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
  figure.savefig(path, dpi=110)
