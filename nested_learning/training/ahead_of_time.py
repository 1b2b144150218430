"""Compiles an experiment for a pod that is not there, and says what comes out.

What is compiled is what `trainer` would run, by the compiler that would compile
it there: how much memory it takes is its answer. Times are estimates from
operation counts, `compilation.ASSUMPTIONS`.
"""

import json
import pathlib
import time
from typing import Any

import jax

from nested_learning import compilation
from nested_learning import costs
from nested_learning import errors
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.training import compiled_tables
from nested_learning.training import config as config_lib
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import step as step_lib
from nested_learning.training import subjects
from nested_learning.training import suggestions

_SUMMARY = 'summary.json'
_TABLE = 'compiled.md'


def run(
  config: config_lib.ExperimentConfig,
  pod: compilation.Pod,
  workdir: pathlib.Path,
  *,
  suggest: bool = False,
) -> dict[str, Any]:
  """Compiles the training step and the decoding step, prints and writes.

  Args:
    config: The experiment.
    pod: What to compile for.
    workdir: Gets summary.json and compiled.md.
    suggest: Look for a mesh and a number of micro-batches that fit, instead of
      those of the config.

  Returns:
    The summary.

  Raises:
    errors.UserError: Something the user can mend is wrong, or nothing fits.
  """
  # Devices of this machine are not needed, and may be in use.
  jax.config.update('jax_platforms', 'cpu')
  if (workdir / 'config.json').exists():
    raise errors.UserError(
      f'--workdir={workdir} holds a run, whose summary.json this would '
      'replace; use another --workdir.'
    )
  devices = compilation.find_devices(*pod)
  tried = None
  if suggest:
    config, tried = suggestions.find(config, pod, devices)
  summary = compile_for(config, pod, devices)
  if tried is not None:
    summary['tried'] = tried
  text = compiled_tables.describe(config, summary)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / _TABLE).write_text(text + '\n', encoding='utf-8')
    (workdir / _SUMMARY).write_text(
      json.dumps(summary, indent=2) + '\n', encoding='utf-8'
    )
  except OSError as error:
    raise errors.UserError(
      f'Cannot write to --workdir={workdir}: {error.strerror}.'
    ) from error
  print(text)
  return summary


def compile_for(
  config: config_lib.ExperimentConfig, pod: compilation.Pod, devices: list[Any]
) -> dict[str, Any]:
  """Compiles an experiment for a pod.

  Args:
    config: The experiment.
    pod: What the devices are.
    devices: From `compilation.find_devices`.

  Returns:
    What is in summary.json: of the training step, and under 'decode' of the
    step that reads one token per row.

  Raises:
    errors.UserError: The mesh does not fit the devices, the heads or the batch.
  """
  mesh = sharding.make_mesh(
    config.mesh, num_rows=config.micro_batch_size, devices=devices
  )
  if mesh.size < len(devices):
    raise errors.UserError(
      f'--topology={pod}: {config.micro_batch_size} rows (data.batch_size over '
      f'train.accumulate) divide over {mesh.size} of {len(devices)} devices, '
      'and the others would be idle; raise mesh.model or data.batch_size, or '
      'choose a smaller slice.'
    )
  computed = subjects.make_computed(config)
  optimizer = optimizer_lib.make_optimizer(config, computed.model.table)
  state = step_lib.abstract_state(config, computed.model, optimizer, mesh)
  traced = step_lib.trace_step(
    config,
    computed.model,
    optimizer,
    mesh,
    row=computed.row,
    token_loss=computed.token_loss,
  )
  model_flops = 3 * _forward_flops(config, computed)  # forward and backward
  return {
    'name': config.name,
    'topology': str(pod),
    'num_devices': len(devices),
    'mesh': dict(mesh.shape),
    'accumulate': config.train.accumulate,
    'parameters': parameters.count(computed.model.table),
    'batch_tokens': config.batch_tokens,
    'hbm_bytes': int(pod.hbm_bytes),
    **_compile(traced, pod, mesh, model_flops, config.batch_tokens),
    'decode': _compile(
      _trace_decode(config, computed.model, state.params, mesh),
      pod,
      mesh,
      _decode_flops(config, computed.model, state.params),
      config.micro_batch_size,
    ),
    'assumptions': list(compilation.ASSUMPTIONS),
  }


