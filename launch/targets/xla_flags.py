"""XLA flags for each generation of hardware, each with its reason.

They switch on overlap that XLA leaves off by default, and are in wide use for
models sharded like these. They were not measured here. Tests check their names
against the compilers. `--env=LIBTPU_INIT_ARGS=...` or `--env=XLA_FLAGS=...`
adds flags after these, and the last one wins.
"""

from nested_learning import accelerators

_TPUS = ('v4', 'v5e', 'v5p', 'v6e', 'tpu7x')
_GPUS = ('a100', 'h100', 'h200', 'b200')

# Flag, generations, whether it is for several slices only, reason.
TABLE = (
  (
    '--xla_tpu_enable_async_collective_fusion=true',
    _TPUS,
    False,
    'runs collectives beside matmuls that do not need them',
  ),
  (
    '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
    _TPUS,
    False,
    'the same for all-gathers of sharded parameters',
  ),
  (
    '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
    _TPUS,
    False,
    'hides one collective behind several operations',
  ),
  (
    '--xla_tpu_overlap_compute_collective_tc=true',
    _TPUS,
    False,
    'lets a core compute while it waits for a collective',
  ),
  (
    '--xla_tpu_scoped_vmem_limit_kib=98304',
    ('v6e',),
    False,
    'v6e has 128 MiB of VMEM, and larger tiles read HBM less often',
  ),
  (
    '--xla_tpu_enable_data_parallel_all_reduce_opt=true',
    _TPUS,
    True,
    'sends gradients over the slow network during the backward pass',
  ),
  (
    '--xla_tpu_data_parallel_opt_different_sized_ops=true',
    _TPUS,
    True,
    'the same for gradients of different sizes',
  ),
  (
    '--xla_gpu_enable_latency_hiding_scheduler=true',
    _GPUS,
    False,
    'orders operations so that collectives overlap with computation',
  ),
)


def environment(topology: accelerators.Topology) -> dict[str, str]:
  """Returns the environment variable with the flags for a topology."""
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
