"""Divides a scan of a kernel: over devices, programs and VMEM; and its cost."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax

from nested_learning import compilation
from nested_learning import sharding
from nested_learning.memory import layout

# `body(shared, state, tokens) -> (state, outputs)`, all without leading axes.
Body = Callable[[Any, Any, Any], tuple[Any, Any]]

_MOST_HEADS = 8  # more heads at once lengthen compilation and save no cycle
# States that are kept may fill this much of HBM per call; more are recomputed.
_KEPT_BYTES = 2**30
# Results inside a body that lie in VMEM at a time, of all that it computes.
_LIVE = 0.25
_TILE = 8, 128
_USABLE = 0.9  # of VMEM, by arrays of a head


class Plan(NamedTuple):
  """How a scan is divided among the programs of a kernel.

  Attributes:
    heads: Heads that a program takes at once; divides the heads of a device.
    every: Chunks between two states that are kept; divides the chunks.
    vmem_bytes: VMEM that the compiler may use.
    interpret: Whether to interpret the kernel, on any device.
  """

  heads: int
  every: int
  vmem_bytes: int
  interpret: bool = False


def make_plan(
  body: Body,
  shared: Any,
  state: Any,
  tokens: Any,
  *,
  vmem_bytes: int,
  interpret: bool = False,
) -> Plan | None:
  """Chooses the heads of a program and the states that are kept.

  Args:
    body: The body.
    shared: Arrays [b, h, ...] or their shapes.
    state: As `shared`.
    tokens: Arrays [b, h, n, ...] or their shapes.
    vmem_bytes: VMEM of a core.
    interpret: Whether to interpret the kernel.

  Returns:
    The plan, or None if no head of the body fits into VMEM.
  """
  heads, every, charges = _charges(body, shared, state, tokens)
  needed = _total(charges)
  fitting = [
    g
    for g in range(1, min(heads, _MOST_HEADS) + 1)
    if heads % g == 0 and g * needed <= _USABLE * vmem_bytes
  ]
  if not fitting:
    return None
  return Plan(max(fitting), every, vmem_bytes, interpret)


def why_too_large(
  body: Body,
  shared: Any,
  state: Any,
  tokens: Any,
  *,
  width: int,
  vmem_bytes: int,
) -> str:
  """Says how much VMEM a head needs, and which width of heads fits.

  Args:
    body: As in `make_plan`, which has found no plan.
    shared: As in `make_plan`.
    state: As in `make_plan`.
    tokens: As in `make_plan`.
    width: Channels of a head.
    vmem_bytes: VMEM of a core.
  """
  charges = _charges(body, shared, state, tokens)[-1]
  usable = _USABLE * vmem_bytes

  def fits(other):
    resize = lambda n: n // width * other if n % width == 0 else n
    return _total(charges, resize) <= usable

  widths = range(width - width % _TILE[0], 0, -_TILE[0])
  nearest = next(filter(fits, widths), None)
  return (
    f'a head of width {width} needs {_total(charges) / 2**20:.0f} MiB of VMEM, '
    f'and a core has {usable / 2**20:.0f} for it; the nearest width that fits '
    f'is {nearest}'
  )


def padding(shared: Any, state: Any, tokens: Any) -> float:
  """Returns the bytes of a head's arrays in VMEM over their own bytes.

  Args:
    shared: As in `make_plan`.
    state: As in `make_plan`.
    tokens: As in `make_plan`.
  """
  leaves = jax.tree.leaves(_per_head(shared, state, tokens))
  own = sum(x.size * x.dtype.itemsize for x in leaves)
  return sum(map(_tiled_bytes, leaves)) / own


def _per_head(shared, state, tokens):
  """Returns shapes of the arrays of one head, and of one chunk of tokens."""
  return tuple(
    layout.without_leading(tree, number)
    for tree, number in ((shared, 2), (state, 2), (tokens, 3))
  )


def _charges(body, shared, state, tokens):
  """Returns heads of a device, chunks between kept states, and what fills VMEM.

  The last is a list of pairs: an array of a head, and the share of its bytes.
  """
  rows, heads, chunks = jax.tree.leaves(tokens)[0].shape[:3]
  rows, heads = rows // num_row_shards(rows), heads // num_head_shards(heads)
  per_head = _per_head(shared, state, tokens)
  outputs = jax.eval_shape(body, *per_head)[1]
  one = lambda share, *trees: [(x, share) for x in jax.tree.leaves(trees)]
  kept = rows * heads * chunks * _total(one(1, per_head[1]))
  # Of n chunks, a copy every sqrt(n) costs as much VMEM as HBM.
  divisors = range(1, math.isqrt(chunks) + 1)
  divisors = [k for k in divisors if chunks % k == 0]
  every = next((k for k in divisors if kept <= k * _KEPT_BYTES), divisors[-1])
  # The backward pass needs more than the forward pass: shared arrays and states
  # with their gradients, tokens with theirs, and what `jax.vjp` saves. Blocks
  # are doubled, so that the next ones are fetched while these are computed.
  charges = [
    *one(4, per_head[0]),
    *one(8 + every, per_head[1]),
    *one(4 * every, per_head[2], outputs),
    *one(_LIVE, _vjp_results(body, per_head, outputs)),
  ]
  return heads, every, charges


def _total(charges, resize: Callable[[int], int] = lambda n: n) -> float:
  """Returns the bytes of charges whose dimensions are resized."""
  return sum(
    share * _tiled_bytes(jax.ShapeDtypeStruct([*map(resize, x.shape)], x.dtype))
    for x, share in charges
  )


def mesh_axes(rows: int, heads: int) -> jax.sharding.PartitionSpec:
  """Returns the mesh axes of rows and heads; every other axis is whole."""
  return jax.P(
    sharding.ROWS if num_row_shards(rows) > 1 else None,
    'model' if num_head_shards(heads) > 1 else None,
  )


def num_row_shards(rows: int) -> int:
  """Returns the number of devices that divide the rows; 1 if they cannot."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(sharding.ROWS) <= set(mesh.shape):
    return 1
  groups = sharding.num_row_groups(mesh)
  return groups if rows % groups == 0 else 1


