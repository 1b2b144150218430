"""The table of accelerators: what chips can do, and which slices exist.

Peaks are the published ones for dense bfloat16. No program reaches them, so
every time computed from them is a lower bound. This module imports no JAX.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import difflib
import importlib.util
import itertools
import math
import os
import re

from nested_learning import errors

# Passes of the matrix units for a product of float32, by precision. On TPUs
# float32 is a sum of bfloat16s; on GPUs it is TF32 at half the speed of
# bfloat16, or true float32 at a fifteenth.
_TPU_PASSES = {'default': 1, 'high': 3, 'highest': 6}
_GPU_PASSES = {'default': 2, 'high': 2, 'highest': 15}


@dataclasses.dataclass(frozen=True)
class Chip:
  """Numbers of one chip, or one GPU.

  Attributes:
    flops: Peak bfloat16 FLOP/s of its matrix units.
    hbm_bytes: Size of its memory.
    hbm_bandwidth: Bytes/s of its memory.
    link_bandwidth: Bytes/s that leave a chip along one axis of the torus, both
      directions together; for GPUs, through the switch of a node.
    network_bandwidth: Bytes/s that leave a chip for another slice or node.
    float32_passes: Passes of the matrix units for a product of float32, by
      precision.
    clock: Cycles per second; None where the published peak and the number of
      matrix units do not give it.
  """

  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  float32_passes: Mapping[str, int]
  clock: float | None = None


@dataclasses.dataclass(frozen=True)
class Cloud:
  """Names of an accelerator in Google Cloud.

  Attributes:
    gke_accelerator: Node label cloud.google.com/gke-tpu-accelerator.
    tpu_vm: Prefix of the accelerator type of the TPU API; None if that cannot
      make one.
    cores_per_chip: Cores per chip; the number after the prefix counts cores.
    runtime: Software version of the TPU API.
  """

  gke_accelerator: str
  tpu_vm: str | None = None
  cores_per_chip: int = 1
  runtime: str = ''


@dataclasses.dataclass(frozen=True)
class GpuTarget:
  """Properties of a GPU that XLA needs to compile for it.

  Attributes:
    capability: CUDA compute capability, major and minor.
    num_cores: Number of streaming multiprocessors.
    shared_kib: Largest shared memory of a thread block, KiB.
    clock_mhz: Clock rate.
    cache_mib: Size of the L2 cache, MiB.
  """

  capability: tuple[int, int]
  num_cores: int
  shared_kib: int
  clock_mhz: int
  cache_mib: int


@dataclasses.dataclass(frozen=True)
class Generation:
  """One kind of accelerator.

  Attributes:
    name: As in --topology.
    shapes: Shapes of all slices that exist, in chips; for GPUs nodes x GPUs per
      node, where None stands for any number.
    chip: Numbers of one chip.
    chips_per_host: Chips of a machine, on slices of more than one.
    device_kinds: Names that JAX gives to its devices, `jax.Device.device_kind`;
      cards of the same name with other peaks are left out.
    devices_per_chip: Number of devices that JAX sees.
    cloud: Names in Google Cloud; None for GPUs.
    target: Properties for XLA; None for TPUs, which libtpu knows.
  """

  name: str
  shapes: tuple[tuple[int | None, ...], ...]
  chip: Chip
  chips_per_host: int
  device_kinds: tuple[str, ...] = ()
  devices_per_chip: int = 1
  cloud: Cloud | None = None
  target: GpuTarget | None = None

  @property
  def kind(self) -> str:
    """Either 'tpu' or 'gpu'."""
    return 'tpu' if self.target is None else 'gpu'


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice, or several joined by the data centre's network.

  Attributes:
    generation: The kind of accelerator.
    shape: Shape of a slice, in chips; for GPUs nodes x GPUs per node.
    num_slices: Number of slices.
  """

  generation: Generation
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def chips_per_slice(self) -> int:
    """Chips, or GPUs, of one slice."""
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

  @property
  def hbm_bytes(self) -> float:
    """Memory of one device."""
    return self.generation.chip.hbm_bytes / self.generation.devices_per_chip

  @property
  def flops(self) -> float:
    """Peak bfloat16 FLOP/s of one device."""
    return self.generation.chip.flops / self.generation.devices_per_chip

  @property
  def linked_devices(self) -> int | None:
    """Devices that links join; None if they join a whole slice."""
    return self.shape[1] if self.generation.kind == 'gpu' else None

  def __str__(self) -> str:
    shape = 'x'.join(map(str, self.shape))
    slices = f'*{self.num_slices}' if self.num_slices > 1 else ''
    return f'{self.generation.name}:{shape}{slices}'


def _cubes(num_chips: int) -> tuple[tuple[int, ...], ...]:
  """Returns slices of a torus: a few small ones, then blocks of 4x4x4 cubes."""
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


def _gpu(name, chip, target, *device_kinds):
  return Generation(name, _NODES, chip, 8, device_kinds, target=target)


