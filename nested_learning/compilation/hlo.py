"""Parses the text of a compiled program, with its loops and their lengths.

XLA's own analysis counts the body of a loop once. `walk` yields every
instruction with the number of times that it runs.
"""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

# Types that are missing, such as those of 8-bit floats, have one byte.
_ITEM_BYTES = {
  'pred': 1,
  's4': 0.5,
  'u4': 0.5,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
  'c64': 8,
  'c128': 16,
}
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(
  r'^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(.*)$'
)
_SHAPE = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
  r'\b(calls|body|condition|to_apply|branch_computations|true_computation|'
  r'false_computation|called_computations)=(\{[^}]*\}|%[\w.\-]+)'
)
# Layouts name memory spaces: S(1) is on the chip, no S is HBM.
_FAST_MEMORY = re.compile(r'S\([1-9]\d*\)')
# Axes from the fastest one, and the tile that the fastest ones fill.
_TILED = re.compile(r'\{([\d,]+):T\(([\d,]+)\)')
# Instructions without an estimate have a number without a meaning.
_MOST_CYCLES = 10**12


class Shape(NamedTuple):
  """An array of a program.

  Attributes:
    dtype: As XLA writes it.
    dims: Its sizes, on one device.
    is_far: Whether it is in the device's large memory (HBM).
    tile: Sizes of its tiles along its last axes in memory; empty without.
    order: Its axes from the fastest one in memory; empty without tiles.
  """

  dtype: str
  dims: tuple[int, ...]
  is_far: bool = True
  tile: tuple[int, ...] = ()
  order: tuple[int, ...] = ()

  @property
  def num_entries(self) -> int:
    """Number of entries."""
    return math.prod(self.dims)

  @property
  def item_bytes(self) -> float:
    """Size of an entry in bytes."""
    return _ITEM_BYTES.get(self.dtype, 1)

  @property
  def num_bytes(self) -> float:
    """Size in bytes."""
    return self.num_entries * self.item_bytes

  def padded(self) -> 'Shape':
    """Returns the array with whole tiles, as it lies in memory."""
    dims = list(self.dims)
    # Axes beyond the tile's have none.
    for axis, size in zip(self.order, reversed(self.tile), strict=False):
      dims[axis] += -dims[axis] % size
    return self._replace(dims=tuple(dims))


class Instruction(NamedTuple):
  """One line of a program.

  Attributes:
    name: Its name, unique in the program.
    shapes: Shapes of its result; several for a tuple.
    opcode: Its operation.
    operands: Names of instructions of the same computation; for a parameter
      or a constant, its number.
    rest: The rest of the line: attributes and metadata.
    is_root: Whether it is the result of its computation.
  """

  name: str
  shapes: tuple[Shape, ...]
  opcode: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  @property
  def op_name(self) -> str:
    """Scopes and operation that it comes from, as JAX names them."""
    match = re.search(r'op_name="([^"]*)"', self.rest)
    return match[1] if match else ''

  def called(self, *kinds: str) -> list[str]:
    """Returns the computations that it names under these attributes."""
    return [
      name
      for kind, names in _CALLED.findall(self.rest)
      if kind in kinds
      for name in _NAME.findall(names)
    ]


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    computations: By name of a computation, its instructions by name, in order.
    entry: Name of the main computation.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str


class Executed(NamedTuple):
  """An instruction as it runs.

  Attributes:
    instruction: The instruction.
    computation: Name of its computation.
    times: Number of runs in one run of the program.
    loops: `op_name` of each loop around it, outermost first.
    is_fused: Whether it is part of a fusion, and so reads no memory itself.
  """

  instruction: Instruction
  computation: str
  times: int
  loops: tuple[str, ...]
  is_fused: bool


