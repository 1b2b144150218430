"""What a function costs by operation count: the matmul FLOPs of its jaxpr.

The compiler's own analysis counts the body of a loop once; here a scan's body
counts as often as it runs.
"""

from collections.abc import Callable
import math
from typing import Any

import jax


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
  """FLOPs of the matmuls that a call would do, multiply and add apart.

  Args:
    function: Anything that traces; recomputation by `jax.checkpoint` counts.
    *args: Arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    The number for one call, of all devices together. Of a `cond` the most
    expensive branch counts; a `while` loop, whose length is not known, counts
    as one pass.
  """
  return jaxpr_flops(jax.make_jaxpr(function)(*args))


def jaxpr_flops(jaxpr: Any) -> int:
  """The same of a function that is traced already, by its jaxpr."""
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
  """How often an equation does what its own jaxpr says."""
  params = equation.params
  if equation.primitive.name == 'shard_map':  # it says what one device does
    return math.prod(
      params['mesh'].shape[axis] for axis in params['newly_manual_axes']
    )
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
