"""Which hardware a program is compiled for, and the compiler's answer."""

from typing import Any, NamedTuple

import jax

from nested_learning.compilation import hardware
from nested_learning.compilation import topologies


class Pod(NamedTuple):
  """Hardware to compile for.

  Attributes:
    generation: A name in `CHIPS`.
    shape: Of a slice, in chips; for GPUs nodes x GPUs per node.
    num_slices: Slices joined by a slower network.
  """

  generation: str
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def chip(self) -> hardware.Chip:
    """What its chips can do."""
    return hardware.CHIPS[self.generation]

  @property
  def hbm_bytes(self) -> float:
    """Memory of one device."""
    return self.chip.hbm_bytes / self.chip.devices_per_chip

  @property
  def num_per_node(self) -> int | None:
    """Devices that links join; None where they join a whole slice."""
    return self.shape[1] if self.chip.kind == 'gpu' else None

  def __str__(self) -> str:
    slices = f'*{self.num_slices}' if self.num_slices > 1 else ''
    return f'{self.generation}:{"x".join(map(str, self.shape))}{slices}'


def compile(traced: Any) -> tuple[Any, str | None]:
  """Compiles a program for the devices of its shardings.

  Args:
    traced: From `jax.jit(...).trace(...)`.

  Returns:
    The executable and None; or None and what the compiler says of how much
    memory it would have needed.
  """
  try:
    return traced.lower().compile(), None
  except jax.errors.JaxRuntimeError as error:
    needed = topologies.out_of_memory(error)
    if needed is None:
      raise
    return None, needed
