"""What one chip can do: the numbers a roofline is drawn with.

Peaks are what vendors publish for dense bfloat16, per chip or GPU. A program
that reaches them does not exist, so that every time computed from them is a
bound.
"""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip, as the estimates see it.

  Attributes:
    kind: 'tpu' or 'gpu'.
    flops: bfloat16 FLOP/s of its matrix units.
    hbm_bytes: Memory.
    hbm_bandwidth: Of the memory, bytes/s.
    link_bandwidth: Bytes/s that leave a chip along one axis of the torus, both
      directions together; for GPUs, through the switch of a node.
    network_bandwidth: Bytes/s that leave a chip for another slice or node.
    devices_per_chip: How many devices JAX sees.
    float32_passes: How often the matrix units run for a product of float32, by
      precision.
  """

  kind: str
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  devices_per_chip: int = 1
  float32_passes: Mapping[str, int] = dataclasses.field(
    # On TPUs float32 is a sum of bfloat16s.
    default_factory=lambda: {'default': 1, 'high': 3, 'highest': 6}
  )


# On GPUs: TF32 at half the speed of bfloat16, or true float32 at a fifteenth.
_GPU_PASSES = {'default': 2, 'high': 2, 'highest': 15}

CHIPS: Mapping[str, Chip] = {
  'v4': Chip('tpu', 275e12, 32 * 2**30, 1228e9, 90e9, 6e9),
  'v5e': Chip('tpu', 197e12, 16 * 2**30, 819e9, 90e9, 3e9),
  'v5p': Chip('tpu', 459e12, 95 * 2**30, 2765e9, 180e9, 6e9),
  'v6e': Chip('tpu', 918e12, 32 * 2**30, 1640e9, 180e9, 12e9),
  'tpu7x': Chip('tpu', 2307e12, 192 * 2**30, 7380e9, 200e9, 12e9, 2),
  'a100': Chip(
    'gpu', 312e12, 80e9, 2039e9, 300e9, 25e9, float32_passes=_GPU_PASSES
  ),
  'h100': Chip(
    'gpu', 989e12, 80e9, 3350e9, 450e9, 50e9, float32_passes=_GPU_PASSES
  ),
  'h200': Chip(
    'gpu', 989e12, 141e9, 4800e9, 450e9, 50e9, float32_passes=_GPU_PASSES
  ),
  'b200': Chip(
    'gpu', 2250e12, 180e9, 7700e9, 900e9, 50e9, float32_passes=_GPU_PASSES
  ),
}