def num_head_shards(heads: int) -> int:
  """Returns the number of devices that divide the heads; 1 if they cannot."""
  mesh = jax.sharding.get_abstract_mesh()
  size = 1 if mesh.empty else mesh.shape.get('model', 1)
  return size if heads % size == 0 else 1


def cost(
  body: Body, shared: Any, state: Any, tokens: Any, *, gradient: bool = False
) -> tuple[int, int, int]:
  """Counts FLOPs, transcendentals (as 0) and bytes of all devices together.

  Args:
    body: The body.
    shared: As in `make_plan`.
    state: As in `make_plan`.
    tokens: As in `make_plan`.
    gradient: Whether of the backward pass, that recomputes no state.
  """
  rows, heads, chunks = jax.tree.leaves(tokens)[0].shape[:3]
  inputs = (
    layout.without_leading(shared, 2),
    layout.without_leading(state, 2),
    layout.without_leading(tokens, 3),
  )
  results = jax.eval_shape(body, *inputs)
  function, moved = body, (inputs[2], results[1])
  if gradient:
    function = lambda *x: jax.vjp(body, *x[:3])[1](x[3])
    inputs = *inputs, results
    moved = (*moved, inputs[2])
  times = rows * heads * chunks
  exact = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  per_row = (2 if gradient else 1) * exact((inputs[0], inputs[1]))
  return (
    times * compilation.matmul_flops(function, *inputs),
    0,
    times * exact(moved) + rows * heads * per_row,
  )


def _vjp_results(body, inputs, outputs) -> list[Any]:
  """Returns everything that the backward pass of a body makes, as shapes."""
  pull = lambda *x: jax.vjp(body, *x[:3])[1](x[3])
  jaxpr = jax.make_jaxpr(pull)(*inputs, (inputs[1], outputs))
  return [
    jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
    for equation in jaxpr.eqns
    for x in equation.outvars
    if getattr(x.aval, 'shape', None)
  ]


def _tiled_bytes(x) -> int:
  """Returns the bytes of an array in VMEM, where it fills whole tiles."""
  *lead, rows, columns = (1, 1, *x.shape)
  rows, columns = (
    -(-n // size) * size for n, size in zip((rows, columns), _TILE, strict=True)
  )
  return math.prod(lead) * rows * columns * x.dtype.itemsize
