"""Speed and state of the rows of the sweep over Hope, in one run.

Command:
  python launch/run.py --config=experiments/benchmarks/rows.py \
    --workdir=runs/rows --set=results=experiments/results/benchmarks/rows

`:hope,titans` measures these rows of `experiments/ablations/hope.py` alone.

Hardware: two CPU cores, ten minutes.
Results: experiments/results/benchmarks/rows/README.md.

Every row is a model of the same number of parameters within 3 per cent; it
takes gradients of the sweep's batches. Seconds are those that the process
worked, and the rows take turns, so that other work on the machine changes the
ratios little; the speeds that the sweep itself prints depend on what ran beside
its runs.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cells as cells_lib
from experiments import report_files
from experiments.ablations import hope
from experiments.benchmarks import timing
from nested_learning import errors
from nested_learning import evaluation
from nested_learning import models
from nested_learning import parameters

_TASK = 'rows'
_BASE = 'gated_deltanet'  # of the ratios


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """Rows, and how often each is timed."""

  rows: tuple[str, ...] = (
    'hope',
    'target_own',
    'adaptive',
    'hidden_128',
    'levels_3',
    'printed',
    'titans',
    _BASE,
    'transformer',
    'convolved_transformer',
  )
  batch_size: int | None = None  # rows of text; None is the sweep's
  repeats: int = 5  # the fastest counts
  # Folder of earlier cells, to which page and cells are written as well.
  results: str | None = None

  def __post_init__(self):
    rule = f'rows of the sweep with {_BASE!r}, which all ratios are to'
    errors.check_field(self, 'rows', _BASE in self.rows, rule)


def get_config(arg: str | None = None) -> BenchmarkConfig:
  """Returns the benchmark of all or the named rows; 'small' is for tests."""
  if arg is None:
    return BenchmarkConfig()
  if arg == 'small':
    return BenchmarkConfig(rows=('hope', _BASE), batch_size=1, repeats=1)
  return BenchmarkConfig(rows=tuple(dict.fromkeys((*arg.split(','), _BASE))))


def run(config: BenchmarkConfig, workdir: str, mode: str) -> None:
  """Measures all rows together, and writes the page."""
  report_files.check_mode(mode)
  store = cells_lib.open_store(pathlib.Path(workdir), config.results)
  settings = dataclasses.asdict(config)
  del settings['results']
  cell = cells_lib.measure(
    store, _TASK, 'speed', settings, lambda: measure(config)
  )
  base = cell.values[f'{_BASE}_tokens_per_second']
  summary, rows = {}, []
  for name in config.rows:
    speed, state, count = (
      cell.values[f'{name}_{key}']
      for key in ('tokens_per_second', 'state_bytes', 'num_parameters')
    )
    summary[f'{name}_speed'] = speed / base
    rows.append((name, f'{speed:,.0f}', speed / base, f'{state:,}', count))
  head = (
    'row',
    'tokens/s of a gradient',
    f'over {_BASE}',
    'bytes of a stream',
    'parameters',
  )
  half = 'at least' if summary.get('hope_speed', 0) >= 0.5 else 'less than'
  cells_lib.write_page(
    store,
    _TASK,
    config,
    module=__name__,
    summary=summary,
    sections=[
      '# Speed and state of the rows of the sweep over Hope',
      f'Hope has {summary["hope_speed"]:.2f} of the speed of Gated DeltaNet '
      f'({half} the half that was wanted).'
      if 'hope_speed' in summary
      else '',
      'Tokens per second that the process worked, in the gradient of a batch '
      'of `experiments/ablations/hope.py`; the rows took turns. The state is '
      'that of one stream, without levels that learn in it.',
      report_files.table(head, rows),
    ],
    plots=(),
  )


def measure(config: BenchmarkConfig) -> dict[str, Any]:
  """Returns tokens per second, bytes of state and parameters of every row."""
  functions, values = {}, {}
  for name in config.rows:
    experiment = hope.get_config(name)
    shape = (
      config.batch_size or experiment.data.batch_size,
      experiment.data.sequence_length,
    )
    model = models.make_model(experiment.model)
    functions[name] = _make_gradient(model, shape)
    stream = jax.eval_shape(
      lambda p, m=model: m.init_state(p, 1), _shapes(model)
    )
    values[f'{name}_state_bytes'] = sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(stream)
    )
    values[f'{name}_num_parameters'] = parameters.count(model.table)
  seconds = timing.fastest(functions, config.repeats, timing.work_time)
  num_tokens = int(np.prod(shape))
  for name in config.rows:
    values[f'{name}_tokens_per_second'] = num_tokens / seconds[name]
  return values


def _shapes(model):
  return jax.eval_shape(model.init_params, jax.random.key(0))


def _make_gradient(model, shape):
  """Returns a compiled gradient and its arguments."""
  tokens = jax.random.randint(
    jax.random.key(0), shape, 0, model.config.vocab_size
  )

  def loss(params, tokens):
    logits, _ = model.forward(params, None, tokens)
    targets = jnp.roll(tokens, -1, axis=1)
    return jnp.mean(evaluation.cross_entropy(logits, targets))

  params = jax.jit(model.init_params)(jax.random.key(1))
  return jax.jit(jax.grad(loss)), params, tokens
