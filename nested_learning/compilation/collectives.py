"""Finds the collectives of a compiled program, with the bytes they send.

Collectives have several spellings, most of them on TPUs: an all-gather may be
cloned into the fusions that run beside it, a reduce-scatter is a fusion around
an all-reduce, and the host sends data to other slices.
"""

from collections.abc import Iterator, Mapping
import math
import re
from typing import NamedTuple

import numpy as np

from nested_learning.compilation import hlo

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


class Collective(NamedTuple):
  """A collective, as it runs.

  Attributes:
    kind: One of `KINDS`, or 'send' to another slice.
    axes: Mesh axes along which devices take part.
    spans: Largest distance of devices that take part, in the mesh's order,
      plus one.
    num_bytes: Bytes that each device sends in one run, by the ring algorithm.
    times: Number of runs in one run of the program.
    loops: `op_name` of each loop around it, outermost first.
    op_name: Its own scopes and operation, as JAX names them.
  """

  kind: str
  axes: tuple[str, ...]
  spans: int
  num_bytes: float
  times: int
  loops: tuple[str, ...]
  op_name: str


def find(
  program: hlo.Program, mesh_shape: Mapping[str, int]
) -> Iterator[Collective]:
  """Yields every collective of a program; clones are counted once.

  Args:
    program: The result of `hlo.parse`.
    mesh_shape: Sizes of the mesh axes by name, in the mesh's own order.
  """
  seen = set()
  for executed in hlo.walk(program):
    instruction = executed.instruction
    kind = instruction.opcode.removesuffix('-start')
    if kind == 'send' and 'megascale' in instruction.rest:
      kind = 'send'
    elif kind not in KINDS:
      continue
    # Clones share channel and chain; distinct collectives share channels, too.
    clone = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', instruction.rest)
    if clone:
      if clone.groups() in seen:
        continue
      seen.add(clone.groups())
    groups = _groups(instruction.rest, math.prod(mesh_shape.values()))
    if kind == 'all-reduce' and 'all-reduce-scatter' in executed.computation:
      kind = 'reduce-scatter'
    axes = _axes(groups, mesh_shape) if kind != 'send' else ('slices',)
    num_bytes = _sent(kind, instruction, groups.shape[-1])
    if num_bytes:
      yield Collective(
        kind,
        axes,
        int(np.max(np.ptp(groups, axis=-1))) + 1,
        num_bytes,
        executed.times,
        executed.loops,
        instruction.op_name,
      )


def _sent(kind: str, instruction: hlo.Instruction, size: int) -> float:
  """Returns the bytes that a device sends; `size` devices take part."""
  total = sum(shape.num_bytes for shape in instruction.shapes)
  is_start = instruction.opcode.endswith('-start')
  match kind:
    case 'all-gather':
      # The result of a start holds inputs and outputs.
      whole = total * size / (size + 1) if is_start else total
      return whole * (size - 1) / size
    case 'all-reduce':
      return 2 * total * (size - 1) / size
    case 'reduce-scatter' if instruction.opcode.startswith('all-reduce'):
      return total * (size - 1) / size
    case 'reduce-scatter':
      part = total / (size + 1) if is_start else total
      return part * (size - 1)
    case 'all-to-all' | 'ragged-all-to-all':
      return total * (size - 1) / size
    case 'send':
      return instruction.shapes[0].num_bytes
  largest = max(shape.num_bytes for shape in instruction.shapes)
  return largest if is_start else total


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the members of a group differ."""
  places = np.unravel_index(groups, tuple(mesh_shape.values()))
  return tuple(
    name
    for name, place in zip(mesh_shape, places, strict=True)
    if np.any(place != place[..., :1])
  )


def _groups(text: str, num_devices: int) -> np.ndarray:
  """Returns the devices that take part together, int [groups, members]."""
  pairs = re.search(r'source_target_pairs=\{(\{[\d,{}]*\})\}', text)
  if pairs:
    return _lists(pairs[1])
  explicit = re.search(r'replica_groups=\{(\{[\d,{}]*\})\}', text)
  if explicit:
    return _lists(explicit[1])
  iota = re.search(
    r'replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)', text
  )
  if iota:
    return _iota(iota[2][2:]).reshape(_ints(iota[1]))
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*?)\))? '
    r'\{([^}]*)\}',
    text,
  )
  if mesh:
    sizes = {
      name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])
    }
    return _on_mesh(sizes, mesh[2], re.findall(r"'(\w+)'", mesh[3]))
  return np.arange(num_devices)[None]


def _on_mesh(sizes, device_ids, axes) -> np.ndarray:
  """Returns the groups along some axes of a mesh that XLA named."""
  total = math.prod(sizes.values())
  ids = _iota(device_ids) if device_ids else np.arange(total)
  names = list(sizes)
  ids = ids.reshape(tuple(sizes.values()))
  within = [names.index(axis) for axis in axes]
  ids = np.moveaxis(ids, within, range(ids.ndim - len(within), ids.ndim))
  return ids.reshape(-1, math.prod(sizes[axis] for axis in axes))


def _iota(text: str) -> np.ndarray:
  """Parses [4,2]T(1,0): an iota, reshaped and transposed; returned flat."""
  dims, order = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  dims = _ints(dims)
  ids = np.arange(math.prod(dims)).reshape(dims)
  return (ids.transpose(_ints(order)) if order else ids).reshape(-1)


def _lists(text: str) -> np.ndarray:
  lists = [_ints(group) for group in re.findall(r'\{([\d,]+)\}', text)]
  longest = max(map(len, lists))
  # Uneven groups do not occur on a mesh; the first device pads the others.
  return np.array(
    [group + group[:1] * (longest - len(group)) for group in lists]
  )


def _ints(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(',')))
