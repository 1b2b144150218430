"""Training on one NVIDIA GPU: Hope, Transformer++ and Gated DeltaNet.

Command:
  python launch/run.py --config=experiments/benchmarks/gpu.py \
    --workdir=runs/gpu

Hardware: one NVIDIA GPU with 80 GB, and pip install '.[cuda]'. `:small` takes a
step of tiny models on any device, in a few minutes.
Results: not measured yet, see experiments/results/benchmarks/README.md.

Models have the sizes of experiments/hope.py, compute in bfloat16 and recompute
blocks. In 'hope' levels learn inside rows, in 'hope_levels_off' they do not.
For each, summary.json has `<model>/tokens_per_second`, its ratio to
Transformer++'s as `<model>/over_transformer`, `<model>/mfu` (as in training),
`<model>/counted_bytes` (of memory traffic, from the compiled program) and
`<model>/bandwidth_share`: that count over the time of a step, as a share of the
GPU's bandwidth. Above 1 the count is too high; far below 1, something else than
bandwidth is the limit. Models that the GPU cannot hold are named in the report.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np
import tqdm

from experiments import report_files
from nested_learning import accelerators
from nested_learning import compilation
from nested_learning import data
from nested_learning import errors
from nested_learning import levels
from nested_learning import models
from nested_learning import sharding
from nested_learning import training
from nested_learning.training import goodput
from nested_learning.training import make_workload

_FAMILIES = ('transformer', 'gated_deltanet', 'hope', 'hope_levels_off')
_NUMBERS = {
  'tokens_per_second': 'tokens/s',
  'over_transformer': "over Transformer++'s",
  'mfu': 'MFU',
  'counted_bytes': 'bytes counted',
  'bandwidth_share': 'of the bandwidth',
  'peak_bytes': 'peak bytes',
}


@dataclasses.dataclass(frozen=True)
class GpuConfig:
  """Models and rows to measure."""

  sizes: tuple[str, ...] = ('170m', '340m', '760m', '1p3b')
  families: tuple[str, ...] = _FAMILIES
  sequence_length: int = 8192  # tokens
  batch_size: int = 4  # rows of a step
  num_steps: int = 5  # timed, of which the fastest counts
  device: Literal['gpu', 'any'] = 'gpu'

  def __post_init__(self):
    errors.check_choices(self)
    for name in ('sequence_length', 'batch_size', 'num_steps'):
      errors.check_field(self, name, getattr(self, name) >= 1, 'at least 1')
    known = set(self.families) <= set(_FAMILIES)
    errors.check_field(
      self, 'families', known, f'some of {", ".join(_FAMILIES)}'
    )
    known = set(self.sizes) <= set(models.zoo.SIZES)
    errors.check_field(
      self, 'sizes', known, f'some of {", ".join(models.zoo.SIZES)}'
    )


def get_config(arg: str | None = None) -> GpuConfig:
  """Returns the benchmark, or a 'small' one for any device."""
  if arg == 'small':
    return GpuConfig(
      sizes=('tiny',),
      sequence_length=64,
      batch_size=1,
      num_steps=1,
      device='any',
    )
  if arg is not None:
    raise errors.UserError(f"{arg!r} must be 'small' or nothing.")
  return GpuConfig()


def run(config: GpuConfig, workdir: str, mode: str) -> None:
  """Measures all models and writes rates and ratios."""
  report_files.check_mode(mode)
  device = _find_device(config)
  found, too_large = {}, []
  names = [f'{f}_{size}' for size in config.sizes for f in config.families]
  for name in tqdm.tqdm(names, desc='gpu'):
    numbers = measure(_experiment(config, name), config.num_steps, device)
    if numbers is None:
      too_large.append(name)
    else:
      found[name] = numbers
  _compare(found)
  summary = {'device': device.device_kind}
  for name, numbers in found.items():
    summary |= {f'{name}/{key}': value for key, value in numbers.items()}
  sections = [
    '# Training on one device',
    f'{device.device_kind}; {config.batch_size} rows of '
    f'{config.sequence_length} tokens, bfloat16; the fastest of '
    f'{config.num_steps} steps.',
    report_files.table(
      ('', *_NUMBERS.values()),
      [
        (name, *(numbers.get(key, '') for key in _NUMBERS))
        for name, numbers in found.items()
      ],
    ),
  ]
  if too_large:
    sections.append(f'Larger than the memory: {", ".join(too_large)}.')
  report_files.write(
    workdir,
    config,
    module=__name__,
    summary=summary,
    metrics=[{'name': name, **numbers} for name, numbers in found.items()],
    sections=sections,
  )
  print('\n\n'.join(sections[1:]))


def _find_device(config: GpuConfig) -> jax.Device:
  device = jax.devices()[0]
  if config.device == 'gpu' and device.platform != 'gpu':
    raise errors.UserError(
      f"device='gpu', but JAX has found no GPU, only {device.device_kind!r}: "
      "pip install '.[cuda]' on a machine with an NVIDIA GPU, or try tiny "
      'models here with --config=experiments/benchmarks/gpu.py:small.'
    )
  return device


def _experiment(config: GpuConfig, name: str) -> training.ExperimentConfig:
  """Returns the experiment of a family and a size."""
  named = name.replace('_levels_off', '')
  inner = models.zoo.make_inner(named)
  return training.ExperimentConfig(
    name=name,
    model=models.zoo.make_config(
      named,
      dtype='bfloat16',
      remat='layer',
      max_length=config.sequence_length,
    ),
    inner=inner if named == name else levels.InnerConfig(),
    data=data.DataConfig(
      source='text',  # not read
      sequence_length=config.sequence_length,
      batch_size=config.batch_size,
    ),
  )


def measure(
  config: training.ExperimentConfig, num_steps: int, device: jax.Device
) -> dict[str, float] | None:
  """Times training steps on random tokens.

  Args:
    config: The experiment; its text is not read.
    num_steps: Timed steps, after one that is not.
    device: Where to take them.

  Returns:
    Numbers by name; None if the device's memory is too small.
  """
  mesh = sharding.make_mesh(
    config.mesh, num_rows=config.micro_batch_size, devices=[device]
  )
  spec = make_workload.make_step_spec(config)
  optimizer = training.make_optimizer(config, spec.model.table)
  traced = training.trace_step(config, spec, optimizer, mesh)
  step, too_large = compilation.compile(traced)
  if too_large:
    return None
  init = training.make_init(config, spec.model, optimizer)
  try:
    with jax.set_mesh(mesh):
      seconds = _time(step, init, _batch(config, mesh), num_steps)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None
  rate = config.batch_tokens / seconds
  chips = goodput.find_chips(config, spec, mesh)
  analysis = compilation.analyze(step.as_text(), mesh.shape)
  numbers = {
    'tokens_per_second': rate,
    'seconds': seconds,
    'model_flops': goodput.model_flops(config, spec.model, spec.row),
    'counted_bytes': analysis.memory_bytes,
    'peak_bytes': (device.memory_stats() or {}).get('peak_bytes_in_use'),
    **chips.numbers(rate),
  }
  kind = accelerators.find_kind(device.device_kind)
  if kind is not None:
    there = seconds * kind.chip.hbm_bandwidth
    numbers['bandwidth_share'] = analysis.memory_bytes / there
  return {k: v for k, v in numbers.items() if v is not None}


def _time(step, init, batch: Any, num_steps: int) -> float:
  """Returns the seconds of the fastest step."""
  state = jax.jit(init)(jax.random.key(0))
  seconds = []
  for _ in range(num_steps + 1):
    begin = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    seconds.append(time.perf_counter() - begin)
  return min(seconds[1:])


def _batch(
  config: training.ExperimentConfig, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Draws a batch of rows with one document each."""
  shape = config.data.batch_size, config.data.sequence_length
  tokens = np.random.default_rng(0).integers(
    config.model.vocab_size, size=shape, dtype=np.int32
  )
  batch = {
    'tokens': tokens,
    'targets': np.roll(tokens, -1, axis=1),
    'mask': np.ones(shape, bool),
    'reset': np.arange(shape[1])[None] == np.zeros((shape[0], 1)),
  }
  return jax.device_put(batch, sharding.batch_sharding(mesh))


def _compare(found: dict[str, dict[str, float]]) -> None:
  """Adds each model's rate over that of Transformer++ of its size."""
  for name, numbers in found.items():
    base = found.get(f'transformer_{name.rpartition("_")[2]}')
    if base is not None:
      ratio = numbers['tokens_per_second'] / base['tokens_per_second']
      numbers['over_transformer'] = ratio
