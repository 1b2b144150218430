"""Computes what a compiled program costs a device, and its least time."""

import collections
from collections.abc import Mapping
import math
import re
from typing import NamedTuple

from nested_learning import accelerators
from nested_learning.compilation import collectives as collectives_lib
from nested_learning.compilation import flops as flops_lib
from nested_learning.compilation import hlo
from nested_learning.compilation import memory_traffic

ASSUMPTIONS = (
  'matrix units run at their published peak, with as many passes for float32 '
  'as the precision needs',
  'every instruction reads its operands and writes its result once, at the '
  'published bandwidth of the memory; of a slice, only the slice',
  'a collective uses the ring algorithm along one axis of the torus, in both '
  'directions, or the switch of a node',
  'computation and memory traffic overlap, collectives overlap with nothing; '
  'step_seconds_overlapped lets them overlap with everything',
  'latency is zero',
)


class Analysis(NamedTuple):
  """Costs of one run of a program on one device.

  "Memories" are the layers' associative memories, whose operations run in the
  scope `memory`; the device's memory is HBM.

  Attributes:
    flops: FLOPs of matmuls, by precision: 'native', 'default', 'high' or
      'highest'.
    memory_flops: FLOPs inside memories, of any precision.
    memory_bytes: Bytes read from and written to HBM.
    padded_bytes: The same with arrays in whole tiles, as they lie in HBM.
    traffic_share: Share of memory_bytes that memories' instructions move.
    result_share: Share of memories in the bytes of all results, each counted
      once.
    cycles: The compiler's own estimate of its time, in cycles; 0 where the
      compiler gives none.
    memory_cycles: Cycles of them in memories' instructions.
    collectives: The collectives, as they run.
  """

  flops: Mapping[str, int]
  memory_flops: int
  memory_bytes: float
  padded_bytes: float
  traffic_share: float
  result_share: float
  cycles: int
  memory_cycles: int
  collectives: tuple[collectives_lib.Collective, ...]

  @property
  def total_flops(self) -> int:
    """Sum over all precisions."""
    return sum(self.flops.values())

  @property
  def sent_bytes(self) -> dict[tuple[str, str], float]:
    """Bytes that a device sends, by (kind, axes), largest first."""
    sent = collections.Counter()
    for collective in self.collectives:
      axes = '_'.join(collective.axes) or 'none'
      sent[collective.kind, axes] += collective.num_bytes * collective.times
    return dict(sent.most_common())

  @property
  def in_memory_loops(self) -> list[collectives_lib.Collective]:
    """Collectives inside the scan over a memory's chunks; should be empty."""
    return [
      collective
      for collective in self.collectives
      if any(is_of_memory(loop) for loop in collective.loops)
    ]


def is_of_memory(op_name: str) -> bool:
  """Returns whether an operation runs in the scope `memory`.

  The mixers open it with `jax.named_scope`. Transformations wrap a scope's
  name, as in 'jit(f)/transpose(jvp(memory))/dot_general'. Functions of this
  name, and scopes that merely contain the word, do not count.

  Args:
    op_name: The `op_name` of an instruction.
  """
  *scopes, _ = re.sub(r'\bp?jit\([^()]*\)', '', op_name).split('/')
  return any('memory' in re.split(r'[()]', scope) for scope in scopes)


def analyze(text: str, mesh_shape: Mapping[str, int]) -> Analysis:
  """Computes the costs of a program from its text.

  Args:
    text: The result of `compiled.as_text()`.
    mesh_shape: Sizes of the mesh axes by name, in the mesh's own order.

  Returns:
    The costs of one run on one device.
  """
  program = hlo.parse(text)
  flops, memory_flops = collections.Counter(), 0
  cycles = collections.Counter()
  for executed in hlo.walk(program):
    instruction = executed.instruction
    if not executed.is_fused:
      estimated = executed.times * hlo.estimated_cycles(instruction)
      cycles['all'] += estimated
      cycles['memory'] += estimated * is_of_memory(instruction.op_name)
    if instruction.opcode not in ('dot', 'convolution', 'custom-call'):
      continue
    computation = program.computations[executed.computation]
    operands = [
      computation[name].shapes[0]
      for name in instruction.operands
      if name in computation and computation[name].shapes
    ]
    found = executed.times * flops_lib.instruction_flops(instruction, operands)
    if found:
      flops[flops_lib.precision(instruction, operands)] += found
      memory_flops += found * is_of_memory(instruction.op_name)
  in_memory = lambda instruction: is_of_memory(instruction.op_name)
  # The floor keeps the share of an empty program at 0.
  share = lambda count: count(program, in_memory) / max(count(program), 1.0)
  return Analysis(
    dict(flops),
    memory_flops,
    memory_traffic.num_bytes(program),
    memory_traffic.num_bytes(program, padded=True),
    share(memory_traffic.num_bytes),
    share(memory_traffic.result_bytes),
    cycles['all'],
    cycles['memory'],
    tuple(collectives_lib.find(program, mesh_shape)),
  )


def estimate_seconds(
  analysis: Analysis, topology: accelerators.Topology
) -> dict[str, float]:
  """Estimates how long one run takes at least, under `ASSUMPTIONS`.

  'compiler_seconds' is no bound: it is the compiler's own estimate, of which
  waiting for other devices is no part.

  Args:
    analysis: The costs.
    topology: The hardware. Devices of one chip share it evenly.

  Returns:
    Seconds by cause, and of the step.
  """
  chip = topology.generation.chip
  share = 1 / topology.generation.devices_per_chip
  # Products below float32 take one pass.
  passes = {'native': 1, **chip.float32_passes}
  matmul = sum(n * passes[kind] for kind, n in analysis.flops.items())
  linked = networked = 0.0
  for collective in analysis.collectives:
    size = collective.num_bytes * collective.times
    linked_devices = topology.linked_devices or math.inf
    if collective.kind == 'send' or collective.spans > linked_devices:
      networked += size
    else:
      linked += size
  seconds = {
    'matmul_seconds': matmul / (chip.flops * share),
    'hbm_seconds': analysis.memory_bytes / (chip.hbm_bandwidth * share),
    'link_seconds': linked / (chip.link_bandwidth * share),
    'network_seconds': networked / (chip.network_bandwidth * share),
  }
  on_chip = max(seconds['matmul_seconds'], seconds['hbm_seconds'])
  link, network = seconds['link_seconds'], seconds['network_seconds']
  # Beside the roofline: with arrays in whole tiles, and as the compiler says.
  seconds['hbm_seconds_padded'] = analysis.padded_bytes / (
    chip.hbm_bandwidth * share
  )
  if chip.clock and analysis.cycles:
    seconds['compiler_seconds'] = analysis.cycles / chip.clock
  seconds['step_seconds'] = on_chip + link + network
  seconds['step_seconds_overlapped'] = max(on_chip, link, network)
  return seconds
