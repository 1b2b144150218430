"""Defines the optimisers that the experiments compare, and trains with them.

Every optimiser gets the same rates, initial parameters and batches.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import cells as cells_lib
from experiments import report_files
from nested_learning import configs
from nested_learning import optimizers

# The most informative ones first: a comparison may be interrupted.
OPTIMIZERS: dict[str, optimizers.OptimizerConfig] = {
  'AdamW': optimizers.configs.AdamW(),
  'Muon': optimizers.configs.Muon(),
  'M3': optimizers.configs.M3(),
  'M3 no second moment': optimizers.configs.M3(second_decay=None),
  'M3 no slow momentum': optimizers.configs.M3(slow_every=None),
  'SGD with momentum': optimizers.configs.Sgd(momentum=0.9),
  'delta momentum': optimizers.configs.DeltaMomentum(),
  'preconditioned momentum': optimizers.configs.PreconditionedMomentum(),
  'deep momentum': optimizers.configs.DeepMomentum(),
  'AdEMAMix': optimizers.configs.AdEMAMix(),
  # Rates of maps are near 1, and Adam's steps have the size of the rate.
  'DGD corrected': optimizers.configs.Dgd(fallback_scale=0.01),
  'DGD printed': optimizers.configs.Dgd('printed', fallback_scale=0.01),
}
NAMES = tuple(OPTIMIZERS)
# On streams, with other periods of the slow momentum.
OPTIMIZERS |= {
  f'M3 slow every {n}': optimizers.configs.M3(slow_every=n) for n in (4, 64)
}
STREAM_NAMES = (
  'M3 no slow momentum',
  'M3 slow every 4',
  'M3',
  'M3 slow every 64',
  'AdamW',
  'AdEMAMix',
)


def settings(name: str) -> dict[str, Any]:
  """Returns the config of an optimiser as JSON has it."""
  return json.loads(configs.to_json(OPTIMIZERS[name]))


def is_dgd(name: str) -> bool:
  """Returns whether an optimiser is a form of Delta Gradient Descent."""
  return isinstance(OPTIMIZERS[name], optimizers.configs.Dgd)


def style(name: str) -> dict[str, str]:
  """Returns colour and line style of an optimiser in plots."""
  i = list(OPTIMIZERS).index(name)
  return {'color': f'C{i % 10}', 'linestyle': ('-', '--')[i // 10]}


def make_task(
  name: str,
  config: Any,
  names: Sequence[str],
  search: Callable[[Any, str], Mapping[str, Any]],
  report: Callable[..., list[str]],
) -> cells_lib.Task:
  """Makes a task whose cells are optimisers at the best of the same rates.

  Args:
    name: Name of the task.
    config: Its config, a dataclass.
    names: Optimisers.
    search: `search(config, optimizer)` returns the values of a cell.
    report: `report(config, cells, folder)` takes cells by optimiser, draws
      plots into the folder and returns sections; empty ones are left out.
  """

  def measure(store):
    for optimizer in names:
      cells_lib.measure(
        store,
        name,
        report_files.key(optimizer),
        {**dataclasses.asdict(config), 'optimizer': settings(optimizer)},
        functools.partial(search, config, optimizer),
      )

  def write(store, folder):
    cells = cells_lib.read(store, name)
    keys = {optimizer: report_files.key(optimizer) for optimizer in NAMES}
    found = {x: cells[key] for x, key in keys.items() if key in cells}
    sections = list(filter(None, report(config, found, folder)))
    return cells_lib.Report(sections, cells_lib.plain_numbers(cells))

  return cells_lib.Task(name, measure, write)


class Setup(NamedTuple):
  """An optimiser for a loss.

  Attributes:
    value_and_grad: Function of (params, batch) that returns (loss, gradients,
      extra arguments of the update).
    make: Function of a rate or schedule that returns an optax transformation.
  """

  value_and_grad: Callable[..., Any]
  make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


def set_up(
  name: str, loss_fn: Callable[..., jax.Array], params: Any, batch: Any
) -> Setup:
  """Sets up an optimiser for a loss.

  Args:
    name: One of `OPTIMIZERS`.
    loss_fn: Function of (params, batch), in which maps are found.
    params: Example parameters.
    batch: Example batch.
  """
  config = OPTIMIZERS[name]
  found = {}
  if is_dgd(name):
    value_and_grad = optimizers.value_and_delta_grad(
      loss_fn, target=config.target, erase=config.erase
    )
    found['maps'] = optimizers.find_maps(loss_fn, params, batch)
  else:
    plain = jax.value_and_grad(loss_fn)
    value_and_grad = lambda params, batch: (*plain(params, batch), {})
    found['dimension_numbers'] = optimizers.dimension_numbers(
      loss_fn, params, batch
    )

  def make(rate):
    return optimizers.configs.make(config, rate, **found)

  return Setup(value_and_grad, make)


def bytes_per_parameter(state: Any, params: Any) -> float:
  """Returns the bytes of an optimiser's state over the number of parameters.

  Args:
    state: Arrays or their shapes.
    params: Arrays or their shapes.
  """
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  return size / sum(x.size for x in jax.tree.leaves(params))


class Trained(NamedTuple):
  """A training with one rate.

  Attributes:
    losses: [step], the loss before each step.
    params: Parameters after the last step.
    observed: What was observed, [observation, ...].
  """

  losses: jax.Array
  params: Any
  observed: Any


def make_train(
  name: str,
  loss_fn: Callable[..., jax.Array],
  params: Any,
  batches: Any,
  *,
  decays: bool = True,
  observe: Callable[[Any], Any] = lambda params: (),
  observe_every: int = 1,
) -> Callable[..., Trained]:
  """Makes a function of (rate, params, batches) that trains, to be jitted.

  Args:
    name: One of `OPTIMIZERS`.
    loss_fn: Function of (params, batch).
    params: Example parameters.
    batches: Example batches; leaves [step, ...].
    decays: Whether the rate falls linearly to zero, or is constant.
    observe: Function of the parameters, called after every `observe_every`
      steps.
    observe_every: Steps between two observations; divides the number of steps.
  """
  num_steps = jax.tree.leaves(batches)[0].shape[0]
  first = jax.tree.map(lambda leaf: leaf[0], batches)
  setup = set_up(name, loss_fn, params, first)
  end = 0.0 if decays else 1.0
  factor = optax.linear_schedule(1.0, end, num_steps)

  def train(rate, params, batches):
    tx = setup.make(lambda count: rate * factor(count))

    def take_step(carry, batch):
      params, state = carry
      loss, gradients, extra = setup.value_and_grad(params, batch)
      updates, state = tx.update(gradients, state, params, **extra)
      return (optax.apply_updates(params, updates), state), loss

    def take_steps(carry, batches):
      carry, losses = jax.lax.scan(take_step, carry, batches)
      return carry, (losses, observe(carry[0]))

    groups = jax.tree.map(
      lambda leaf: leaf.reshape(-1, observe_every, *leaf.shape[1:]), batches
    )
    (params, _), (losses, observed) = jax.lax.scan(
      take_steps, (params, tx.init(params)), groups
    )
    return Trained(losses.reshape(-1), params, observed)

  return train


def sweep(
  name: str,
  loss_fn: Callable[..., jax.Array],
  params: Any,
  batches: Any,
  *,
  rates: Sequence[float],
  **options,
) -> Trained:
  """Trains at all rates in one program.

  Args:
    name: One of `OPTIMIZERS`.
    loss_fn: Function of (params, batch).
    params: Initial parameters.
    batches: Leaves [step, ...].
    rates: Learning rates.
    **options: See `make_train`.

  Returns:
    The trainings; leaves have a leading axis [rate].
  """
  train = make_train(name, loss_fn, params, batches, **options)

  @jax.jit
  def over_rates(rates, params, batches):
    return jax.lax.map(lambda rate: train(rate, params, batches), rates)

  trained = over_rates(jnp.array(rates, jnp.float32), params, batches)
  return jax.tree.map(np.asarray, trained)


def best(scores: Sequence[float]) -> int:
  """Returns the index of the lowest score; diverged runs never win."""
  scores = np.asarray(scores)
  return int(np.argmin(np.where(np.isfinite(scores), scores, math.inf)))


def at_the_edge(
  found: Mapping[str, Sequence[float]], rates: Sequence[float]
) -> str:
  """Returns a sentence that names optimisers whose best rate may lie beyond.

  Args:
    found: Best rates by optimiser, one for each problem.
    rates: The rates that were tried.

  Returns:
    A sentence; '' if all best rates lie inside.
  """
  ends = np.array([min(rates), max(rates)])
  names = [
    name
    for name, theirs in found.items()
    if np.any(np.isclose(np.array(theirs)[:, None], ends))
  ]
  if not names:
    return ''
  return f'The best rate is at an end of those tried for {", ".join(names)}.'
