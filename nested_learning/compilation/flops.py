"""Counts the FLOPs of matmuls, in a jaxpr and in a compiled program."""

from collections.abc import Callable
import math
import re
from typing import Any

import jax

from nested_learning.compilation import hlo

_WINDOW_FIELDS = ('size', 'stride', 'pad', 'lhs_dilate', 'rhs_dilate')


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
  """Counts the FLOPs of the matmuls of one call, of all devices together.

  The body of a scan counts as often as it runs, recomputation by
  `jax.checkpoint` counts, the most expensive branch of a `cond` counts, a
  kernel counts once per program of its grid, and a `while` loop, whose length
  is not known, counts as one pass.

  Args:
    function: Function that JAX can trace.
    *args: Arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    FLOPs; a multiplication and an addition are two.
  """
  return jaxpr_flops(jax.make_jaxpr(function)(*args))


def jaxpr_flops(jaxpr: Any) -> int:
  """Counts as `matmul_flops` does, from a jaxpr."""
  return _count(_open(jaxpr))


def _count(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      total += _dot_flops(equation)
      continue
    counts = [_count(_open(sub)) for sub in _subjaxprs(equation.params)]
    if equation.primitive.name == 'cond':
      total += max(counts)
    else:
      total += _times(equation) * sum(counts)
  return total


def _times(equation) -> int:
  """Returns how often an equation runs its own jaxpr."""
  params = equation.params
  if equation.primitive.name == 'shard_map':  # its jaxpr is that of one device
    return math.prod(
      params['mesh'].shape[axis] for axis in params['newly_manual_axes']
    )
  if equation.primitive.name == 'pallas_call':  # that of one program
    return math.prod(params['grid_mapping'].grid)
  return params.get('length', 1)


def _dot_flops(equation) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  lhs = equation.invars[0].aval.shape
  inner = math.prod(lhs[axis] for axis in contracted)
  return 2 * inner * math.prod(equation.outvars[0].aval.shape)


def _subjaxprs(params):
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if hasattr(item, 'eqns') or hasattr(item, 'jaxpr'):
        yield item


def _open(jaxpr):
  return getattr(jaxpr, 'jaxpr', jaxpr)


def instruction_flops(
  instruction: hlo.Instruction, operands: list[hlo.Shape]
) -> int:
  """Returns the FLOPs of a product; 0 for any other instruction.

  Args:
    instruction: A dot, a convolution (TPUs turn dots into them), a call of a
      GPU's library, or one of a kernel that states its cost.
    operands: Shapes of its operands.
  """
  match instruction.opcode:
    case 'dot':
      contracted = _numbers(instruction.rest, 'lhs_contracting_dims')
      return _dot(instruction, operands, contracted)
    case 'custom-call' if '"dot_dimension_numbers"' in instruction.rest:
      found = re.search(
        r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest
      )
      return _dot(instruction, operands, map(int, re.findall(r'\d+', found[1])))
    case 'custom-call':
      return int(hlo.stated_cost(instruction, 'flops'))
    case 'convolution':
      return _convolution(instruction, operands)
  return 0


def precision(instruction: hlo.Instruction, operands: list[hlo.Shape]) -> str:
  """Returns 'default', 'high' or 'highest'; 'native' below float32."""
  if operands[0].dtype != 'f32':
    return 'native'
  found = re.search(r'operand_precision=\{(\w+)', instruction.rest)
  return found[1] if found else 'default'


def _dot(instruction, operands, contracted):
  inner = math.prod(operands[0].dims[axis] for axis in contracted)
  return 2 * inner * math.prod(instruction.shapes[0].dims)


def _convolution(instruction, operands):
  """Counts pairs of a kernel's and an input's entry; padding has none."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
  lhs, rhs, out = labels.groups()
  left, right = operands[0].dims, operands[1].dims
  result = instruction.shapes[0].dims
  groups = re.search(r'batch_group_count=(\d+)', instruction.rest)
  # The kernel's 'i' is already divided by the groups of features.
  total = result[out.index('b')] * result[out.index('f')]
  total *= right[rhs.index('i')]
  window = _window(instruction.rest)
  spatial = sorted(label for label in lhs if label.isdigit())
  for axis, label in enumerate(spatial):
    total *= _num_pairs(
      left[lhs.index(label)],
      right[rhs.index(label)],
      result[out.index(label)],
      {name: values[axis] for name, values in window.items()},
    )
  return 2 * total // (int(groups[1]) if groups else 1)


def _num_pairs(num_in: int, num_kernel: int, num_out: int, window) -> int:
  """Counts pairs of a kernel's place and an output that read an input."""
  stride, low = int(window['stride']), int(window['pad'].split('_')[0])
  spread, gap = int(window['lhs_dilate']), int(window['rhs_dilate'])
  total = 0
  for place in range(num_kernel):
    offset = place * gap - low
    # Outputs o with 0 <= o * stride + offset < num_in * spread, on an input.
    if spread == 1 and stride == 1:
      total += max(min(num_out, num_in - offset) - max(0, -offset), 0)
      continue
    total += sum(
      0 <= at < num_in * spread and at % spread == 0
      for at in range(offset, offset + num_out * stride, stride)
    )
  return total


def _window(text: str) -> dict[str, list[str]]:
  found = re.search(r'window=\{([^}]*)\}', text)
  fields = dict(re.findall(r'(\w+)=([\w\-]+)', found[1])) if found else {}
  # Pads may be negative, and fields of several axes are joined by x.
  parts = {name: fields[name].split('x') for name in fields}
  rank = max(map(len, parts.values()), default=0)
  standard = {'pad': '0_0'}
  return {
    name: parts.get(name, [standard.get(name, '1')] * rank)
    for name in _WINDOW_FIELDS
  }


def _numbers(text: str, name: str) -> list[int]:
  found = re.search(rf'\b{name}=\{{([\d,]*)\}}', text)
  return [int(x) for x in found[1].split(',') if x] if found else []
