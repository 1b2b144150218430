"""XLA's flags for each generation of hardware, each with its reason.

None was measured here: they are switches for overlap that XLA leaves off, in
wide use for models sharded like these. Tests check their names against the
compilers. `--env=LIBTPU_INIT_ARGS=...` or `--env=XLA_FLAGS=...` adds to them
and, coming last, wins.
"""

from launch.targets import accelerators

_TPUS = ('v4', 'v5e', 'v5p', 'v6e', 'tpu7x')
_GPUS = ('a100', 'h100', 'h200', 'b200')

# Flag, generations, whether it needs several slices, reason.
TABLE = (
  (
    '--xla_tpu_enable_async_collective_fusion=true',
    _TPUS,
    False,
    'collectives run beside the matmuls that do not need them',
  ),
  (
    '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
    _TPUS,
    False,
    'the same for the all-gathers of parameters that are sharded',
  ),
  (
    '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
    _TPUS,
    False,
    'one collective may hide behind several operations, not one alone',
  ),
  (
    '--xla_tpu_overlap_compute_collective_tc=true',
    _TPUS,
    False,
    'lets the core that waits for a collective compute',
  ),
  (
    '--xla_tpu_scoped_vmem_limit_kib=98304',
    ('v6e',),
    False,
    'v6e has 128 MiB of VMEM; larger tiles read HBM less often',
  ),
  (
    '--xla_tpu_enable_data_parallel_all_reduce_opt=true',
    _TPUS,
    True,
    'gradients cross the slow network while the backward pass goes on',
  ),
  (
    '--xla_tpu_data_parallel_opt_different_sized_ops=true',
    _TPUS,
    True,
    'the same where the gradients differ in size',
  ),
  (
    '--xla_gpu_enable_latency_hiding_scheduler=true',
    _GPUS,
    False,
    'orders operations so that collectives run beside computation',
  ),
)


def environment(topology: accelerators.Topology) -> dict[str, str]:
  """The environment variable with the flags for a topology."""
  name = topology.generation.name
  variable = (
    'LIBTPU_INIT_ARGS' if topology.generation.kind == 'tpu' else 'XLA_FLAGS'
  )
  flags = [
    flag
    for flag, generations, across_slices, _ in TABLE
    if name in generations and (topology.num_slices > 1 or not across_slices)
  ]
  return {variable: ' '.join(flags)}
