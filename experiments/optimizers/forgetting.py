"""Measures what a map forgets where inputs repeat, and where they vary.

Delta Gradient Descent is said to forget adaptively: a step decays the map along
its input, so that much is given up where inputs repeat and little where they do
not (Nested Learning, section 4.5). One linear map holds an old memory. Then it
reads inputs that lie in some of its directions, in one only or in all, each
with a new value that has to be stored. What is left of the old memory is
measured inside the directions that were read, outside of them, and as a whole;
so is how well a value is read back once it is stored. Every rule moves the
output for an input halfway to its value, or, where it has no such bound, steps
by one half.

Command:
  python launch/run.py --config=experiments/optimizers/forgetting.py \
    --workdir=runs/forgetting --set=results=experiments/results/forgetting

Hardware: one CPU core, a minute.
Results: experiments/results/forgetting/README.md.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import figure as mpl_figure
import numpy as np
import optax

from experiments import cells as cells_lib
from experiments import report_files
from nested_learning import errors
from nested_learning import optimizers

_TASK = 'forgetting'
_HALF = 0.5  # way of an output to its value in one step
_PARTS = ('inside', 'outside', 'whole', 'recall')


@dataclasses.dataclass(frozen=True)
class ForgettingConfig:
  """The map, and what it reads."""

  num_inputs: int = 64
  num_outputs: int = 32
  ranks: tuple[int, ...] = (1, 4, 16, 64)  # directions in which inputs lie
  num_steps: int = 256
  shown_step: int = 64  # of the table
  num_seeds: int = 16  # old memories, directions and streams
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None

  def __post_init__(self):
    fits = all(1 <= rank <= self.num_inputs for rank in self.ranks)
    rule = f'from 1 to num_inputs={self.num_inputs}'
    errors.check_field(self, 'ranks', fits, rule)
    fits = 1 <= self.shown_step <= self.num_steps
    rule = f'from 1 to num_steps={self.num_steps}'
    errors.check_field(self, 'shown_step', fits, rule)


class _Rule(NamedTuple):
  """A loss of one input, and a rule that descends it.

  Attributes:
    loss: Function of (map [n, m], input [n], value [m]).
    target: Of Delta Gradient Descent; None is gradient descent.
    decay: Whether every step also shrinks the whole map, by as much as Delta
      Gradient Descent shrinks it per direction when inputs take all of them.
  """

  loss: Callable[..., jax.Array]
  target: str | None = None
  decay: bool = False


def _dot(kernel, x, value):
  return -jnp.sum((x @ kernel) * value)


def _square(kernel, x, value):
  return 0.5 * jnp.sum((x @ kernel - value) ** 2)


RULES = {
  'gradient descent, dot product': _Rule(_dot),
  'the same with weight decay': _Rule(_dot, decay=True),
  'DGD printed, dot product': _Rule(_dot, 'printed'),
  'gradient descent, squared error': _Rule(_square),
  'DGD corrected, squared error': _Rule(_square, 'corrected'),
  'DGD printed, squared error': _Rule(_square, 'printed'),
}


def get_config() -> ForgettingConfig:
  """Returns the experiment."""
  return ForgettingConfig()


def run(config: ForgettingConfig, workdir: str, mode: str) -> None:
  """Measures every rule and number of directions, and writes the page."""
  report_files.check_mode(mode)
  store = cells_lib.open_store(pathlib.Path(workdir), config.results)
  settings = dataclasses.asdict(config)
  del settings['results'], settings['ranks'], settings['shown_step']
  found = {}
  for name in RULES:
    for rank in config.ranks:
      cell = cells_lib.measure(
        store,
        _TASK,
        f'{report_files.key(name)} {rank}',
        settings,
        lambda name=name, rank=rank: measure(config, name, rank),
      )
      found[name, rank] = {
        part: np.asarray(cell.values[part], float) for part in _PARTS
      }
  _write(config, store, found)


def measure(
  config: ForgettingConfig, name: str, rank: int
) -> dict[str, np.ndarray]:
  """Reads streams of inputs in some directions, and compares with the start.

  Args:
    config: The map, and its number of streams.
    name: A rule of `RULES`.
    rank: Number of directions of the inputs.

  Returns:
    Means over streams, [step] each. 'inside', 'outside' and 'whole' are the
    share of the old memory that is left in the directions of the inputs, in the
    others (NaN where there are none) and in all: the projection of the map on
    the old one, over the old one. 'recall' is the cosine between what is read
    back for an input after its step, and its value.
  """
  rule = RULES[name]
  streams = [_make_stream(config, rank, i) for i in range(config.num_seeds)]
  parts = [jnp.stack(x) for x in zip(*streams, strict=True)]
  old, _, inputs, values = parts
  step = _make_step(rule, config.num_inputs, old[0], inputs[0, 0], values[0, 0])

  def read(old, basis, inputs, values):
    inside = basis.T @ basis
    parts = {
      'inside': inside,
      'outside': jnp.eye(len(inside)) - inside,
      'whole': jnp.eye(len(inside)),
    }

    def body(kernel, data):
      kernel = step(kernel, *data)
      kept = {
        part: jnp.sum(kernel * (p @ old)) / jnp.sum(old * (p @ old))
        for part, p in parts.items()
      }
      return kernel, kept | {'recall': _cosine(data[0] @ kernel, data[1])}

    return jax.lax.scan(body, old, (inputs, values))[1]

  found = jax.jit(jax.vmap(read))(*parts)
  means = {part: np.mean(x, axis=0) for part, x in found.items()}
  if rank == config.num_inputs:
    means['outside'] = np.full(config.num_steps, np.nan)
  return means


def _make_stream(config, rank, seed):
  """Returns an old memory, directions [r, n], inputs [t, n], values [t, m]."""
  rng = np.random.default_rng(seed)
  dim, steps = config.num_inputs, config.num_steps
  old = rng.normal(size=(dim, config.num_outputs))
  old /= config.num_outputs**0.5  # outputs of norm one
  basis = np.linalg.qr(rng.normal(size=(dim, rank)))[0].T
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  inputs = unit(rng.normal(size=(steps, rank))) @ basis
  values = unit(rng.normal(size=(steps, config.num_outputs)))
  return [jnp.asarray(x, jnp.float32) for x in (old, basis, inputs, values)]


def _make_step(rule, num_inputs, *example):
  """Returns a function of (map, input, value) that gives the next map."""
  if rule.target is None:
    shrink = optax.add_decayed_weights(1 / num_inputs if rule.decay else 0.0)
    tx = optax.chain(shrink, optax.sgd(_HALF))
    gradients = jax.grad(rule.loss)
    compute = lambda *args: (gradients(*args), {})
  else:
    # With inputs of norm one, a step goes lr / (1 + lr) of the way.
    value_and_grad, tx = optimizers.dgd_for_model(
      rule.loss,
      *example,
      learning_rate=_HALF / (1 - _HALF),
      target=rule.target,
    )
    compute = lambda *args: value_and_grad(*args)[1:]

  def step(kernel, x, value):
    grads, extra = compute(kernel, x, value)
    updates, _ = tx.update(grads, tx.init(kernel), kernel, **extra)
    return optax.apply_updates(kernel, updates)

  return step


def _cosine(x, y):
  return jnp.sum(x * y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y))


def _write(
  config: ForgettingConfig,
  store: cells_lib.Store,
  found: Mapping[tuple[str, int], Mapping[str, Any]],
) -> None:
  """Writes the page."""
  summary, rows = {}, []
  for (name, rank), parts in found.items():
    numbers = {x: _at(config, parts, x) for x in _PARTS}
    key = f'{report_files.key(name)}_rank_{rank}'
    summary |= {f'{key}_{part}': x for part, x in numbers.items()}
    shown = ['–' if np.isnan(x) else f'{x:.3f}' for x in numbers.values()]
    rows.append((name, rank, *shown))
  _plot(config, found, store.workdir / 'forgetting.png')
  cells_lib.write_page(
    store,
    _TASK,
    config,
    module=__name__,
    summary=summary,
    sections=[
      '# Forgetting where inputs repeat, and where they vary',
      _outcome(config, found),
      f'A map of {config.num_inputs} inputs and {config.num_outputs} outputs, '
      f'means over {config.num_seeds} old memories and streams. Left of the '
      f'old memory after {config.shown_step} inputs, inside their directions, '
      'outside of them and as a whole; and how well a value is read back right '
      'after its step (cosine).',
      report_files.table(('rule', 'directions', *_PARTS), rows),
      '![Left of the old memory](forgetting.png)',
    ],
    plots=['forgetting.png'],
  )


def _at(config, parts, part) -> float:
  """Returns a number of the table, without the sign of a rounded zero."""
  return round(float(parts[part][config.shown_step - 1]), 3) + 0.0


def _outcome(config, found) -> str:
  """Returns what the numbers say about the claim."""
  few, many = min(config.ranks), max(config.ranks)
  at = lambda name, rank, part: _at(config, found[name, rank], part)
  texts = []
  for name in ('DGD printed, dot product', 'DGD corrected, squared error'):
    inside = [at(name, rank, 'inside') for rank in (few, many)]
    lost = [1 - at(name, rank, 'whole') for rank in (few, many)]
    holds = 'holds' if inside[0] < inside[1] else 'does not hold'
    turns = 'more' if lost[0] < lost[1] else 'less'
    texts.append(
      f'**{name}**: the claim {holds} for the directions that are read. Of the '
      f'old memory in them, {inside[0]:.3f} is left after {config.shown_step} '
      f'inputs in {few}, and {inside[1]:.3f} in {many}. Of the memory as a '
      f'whole, {turns} is lost where inputs vary: {lost[0]:.3f} and '
      f'{lost[1]:.3f}.'
    )
  gap = max(
    abs(
      at('gradient descent, squared error', rank, 'inside')
      - at('DGD corrected, squared error', rank, 'inside')
    )
    for rank in config.ranks
  )
  texts.append(
    'Gradient descent on the squared error forgets the same at the same size '
    f'of a step (differences of at most {gap:.1g}): what adapts is the delta '
    'rule, not the optimiser. On the dot product, gradient descent forgets '
    'nothing, and cannot be read where inputs repeat (recall '
    f'{at("gradient descent, dot product", few, "recall"):.2f} against '
    f'{at("DGD printed, dot product", few, "recall"):.2f}); weight decay '
    'forgets the same everywhere.'
  )
  return '\n\n'.join(texts)


def _plot(config, found, path) -> None:
  """Draws the share that is left, inside and as a whole, by step."""
  figure = mpl_figure.Figure(figsize=(10, 4), layout='constrained')
  panels = figure.subplots(1, 2, sharey=True)
  steps = 1 + np.arange(config.num_steps)
  names = 'DGD printed, dot product', 'the same with weight decay'
  for axes, part in zip(panels, ('inside', 'whole'), strict=True):
    for name, style in zip(names, ('-', ':'), strict=True):
      for i, rank in enumerate(config.ranks):
        label = f'{name}, {rank}' if part == 'inside' else None
        curve = found[name, rank][part]
        axes.plot(steps, curve, style, color=f'C{i}', label=label)
    axes.set(xscale='log', xlabel='inputs read', title=part)
  panels[0].set_ylabel('left of the old memory')
  figure.legend(
    fontsize=8, loc='outside right center', title='rule, directions'
  )
  report_files.save_figure(figure, path)
