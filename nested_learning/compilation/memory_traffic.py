"""Counts the bytes that a compiled program moves through a device's memory."""

from collections.abc import Callable, Mapping

from nested_learning.compilation import hlo

# Instructions that move nothing: control, names for existing arrays, and the
# second halves of asynchronous ones, which are counted at their start.
_FREE = frozenset(
  (
    'parameter',
    'constant',
    'get-tuple-element',
    'tuple',
    'bitcast',
    'while',
    'conditional',
    'call',
    'call-start',
    'call-done',
    'after-all',
    'async-start',
    'async-update',
    'async-done',
    'copy-done',
    'slice-done',
    'optimization-barrier',
    'partition-id',
    'replica-id',
  )
)
# Inside a fusion, these rename or move entries, and keep their number.
_VIEWS = ('bitcast', 'reshape', 'transpose', 'copy', 'convert')
_SLICES = ('dynamic-slice', 'slice', 'gather')


Which = Callable[[hlo.Instruction], bool]


def num_bytes(
  program: hlo.Program,
  which: Which = lambda instruction: True,
  *,
  padded: bool = False,
) -> float:
  """Counts the bytes that one device reads and writes in one run.

  An instruction reads its operands and writes its result once each. A fusion
  that takes a slice of an operand reads that slice alone, and one that writes
  a slice in place writes that slice alone, also in a fusion inside of it. A
  custom call moves the bytes that it says. Arrays in fast memory are free.

  Args:
    program: The result of `hlo.parse`.
    which: Predicate of the instructions that count; the default is all.
    padded: Whether arrays have the size of their tiles in memory, in place of
      their entries alone.
  """
  if padded:
    program = hlo.pad(program)
  total = 0.0
  known: dict[tuple[str, str], float] = {}
  for executed in hlo.walk(program):
    if not _counts(executed, which):
      continue
    key = executed.computation, executed.instruction.name
    if key not in known:
      known[key] = _instruction_bytes(
        program, program.computations[key[0]], executed.instruction
      )
    total += executed.times * known[key]
  return total


def result_bytes(
  program: hlo.Program, which: Which = lambda instruction: True
) -> float:
  """Counts the bytes of the results of all instructions, each once.

  This is no peak: the compiler reuses memory, and its text does not say where.

  Args:
    program: The result of `hlo.parse`.
    which: See `num_bytes`.
  """
  sizes = {
    (executed.computation, executed.instruction.name): _far(
      executed.instruction.shapes
    )
    for executed in hlo.walk(program)
    if _counts(executed, which)
  }
  return sum(sizes.values())


def _counts(executed, which):
  instruction = executed.instruction
  is_free = executed.is_fused or instruction.opcode in _FREE
  return not is_free and which(instruction)


def _instruction_bytes(
  program: hlo.Program,
  computation: Mapping[str, hlo.Instruction],
  instruction: hlo.Instruction,
) -> float:
  operands = [computation.get(name) for name in instruction.operands]
  if instruction.opcode == 'fusion':
    return _fusion_bytes(program, instruction, operands)
  if instruction.opcode in (*_SLICES, 'dynamic-update-slice'):
    return _slice_bytes(instruction, operands)
  if instruction.opcode.endswith('-start'):  # the result names its operands
    return _far(instruction.shapes)
  stated = hlo.stated_cost(instruction, 'bytes_accessed')
  if stated:
    return stated
  read = sum(_far(operand.shapes) for operand in operands if operand)
  return read + _far(instruction.shapes)


def _fusion_bytes(program, instruction, operands) -> float:
  fused, parameters = _inside(program, instruction)
  total = 0.0
  for i, operand in enumerate(operands):
    if operand is None:
      continue
    read = _far(operand.shapes)
    if read and len(operand.shapes) == 1:
      # A layer's slice of stacked weights, not the whole stack.
      part = _entries_read(program, fused, parameters[i])
      read = min(read, part * operand.shapes[0].item_bytes)
    total += read
  written = _far(instruction.shapes)
  if written:
    # A slice that is updated in place, not the whole array.
    written = min(written, _written_by(program, fused))
  return total + written


def _inside(program, fusion):
  """Returns the computation of a fusion, and its parameters by number."""
  (name,) = fusion.called('calls')
  fused = program.computations[name]
  return fused, {
    int(x.operands[0]): x for x in fused.values() if x.opcode == 'parameter'
  }


def _slice_bytes(instruction, operands):
  # The slice is read once and written once.
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * _far(operands[1].shapes if operands[1] else ())
  return 2 * _far(instruction.shapes)


def _entries_read(program, fused, source) -> float:
  """Returns how many entries of an array a fusion reads; inf is all."""
  total = 0.0
  for user in fused.values():
    if source.name not in user.operands:
      continue
    if user.opcode in _VIEWS:
      total += _entries_read(program, fused, user)
    elif user.opcode in _SLICES and user.operands[0] == source.name:
      total += sum(shape.num_entries for shape in user.shapes)
    elif (
      user.opcode == 'dynamic-update-slice' and user.operands[0] == source.name
    ):
      continue  # in place
    elif user.opcode == 'fusion':  # TPUs nest them
      inner, parameters = _inside(program, user)
      for i, name in enumerate(user.operands):
        if name == source.name:
          total += _entries_read(program, inner, parameters[i])
    else:
      return float('inf')  # Some user needs all of it.
  return total


def _written_by(program, fused) -> float:
  """Returns the bytes that a fusion writes of its result."""
  (root,) = (x for x in fused.values() if x.is_root)
  if root.opcode == 'tuple':
    parts = [fused[name] for name in root.operands]
  else:
    parts = [root]
  total = 0.0
  for part in parts:
    while part.opcode in ('bitcast', 'reshape'):
      part = fused[part.operands[0]]
    if part.opcode == 'fusion' and len(part.shapes) == 1:
      total += _written_by(program, _inside(program, part)[0])
      continue
    if part.opcode == 'dynamic-update-slice':
      part = fused[part.operands[1]]
    total += sum(shape.num_bytes for shape in part.shapes)
  return total


def _far(shapes) -> float:
  return sum(shape.num_bytes for shape in shapes if shape.is_far)
