"""Compiles an experiment ahead of time, for accelerators that are not here.

The program is the one that the trainer would run, and the compiler is that of
the accelerator, so that the memory it reports is what a run needs. Times are
estimates from operation counts, under `compilation.ASSUMPTIONS`.
"""

import json
import pathlib
import time
from typing import Any

import jax

from nested_learning import accelerators
from nested_learning import compilation
from nested_learning import errors
from nested_learning import files
from nested_learning import parameters
from nested_learning import sharding
from nested_learning.planning import suggestions
from nested_learning.planning import tables
from nested_learning.training import config as config_lib
from nested_learning.training import goodput
from nested_learning.training import make_workload
from nested_learning.training import optimizer as optimizer_lib
from nested_learning.training import sharded_step


def run(
  config: config_lib.ExperimentConfig,
  topology: accelerators.Topology,
  workdir: pathlib.Path,
  *,
  suggest: bool = False,
) -> dict[str, Any]:
  """Compiles the training and the decoding step; prints and writes a summary.

  Args:
    config: The experiment.
    topology: The accelerators to compile for.
    workdir: Folder for summary.json and compiled.md.
    suggest: Whether to search for a mesh and a number of micro-batches that
      fit, in place of those of the config.

  Returns:
    The summary.

  Raises:
    errors.UserError: The compiler is not installed, the config does not divide
      over the devices, the folder holds a run or cannot be written, or nothing
      fits.
  """
  # Devices of this machine are not needed, and may be in use.
  jax.config.update('jax_platforms', 'cpu')
  if (workdir / 'config.json').exists():
    raise errors.UserError(
      f'--workdir={workdir} holds a run, whose summary.json this would '
      'replace; use another --workdir.'
    )
  devices = compilation.find_devices(topology)
  tried = None
  if suggest:
    config, tried = suggestions.find(config, topology, devices)
  summary = compile_for(config, topology, devices)
  if tried is not None:
    summary['tried'] = tried
  text = tables.describe(config, summary)
  files.write_whole(workdir / 'compiled.md', text + '\n')
  numbers = json.dumps(summary, indent=2) + '\n'
  files.write_whole(workdir / 'summary.json', numbers)
  print(text)
  return summary


def compile_for(
  config: config_lib.ExperimentConfig,
  topology: accelerators.Topology,
  devices: list[Any],
) -> dict[str, Any]:
  """Compiles an experiment for devices.

  Args:
    config: The experiment.
    topology: The accelerators.
    devices: Their devices, from `compilation.find_devices`.

  Returns:
    The numbers of summary.json: those of the training step, and under 'decode'
    those of the step that reads one token per row.

  Raises:
    errors.UserError: The mesh does not fit the devices, the heads or the batch.
  """
  mesh = sharding.make_mesh(
    config.mesh, num_rows=config.micro_batch_size, devices=devices
  )
  if mesh.size < len(devices):
    raise errors.UserError(
      f'--topology={topology}: {config.micro_batch_size} rows (data.batch_size '
      f'over train.accumulate) divide over {mesh.size} of {len(devices)} '
      'devices, and the others would be idle; raise mesh.model or '
      'data.batch_size, or choose a smaller slice.'
    )
  spec = make_workload.make_step_spec(config)
  optimizer = optimizer_lib.make_optimizer(config, spec.model.table)
  params = sharded_step.abstract_params(config, spec.model, mesh)
  traced = sharded_step.trace_step(config, spec, optimizer, mesh)
  model_flops = goodput.model_flops(config, spec.model, spec.row)
  return {
    'name': config.name,
    'topology': str(topology),
    'num_devices': len(devices),
    'mesh': dict(mesh.shape),
    'accumulate': config.train.accumulate,
    'parameters': parameters.count(spec.model.table),
    'batch_tokens': config.batch_tokens,
    'hbm_bytes': int(topology.hbm_bytes),
    **_compile(traced, topology, mesh, model_flops, config.batch_tokens),
    'decode': _compile(
      _trace_decode(config, spec.model, params, mesh),
      topology,
      mesh,
      _decode_flops(config, spec.model, params),
      config.micro_batch_size,
    ),
    'assumptions': list(compilation.ASSUMPTIONS),
  }