# Chips: FLOP/s, bytes of memory, and bytes/s of memory, links and network.
_GENERATIONS = (
  Generation(
    'v4',
    _cubes(3072),
    Chip(275e12, 32 * 2**30, 1228e9, 90e9, 6e9, _TPU_PASSES),
    chips_per_host=4,
    device_kinds=('TPU v4',),
    cloud=Cloud('tpu-v4-podslice', 'v4', 2, 'tpu-ubuntu2204-base'),
  ),
  Generation(
    'v5e',
    _SQUARES,
    # 4 units of 128 x 128 multiply and add once per cycle; on v5p 8 do.
    Chip(197e12, 16 * 2**30, 819e9, 90e9, 3e9, _TPU_PASSES, 1.5e9),
    chips_per_host=4,
    device_kinds=('TPU v5 lite', 'TPU v5e'),
    cloud=Cloud('tpu-v5-lite-podslice', 'v5litepod', 1, 'v2-alpha-tpuv5-lite'),
  ),
  Generation(
    'v5p',
    _cubes(8960),
    Chip(459e12, 95 * 2**30, 2765e9, 180e9, 6e9, _TPU_PASSES, 1.75e9),
    chips_per_host=4,
    device_kinds=('TPU v5', 'TPU v5p'),
    cloud=Cloud('tpu-v5p-slice', 'v5p', 2, 'v2-alpha-tpuv5'),
  ),
  Generation(
    'v6e',
    _SQUARES,
    Chip(918e12, 32 * 2**30, 1640e9, 180e9, 12e9, _TPU_PASSES),
    chips_per_host=4,
    device_kinds=('TPU v6 lite', 'TPU v6e'),
    cloud=Cloud('tpu-v6e-slice', 'v6e', 1, 'v2-alpha-tpuv6e'),
  ),
  Generation(
    'tpu7x',
    ((1, 1, 1), *_cubes(9216)),
    Chip(2307e12, 192 * 2**30, 7380e9, 200e9, 12e9, _TPU_PASSES),
    chips_per_host=4,
    device_kinds=('TPU7x',),
    devices_per_chip=2,
    cloud=Cloud('tpu7x'),
  ),
  _gpu(
    'a100',
    Chip(312e12, 80e9, 2039e9, 300e9, 25e9, _GPU_PASSES),
    GpuTarget((8, 0), 108, 164, 1410, 40),
    'NVIDIA A100-SXM4-80GB',
  ),
  _gpu(
    'h100',
    Chip(989e12, 80e9, 3352e9, 450e9, 50e9, _GPU_PASSES),
    GpuTarget((9, 0), 132, 227, 1980, 50),
    'NVIDIA H100 80GB HBM3',
  ),
  _gpu(
    'h200',
    Chip(989e12, 141e9, 4800e9, 450e9, 50e9, _GPU_PASSES),
    GpuTarget((9, 0), 132, 227, 1980, 50),
    'NVIDIA H200',
  ),
  _gpu(
    'b200',
    Chip(2250e12, 180e9, 7700e9, 900e9, 50e9, _GPU_PASSES),
    GpuTarget((10, 0), 148, 227, 1965, 126),
    'NVIDIA B200',
  ),
)
GENERATIONS = {generation.name: generation for generation in _GENERATIONS}


def find(spec: str) -> Topology:
  """Parses the name of a topology, as in --topology.

  Args:
    spec: Such as 'v5e:16x16', 'v5p:4x8x8*2' (two slices) or 'h100:4x8' (four
      nodes of eight GPUs).

  Returns:
    The topology.

  Raises:
    errors.UserError: There is no such slice; the message names the nearest.
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
    # Slices of GPUs are joined like nodes, so that they count as nodes.
    shape, num_slices = (nodes * num_slices, per_node), 1
  return Topology(generation, shape, num_slices)


def find_kind(device_kind: str) -> Generation | None:
  """Returns the generation of a device by its `device_kind`, if known."""
  return next(
    (x for x in GENERATIONS.values() if device_kind in x.device_kinds), None
  )


def has_libtpu() -> bool:
  """Returns whether libtpu, the compiler for TPUs, is installed."""
  found = importlib.util.find_spec('libtpu')
  return found is not None or bool(os.environ.get('TPU_LIBRARY_PATH'))


def cuda_plugins() -> list[str]:
  """Returns the modules of JAX's plugins for CUDA that are installed."""
  if importlib.util.find_spec('jax_plugins') is None:
    return []
  names = [f'jax_plugins.xla_cuda{version}' for version in (13, 12)]
  return [name for name in names if importlib.util.find_spec(name)]


def check_platforms(platforms: str | None) -> None:
  """Checks that JAX can use the platforms that a user asks for.

  Args:
    platforms: The variable JAX_PLATFORMS, names joined by commas, or None.

  Raises:
    errors.UserError: The package for one of them is not installed.
  """
  for name in (platforms or '').split(','):
    missing = None
    if name == 'tpu' and not has_libtpu():
      missing = "libtpu, which is not installed; pip install '.[tpu]'"
    if name in ('cuda', 'gpu') and not cuda_plugins():
      missing = (
        "JAX's plugin for CUDA, which is not installed; pip install '.[cuda]'"
      )
    if missing is not None:
      raise errors.UserError(
        f'JAX_PLATFORMS={platforms} needs {missing}, or unset it.'
      )


def _nearest(spec: str) -> str:
  """Returns the likeliest topology, by name, number of chips and shape."""
  letters = re.split(r'[:-]', spec.lower())[0]
  name = difflib.get_close_matches(letters, GENERATIONS, n=1, cutoff=0)[0]
  generation = GENERATIONS[name]
  rest = spec[len(letters) :].partition('*')[0]
  shape = list(map(int, re.findall(r'\d+', rest))) or [4]
  chips = math.prod(shape)
  if '-' in spec:  # as in v5p-128, which counts cores
    cores = generation.cloud.cores_per_chip if generation.cloud else 1
    chips = shape[0] // cores

  def distance(legal):
    sides = itertools.zip_longest(legal, shape, fillvalue=1)
    return abs(math.prod(legal) - chips), sum(abs(a - b) for a, b in sides)

  return str(Topology(generation, min(_concrete(generation), key=distance)))


def _concrete(generation: Generation) -> Iterator[tuple[int, ...]]:
  """Yields shapes of a generation with numbers in place of None."""
  for shape in generation.shapes:
    if None in shape:
      yield from ((nodes, shape[1]) for nodes in (1, 2, 4, 8, 16, 32, 64, 128))
    else:
      yield shape