def _compile(
  traced: Any,
  pod: compilation.Pod,
  mesh: Any,
  model_flops: int,
  num_tokens: int,
) -> dict[str, Any]:
  """Numbers of one program."""
  start, start_cpu = time.perf_counter(), time.process_time()
  compiled, too_much = compilation.compile(traced)
  numbers = {
    'flops': costs.jaxpr_flops(traced.jaxpr),
    'model_flops': model_flops,
    'compile_seconds': time.perf_counter() - start,
    'compile_cpu_seconds': time.process_time() - start_cpu,
  }
  if compiled is None:
    return {'fits': False, 'compiler': too_much, **numbers}
  analysis = compilation.analyze(compiled.as_text(), mesh.shape)
  seconds = compilation.estimate_seconds(
    analysis, pod.chip, num_per_node=pod.num_per_node
  )
  peak = pod.chip.flops / pod.chip.devices_per_chip * mesh.size
  sent = analysis.sent_bytes
  memory = _memory(compiled)
  return {
    'fits': memory['peak_bytes'] <= pod.hbm_bytes,
    **memory,
    **numbers,
    'flops_per_device': analysis.total_flops,
    # Above 1, devices do the same work twice.
    'flops_ratio': analysis.total_flops * mesh.size / max(numbers['flops'], 1),
    'flops_in_memories': analysis.memory_flops / max(analysis.total_flops, 1),
    'memory_traffic_bytes': analysis.memory_bytes,
    'traffic_in_memories': analysis.traffic_share,
    'results_in_memories': analysis.result_share,
    'collective_bytes': sum(sent.values()),
    'collective_share': sum(sent.values())
    / max(sum(sent.values()) + analysis.memory_bytes, 1.0),
    **{
      f'collective_bytes_{kind.replace("-", "_")}_{axes}': num_bytes
      for (kind, axes), num_bytes in sent.items()
    },
    'collectives_in_memory_scans': len(analysis.in_memory_loops),
    **seconds,
    'tokens_per_second_per_device': num_tokens
    / seconds['step_seconds']
    / mesh.size,
    'mfu_estimate': model_flops / (seconds['step_seconds'] * peak),
    'mfu_bound': model_flops / (seconds['step_seconds_overlapped'] * peak),
  }


def _memory(compiled: Any) -> dict[str, int]:
  """Bytes on one device, by the compiler."""
  stats = compiled.memory_analysis()
  arguments, temporaries = (
    stats.argument_size_in_bytes,
    stats.temp_size_in_bytes,
  )
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  code = stats.generated_code_size_in_bytes
  return {
    'argument_bytes': arguments,
    'output_bytes': outputs,  # beside those that take an argument's place
    'temporary_bytes': temporaries,
    'code_bytes': code,
    'peak_bytes': arguments + outputs + temporaries + code,
  }


def _forward_flops(config, computed) -> int:
  """FLOPs of the forward pass of a step's tokens, by operation count."""
  model = computed.model
  params = parameters.abstract(model.table)
  shape, dtype = computed.row['tokens']
  rows = config.micro_batch_size
  tokens = jax.ShapeDtypeStruct((rows, *shape), dtype)
  reset = jax.ShapeDtypeStruct((rows, *computed.row['reset'][0]), bool)
  flops = costs.matmul_flops(
    lambda params, tokens, reset: model.forward(
      params, None, tokens, reset=reset
    ),
    params,
    tokens,
    reset,
  )
  return config.train.accumulate * flops


def _decode_arguments(config, model, params, mesh):
  rows = config.micro_batch_size
  streams = step_lib.abstract_stream(model, params, rows, mesh)
  tokens = jax.ShapeDtypeStruct(
    (rows, 1), 'int32', sharding=sharding.batch_sharding(mesh)
  )
  return params, streams, tokens


def _decode_flops(config, model, params) -> int:
  sizes = (1,) * len(sharding.AXES)
  one = jax.sharding.AbstractMesh(sizes, sharding.AXES)
  return costs.matmul_flops(
    model.decode,
    *_decode_arguments(config, model, params, one),
  )


def _trace_decode(config, model, params, mesh) -> Any:
  """One token of each row of a micro-batch, its state in place."""
  arguments = _decode_arguments(config, model, params, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, arguments)
  decode = jax.jit(
    model.decode,
    in_shardings=shardings,
    out_shardings=(None, shardings[1]),
    donate_argnums=1,
  )
  with jax.set_mesh(mesh):
    return decode.trace(*arguments)