def parse(text: str) -> Program:
  """Parses the text of an optimised module.

  Args:
    text: The result of `compiled.as_text()`.

  Returns:
    The program.

  Raises:
    ValueError: The text holds no program.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      current = computations.setdefault(match[2], {})
      entry = match[2] if match[1] else entry
      continue
    match = _INSTRUCTION.match(line)
    if match and current is not None:
      root, name, shapes, opcode, operands, rest = match.groups()
      inputs = tuple(_NAME.findall(operands)) or (operands,)
      current[name] = Instruction(
        name, _shapes(shapes), opcode, inputs, rest, bool(root)
      )
  if entry is None:
    raise ValueError(f'{text[:40]!r}... holds no compiled program.')
  return Program(computations, entry)


def pad(program: Program) -> Program:
  """Returns a program whose arrays fill whole tiles, as they do in memory."""
  padded = lambda x: x._replace(shapes=tuple(s.padded() for s in x.shapes))
  return program._replace(
    computations={
      name: {key: padded(x) for key, x in computation.items()}
      for name, computation in program.computations.items()
    }
  )


def stated_cost(instruction: Instruction, name: str) -> float:
  """Returns what a custom call says that it costs; 0 without a word.

  Args:
    instruction: The instruction.
    name: 'flops' or 'bytes_accessed', fields of `pl.CostEstimate`.
  """
  if instruction.opcode != 'custom-call':
    return 0
  found = re.search(rf'cost_estimate.*?"{name}":"?(\d+)', instruction.rest)
  return int(found[1]) if found else 0


def estimated_cycles(instruction: Instruction) -> int:
  """Returns the compiler's own estimate of an instruction's time, in cycles.

  TPUs' compiler writes one beside most instructions; 0 where there is none.
  """
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
  return int(found[1]) if found and int(found[1]) < _MOST_CYCLES else 0


def walk(program: Program) -> Iterator[Executed]:
  """Yields every instruction with the number of times that it runs.

  Every branch of a conditional counts as taken. A loop of unknown length counts
  once.

  Args:
    program: The result of `parse`.
  """
  yield from _walk(program, program.entry, 1, (), False)


def trip_count(program: Program, loop: Instruction) -> int:
  """Returns how often the body of a `while` runs, or 1 if that is unknown.

  Args:
    program: The program.
    loop: An instruction `while`.
  """
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  # TPU programs compare the counter with a constant, in a fusion or directly.
  (condition,) = loop.called('condition')
  bounds = [
    int(instruction.operands[0])
    for name in (condition, *_below(program, condition))
    for instruction in program.computations[name].values()
    if instruction.opcode == 'constant'
    and instruction.shapes[0].dtype in ('s32', 'u32', 's64')
    and re.fullmatch(r'\d+', instruction.operands[0])
  ]
  return max(bounds, default=1)


def _walk(program, name, times, loops, is_fused):
  for instruction in program.computations[name].values():
    yield Executed(instruction, name, times, loops, is_fused)
    if instruction.opcode == 'while':
      inner = times * trip_count(program, instruction)
      (body,) = instruction.called('body')
      here = (*loops, instruction.op_name)
      yield from _walk(program, body, inner, here, is_fused)
      continue
    kinds = ['calls', 'branch_computations', 'called_computations']
    kinds += ['true_computation', 'false_computation']
    # Reductions apply a computation, too, but to scalars: not walked.
    if instruction.opcode in ('call', 'call-start', 'async-start'):
      kinds.append('to_apply')
    fused = is_fused or instruction.opcode == 'fusion'
    for called in instruction.called(*kinds):
      if called in program.computations:
        yield from _walk(program, called, times, loops, fused)


def _below(program, name):
  for instruction in program.computations[name].values():
    for called in instruction.called('calls', 'to_apply'):
      yield called
      yield from _below(program, called)


def _shapes(text: str) -> tuple[Shape, ...]:
  return tuple(
    Shape(
      dtype,
      _sizes(dims),
      not _FAST_MEMORY.search(layout or ''),
      *_tiles(layout or ''),
    )
    for dtype, dims, layout in _SHAPE.findall(text)
  )


def _tiles(layout: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns tile and order of a layout as {1,0:T(8,128)(2,1)S(1)}."""
  found = _TILED.match(layout)
  return (_sizes(found[2]), _sizes(found[1])) if found else ((), ())


def _sizes(text: str) -> tuple[int, ...]:
  return tuple(map(int, filter(None, text.split(','))))