def _compile(
  traced: Any,
  topology: accelerators.Topology,
  mesh: jax.sharding.Mesh,
  model_flops: int,
  num_tokens: int,
) -> dict[str, Any]:
  """Compiles one program and returns its numbers.

  Args:
    traced: The traced program.
    topology: The accelerators.
    mesh: Their mesh.
    model_flops: FLOPs of the model alone, without recomputation.
    num_tokens: Tokens of one run of the program.

  Returns:
    Numbers by name; if it does not fit, only those known without compiling.
  """
  # Compilers use several cores, and machines are shared: report both times.
  start, start_cpu = time.perf_counter(), time.process_time()
  compiled, too_much = compilation.compile(traced)
  numbers = {
    'flops': compilation.jaxpr_flops(traced.jaxpr),
    'model_flops': model_flops,
    'compile_seconds': time.perf_counter() - start,
    'compile_cpu_seconds': time.process_time() - start_cpu,
  }
  if compiled is None:
    return {'fits': False, 'compiler': too_much, **numbers}
  analysis = compilation.analyze(compiled.as_text(), mesh.shape)
  seconds = compilation.estimate_seconds(analysis, topology)
  peak = topology.flops * mesh.size
  sent = analysis.sent_bytes
  memory = _memory(compiled)
  return {
    'fits': memory['peak_bytes'] <= topology.hbm_bytes,
    **memory,
    **numbers,
    'flops_per_device': analysis.total_flops,
    # Above 1, devices do the same work twice.
    'flops_ratio': analysis.total_flops * mesh.size / max(numbers['flops'], 1),
    'flops_in_memories': analysis.memory_flops / max(analysis.total_flops, 1),
    'memory_traffic_bytes': analysis.memory_bytes,
    'memory_traffic_bytes_padded': analysis.padded_bytes,
    'traffic_in_memories': analysis.traffic_share,
    'results_in_memories': analysis.result_share,
    'cycles': analysis.cycles,
    'cycles_in_memories': analysis.memory_cycles / max(analysis.cycles, 1),
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
  """Returns the bytes on one device that the compiler reports."""
  stats = compiled.memory_analysis()
  arguments, temporaries = (
    stats.argument_size_in_bytes,
    stats.temp_size_in_bytes,
  )
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  code = stats.generated_code_size_in_bytes
  return {
    'argument_bytes': arguments,
    'output_bytes': outputs,  # without those that reuse an argument's memory
    'temporary_bytes': temporaries,
    'code_bytes': code,
    'peak_bytes': arguments + outputs + temporaries + code,
  }


def _decode_arguments(config, model, params, mesh):
  rows = config.micro_batch_size
  streams = sharded_step.abstract_stream(model, rows, mesh)
  tokens = jax.ShapeDtypeStruct(
    (rows, 1), 'int32', sharding=sharding.batch_sharding(mesh)
  )
  return params, streams, tokens


def _decode_flops(config, model, params) -> int:
  # On one device, since operation counts do not depend on the mesh.
  sizes = (1,) * len(sharding.AXES)
  one = jax.sharding.AbstractMesh(sizes, sharding.AXES)
  return compilation.matmul_flops(
    model.decode,
    *_decode_arguments(config, model, params, one),
  )


def _trace_decode(config, model, params, mesh) -> Any:
  """Traces the step that reads one token per row and updates the state."""
  arguments = _decode_arguments(config, model, params, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, arguments)
  decode = jax.jit(
    model.decode,
    in_shardings=shardings,
    out_shardings=(None, shardings[1]),
    donate_argnums=1,  # The state is updated in place.
  )
  with jax.set_mesh(mesh):
    return decode.trace(*arguments)
