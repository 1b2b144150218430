"""Measures whether a slow momentum helps on tasks in sequence.

A stream has the same batches in three orders: mixed, in blocks of tasks that
return, and every task once. Learners are M3 without a slow momentum and with
one that updates every 4, 16 or 64 steps, and AdamW and AdEMAMix, which is AdamW
with a slow momentum. Rates are constant, since a stream has no known end.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.optimizers import rules

NUM_BLOCKS = 4  # of a task, if it returns


class Tasks(NamedTuple):
  """Tasks that one model learns.

  Attributes:
    loss_fn: Function of (params, batch).
    init: Function of a seed that returns initial parameters.
    draw: Function of (task, seed) that returns its batches, [step, ...].
    evaluate: Function of the parameters that returns the loss on other data of
      each task [task].
  """

  loss_fn: Callable[..., jax.Array]
  init: Callable[[int], Any]
  draw: Callable[[int, int], Any]
  evaluate: Callable[[Any], jax.Array]


class Stream(NamedTuple):
  """Tasks in sequence.

  Attributes:
    name: Name of the task for cells.
    title: Heading of its section.
    description: Tasks and sizes, in a sentence or two.
    num_tasks: Number of tasks.
    steps_per_task: Steps of each task, over all of its blocks.
    settings: Sizes of the data and of the model.
    make: Makes the tasks; called if a cell is not finished.
  """

  name: str
  title: str
  description: str
  num_tasks: int
  steps_per_task: int
  settings: Mapping[str, Any]
  make: Callable[[], Tasks]


def orders(stream: Stream) -> dict[str, int]:
  """Returns the orders of a stream: the steps of a block by name."""
  steps = stream.steps_per_task
  return {'mixed': 1, 'returning': steps // NUM_BLOCKS, 'once': steps}


def cell_name(order: str, optimizer: str) -> str:
  """Returns the name of the cell of an order and an optimiser."""
  return f'{order},{report_files.key(optimizer)}'


def measure(
  stream: Stream,
  store: cells_lib.Store,
  *,
  rates: Sequence[float],
  num_seeds: int,
) -> None:
  """Measures every cell that is not finished: an order and an optimiser.

  The values of a cell are [rate, seed]: `online` is the mean loss of batches
  before their steps, `final` the mean loss on all tasks after the last step,
  and `forgotten` the mean rise of a task's loss after its last block.

  Args:
    stream: The tasks.
    store: The folders of cells.
    rates: Learning rates.
    num_seeds: Seeds of parameters and data.
  """
  make = functools.cache(stream.make)
  for name in rules.STREAM_NAMES:

    @functools.cache  # all orders share a program
    def compile_for(name=name):
      return _compile(stream, make(), name, rates, num_seeds)

    for order, block in orders(stream).items():
      settings = {
        **stream.settings,
        'optimizer': rules.settings(name),
        'block': block,
        'rates': rates,
        'num_seeds': num_seeds,
      }

      def run(block=block, compile_for=compile_for):
        batches = _draw_all(stream, make(), block, num_seeds)
        observed = compile_for()(batches)
        return summarize(stream, block, *observed, len(rates))

      cells_lib.measure(
        store, stream.name, cell_name(order, name), settings, run
      )


def arrange(num_tasks: int, steps_per_task: int, block: int) -> np.ndarray:
  """Returns which step of which task is next: int [step, 2].

  Args:
    num_tasks: Number of tasks.
    steps_per_task: Steps of each task.
    block: Steps of a task before the next one begins; a divisor of these.
  """
  steps = np.arange(steps_per_task).reshape(-1, 1, block)  # [round, task, step]
  shape = (len(steps), num_tasks, block)
  tasks = np.broadcast_to(np.arange(num_tasks)[:, None], shape)
  steps = np.broadcast_to(steps, shape)
  return np.stack([tasks.reshape(-1), steps.reshape(-1)], axis=-1)


def summarize(stream, block, online, observed, num_rates):
  """Returns the values of a cell from the losses of its runs.

  Args:
    stream: The tasks.
    block: Steps of a task before the next one begins.
    online: Mean losses of batches before their steps, [run].
    observed: Losses of all tasks after every shortest block,
      [run, block, task].
    num_rates: Number of rates; runs are all seeds at the first rate, then at
      the next one.
  """
  shape = (num_rates, -1)
  end = observed[:, -1]  # [run, task]
  values = {
    'online': online.reshape(shape),
    'final': end.mean(axis=-1).reshape(shape),
  }
  if block > 1:
    num_tasks = stream.num_tasks
    shortest = stream.steps_per_task // NUM_BLOCKS
    # Observations at the ends of the last blocks of all tasks.
    ends = np.arange(-num_tasks + 1, 1) * (block // shortest) - 1
    then = observed[:, ends, np.arange(num_tasks)]
    values['forgotten'] = (end - then)[:, :-1].mean(axis=-1).reshape(shape)
  return values


def _compile(stream, tasks, name, rates, num_seeds):
  """Returns a function of the batches of all seeds.

  It returns the mean loss [run] of the batches before their steps, and the
  losses of all tasks after every shortest block [run, block, task]. Runs are
  all seeds at the first rate, then at the next one.
  """
  params = _stack([tasks.init(seed) for seed in range(num_seeds)])
  batches = _draw_all(stream, tasks, 1, num_seeds)
  train = rules.make_train(
    name,
    tasks.loss_fn,
    _at(params, 0),
    _at(batches, 0),
    decays=False,
    observe=tasks.evaluate,
    observe_every=stream.steps_per_task // NUM_BLOCKS,
  )

  @jax.jit
  def run_all(params, batches):
    # One after the other: side by side, both branches of conditions would run.
    def run(point):
      rate, seed = point
      trained = train(rate, _at(params, seed), _at(batches, seed))
      return jnp.mean(trained.losses), trained.observed

    grid = jnp.meshgrid(jnp.array(rates), jnp.arange(num_seeds), indexing='ij')
    return jax.lax.map(run, tuple(axis.ravel() for axis in grid))

  return lambda batches: jax.device_get(run_all(params, batches))


def _draw_all(stream, tasks, block, num_seeds):
  """Returns the batches of a stream in order, leaves [seed, step, ...]."""
  place = arrange(stream.num_tasks, stream.steps_per_task, block)

  def draw(seed):
    drawn = _stack([tasks.draw(i, seed) for i in range(stream.num_tasks)])
    return jax.tree.map(lambda leaf: leaf[place[:, 0], place[:, 1]], drawn)

  return _stack([draw(seed) for seed in range(num_seeds)])


def _at(tree, index):
  return jax.tree.map(lambda leaf: leaf[index], tree)


def _stack(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
