"""Cost of training parts of a pretrained model: ratios of one run.

Command:
  python launch/run.py --config=experiments/benchmarks/adapters.py \
    --workdir=runs/adapters

Hardware: one CPU core or more; about ten minutes.
Result: experiments/results/benchmarks/README.md, once it was run.

summary.json has, for each part that is trained alone,
  NAME: tokens per second of a training step over those of the model that reads
    the same tokens and computes their loss;
  bound_NAME: the same ratio by matmul operations alone.
The parts are the MLPs of the last quarter of the layers, memories in two layers
there, low-rank changes of all attention, and everything.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from experiments import report_files
from experiments.benchmarks import timing
from experiments.pretrained import streams
from nested_learning import compilation
from nested_learning import configs
from nested_learning import errors
from nested_learning import sharding
from nested_learning import training
from nested_learning.training import make_workload
from nested_learning.training import pretrained_runs

# Changes of a config, for each part that is trained alone.
VARIANTS = {
  'levels': (
    'model.levels=fast,slow',
    'model.placement.levels=last_quarter',
    'train.trainable=blocks/*/levels/fast/*',
  ),
  'memory': ('train.trainable=memory',),
  'lora': ('train.trainable=lora',),
  'all': (),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """The model and its rows."""

  source: str = 'smollm2'  # see `pretrained.open_source`
  variants: tuple[str, ...] = tuple(VARIANTS)
  num_tokens: int = 512  # of the row of a batch
  memory_layers: tuple[int, ...] = (24, 28)
  memory_heads: int = 4
  memory_dim: int = 64  # of a head
  repeats: int = 3  # timed calls, of which the fastest counts; 0 counts alone

  def __post_init__(self):
    unknown = sorted(set(self.variants) - set(VARIANTS))
    rule = f'among {", ".join(VARIANTS)}'
    errors.check_field(self, 'variants', not unknown, rule)


def get_config(arg: str | None = None) -> BenchmarkConfig:
  """Returns the benchmark; 'bound' counts operations and times nothing."""
  if arg not in (None, 'bound'):
    raise errors.UserError(f"{arg!r} must be 'bound', or nothing.")
  return BenchmarkConfig(repeats=0 if arg == 'bound' else 3)


def run(config: BenchmarkConfig, workdir: str, mode: str) -> None:
  """Measures all parts and writes the ratios."""
  report_files.check_mode(mode)
  base = pathlib.Path(workdir, 'base')
  if not (base / 'config.json').exists():
    pretrained_runs.import_run(config.source, base)
  summary = {}
  for name in config.variants:
    summary |= _measure(config, configs.load(str(base / 'config.json')), name)
  report_files.write_numbers(
    workdir,
    config,
    module=__name__,
    summary=summary,
    title=['# Training of parts'],
  )


def make_training(
  config: BenchmarkConfig, base: training.ExperimentConfig, name: str
) -> training.ExperimentConfig:
  """Returns the training of one part."""
  changes = [
    *VARIANTS[name],
    f'data.sequence_length={config.num_tokens}',
    'data.batch_size=1',
  ]
  if name == 'memory':
    changes += streams.place_memories(config)
  return configs.override(base, changes)


def _measure(config, base, name) -> dict[str, float]:
  """Measures a step, and the model at rest, which reads the same row."""
  made = make_training(config, base, name)
  mesh = sharding.make_mesh(made.mesh, num_rows=1, devices=jax.devices()[:1])
  spec = make_workload.make_step_spec(made)
  optimizer = training.make_optimizer(made, spec.model.table)
  traced = training.trace_step(made, spec, optimizer, mesh)
  batch = _batch(made)

  def read(params, batch):
    logits, _ = spec.model.forward(
      params, None, batch['tokens'], reset=batch['reset']
    )
    return spec.token_loss(logits, batch['targets']).mean()

  state = training.abstract_state(made, spec.model, optimizer, mesh)
  params = jax.eval_shape(lambda state: state.all_params, state)
  reading = compilation.matmul_flops(read, params, batch)
  step = compilation.jaxpr_flops(traced.jaxpr)
  found = {f'bound_{name}': reading / step}
  if config.repeats:
    with jax.set_mesh(mesh):
      loaded = pretrained_runs.load_base(made, spec.model.table, mesh)
      init = training.make_init(made, spec.model, optimizer)
      state = jax.jit(init)(jax.random.key(0), loaded)
      functions = {
        'read': (jax.jit(read), state.all_params, batch),
        'step': (
          jax.jit(
            training.make_step(made, spec.model, optimizer, spec.token_loss)
          ),
          state,
          batch,
        ),
      }
      seconds = timing.fastest(functions, config.repeats, timing.work_time)
    found[name] = seconds['read'] / seconds['step']
    found |= {
      f'tokens_per_cpu_second_{name}_{part}': config.num_tokens / value
      for part, value in seconds.items()
    }
  return found


def _batch(config) -> dict[str, np.ndarray]:
  shape = 1, config.data.sequence_length
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, config.model.vocab_size, size=(2, *shape))
  tokens, targets = tokens.astype(np.int32)
  return {
    'tokens': tokens,
    'targets': targets,
    'mask': np.ones(shape, bool),
    'reset': np.arange(shape[1])[None] == 0,
  }
