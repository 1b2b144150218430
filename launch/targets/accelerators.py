"""Slices and nodes that exist, and what the clouds call them."""

from collections.abc import Iterator
import dataclasses
import difflib
import itertools
import math
import re

from nested_learning import errors


@dataclasses.dataclass(frozen=True)
class Generation:
  """One kind of accelerator.

  Attributes:
    name: As in --topology.
    kind: 'tpu' or 'gpu'.
    shapes: Shapes of all slices that can be had, in chips; for GPUs, of nodes x
      GPUs per node, where None stands for any number.
    chips_per_host: On slices of more than one host.
    devices_per_chip: How many devices JAX sees.
    gke_accelerator: Node label cloud.google.com/gke-tpu-accelerator.
    machine: GKE machine type, without the number of chips.
    tpu_vm: Prefix of the accelerator type of the TPU API; None if that cannot
      make one.
    cores_per_chip: What the number after this prefix counts, per chip.
    runtime: Software version of the TPU API.
  """

  name: str
  kind: str
  shapes: tuple[tuple[int | None, ...], ...]
  chips_per_host: int
  devices_per_chip: int = 1
  gke_accelerator: str = ''
  machine: str = ''
  tpu_vm: str | None = None
  cores_per_chip: int = 1
  runtime: str = ''


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice, or several joined by the data centre's network."""

  generation: Generation
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def chips_per_slice(self) -> int:
    """Chips, or GPUs."""
    return math.prod(self.shape)

  @property
  def chips_per_host(self) -> int:
    """Chips of one machine."""
    return min(self.generation.chips_per_host, self.chips_per_slice)

  @property
  def hosts_per_slice(self) -> int:
    """Machines of one slice."""
    return self.chips_per_slice // self.chips_per_host

  @property
  def num_hosts(self) -> int:
    """Machines of all slices."""
    return self.hosts_per_slice * self.num_slices

  @property
  def num_devices(self) -> int:
    """Devices that JAX sees, of all slices."""
    per_slice = self.chips_per_slice * self.generation.devices_per_chip
    return per_slice * self.num_slices

  @property
  def num_processes(self) -> int:
    """Processes: one per machine with TPUs, one per GPU."""
    return self.num_devices if self.generation.kind == 'gpu' else self.num_hosts

  def __str__(self) -> str:
    shape = 'x'.join(map(str, self.shape))
    slices = f'*{self.num_slices}' if self.num_slices > 1 else ''
    return f'{self.generation.name}:{shape}{slices}'


def _cubes(num_chips: int) -> tuple[tuple[int, ...], ...]:
  """Slices of a torus: a few small ones, then cubes of 4x4x4 side by side."""
  sides = range(4, num_chips // 16 + 1, 4)
  large = (
    (a, b, c)
    for a, b in itertools.combinations_with_replacement(sides, 2)
    if a * b * b <= num_chips
    for c in range(b, num_chips // (a * b) + 1, 4)
  )
  return ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *large)


_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_NODES = tuple((None, n) for n in (1, 2, 4, 8))

GENERATIONS = {
  generation.name: generation
  for generation in (
    Generation(
      'v4',
      'tpu',
      _cubes(3072),
      chips_per_host=4,
      gke_accelerator='tpu-v4-podslice',
      machine='ct4p-hightpu',
      tpu_vm='v4',
      cores_per_chip=2,
      runtime='tpu-ubuntu2204-base',
    ),
    Generation(
      'v5e',
      'tpu',
      _SQUARES,
      chips_per_host=4,
      gke_accelerator='tpu-v5-lite-podslice',
      machine='ct5lp-hightpu',
      tpu_vm='v5litepod',
      runtime='v2-alpha-tpuv5-lite',
    ),
    Generation(
      'v5p',
      'tpu',
      _cubes(8960),
      chips_per_host=4,
      gke_accelerator='tpu-v5p-slice',
      machine='ct5p-hightpu',
      tpu_vm='v5p',
      cores_per_chip=2,
      runtime='v2-alpha-tpuv5',
    ),
    Generation(
      'v6e',
      'tpu',
      _SQUARES,
      chips_per_host=4,
      gke_accelerator='tpu-v6e-slice',
      machine='ct6e-standard',
      tpu_vm='v6e',
      runtime='v2-alpha-tpuv6e',
    ),
    Generation(
      'tpu7x',
      'tpu',
      ((1, 1, 1), *_cubes(9216)),
      chips_per_host=4,
      devices_per_chip=2,
      gke_accelerator='tpu7x',
      machine='tpu7x-standard',
    ),
    Generation('a100', 'gpu', _NODES, chips_per_host=8),
    Generation('h100', 'gpu', _NODES, chips_per_host=8),
    Generation('h200', 'gpu', _NODES, chips_per_host=8),
    Generation('b200', 'gpu', _NODES, chips_per_host=8),
  )
}


def find(spec: str) -> Topology:
  """Reads --topology.

  Args:
    spec: Such as 'v5e:16x16', 'v5p:4x8x8*2' (two slices) or 'h100:4x8' (four
      nodes of eight GPUs).

  Returns:
    The topology.

  Raises:
    errors.UserError: There is no such slice; the nearest is named.
  """
  name, _, rest = spec.partition(':')
  generation = GENERATIONS.get(name)
  match = re.fullmatch(r'(\d+(?:x\d+)*)(?:\*(\d+))?', rest)
  if generation is None or not match:
    raise errors.UserError(
      f'--topology={spec} is not GENERATION:SHAPE; the nearest is '
      f'{_nearest(spec)}. Generations are {", ".join(GENERATIONS)}.'
    )
  shape = tuple(map(int, match[1].split('x')))
  num_slices = int(match[2] or 1)
  if not num_slices or not any(
    len(legal) == len(shape)
    and 0 not in shape
    and all(a in (None, b) for a, b in zip(legal, shape, strict=True))
    for legal in generation.shapes
  ):
    raise errors.UserError(
      f'--topology={spec}: there is no such slice; the nearest is '
      f'{_nearest(spec)}.'
    )
  if generation.kind == 'gpu':
    nodes, per_node = shape
    generation = dataclasses.replace(generation, chips_per_host=per_node)
    shape = (nodes * num_slices, per_node)
    num_slices = 1  # nodes are all alike
  return Topology(generation, shape, num_slices)


def _nearest(spec: str) -> str:
  """The topology that was probably meant: by name, number of chips, shape."""
  letters = re.split(r'[:-]', spec.lower())[0]
  name = difflib.get_close_matches(letters, GENERATIONS, n=1, cutoff=0)[0]
  generation = GENERATIONS[name]
  rest = spec[len(letters) :].partition('*')[0]
  shape = list(map(int, re.findall(r'\d+', rest))) or [4]
  chips = math.prod(shape)
  if '-' in spec:  # as in v5p-128, which counts cores
    chips = shape[0] // generation.cores_per_chip

  def distance(legal):
    sides = itertools.zip_longest(legal, shape, fillvalue=1)
    return abs(math.prod(legal) - chips), sum(abs(a - b) for a, b in sides)

  return str(Topology(generation, min(_concrete(generation), key=distance)))


def _concrete(generation: Generation) -> Iterator[tuple[int, ...]]:
  for shape in generation.shapes:
    if None in shape:
      yield from ((nodes, shape[1]) for nodes in (1, 2, 4, 8, 16, 32, 64, 128))
    else:
      yield shape
