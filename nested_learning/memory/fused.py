"""The engine as one kernel for TPUs: equal to the chunk scan.

The memories of a head stay in VMEM from chunk to chunk (`fused_scan.py`), and
one chunk of a head is solved as in the chunk scan (`fused_chunk.py`).
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp

from nested_learning.memory import chunk_scan
from nested_learning.memory import fused_chunk
from nested_learning.memory import fused_plan
from nested_learning.memory import layout
from nested_learning.memory import networks
from nested_learning.memory import rule as rules
from nested_learning.memory import writes

_ROW_TILE = 8  # tokens of a chunk are a multiple: a tile's second axis
_INTERPRET_VMEM = 2**26
_WORTH_SAYING = 1.25  # bytes in tiles over bytes


def scan_fused(
  network: networks.Network,
  rule: rules.Rule,
  initial: Any,
  state: rules.State | None,
  inputs: Any,
  *,
  project: rules.Project,
  reset: jax.Array | None = None,
  mask: jax.Array | None = None,
  write: bool = True,
  starts_chunk: bool = False,
  interpret: bool = False,
) -> tuple[rules.Result, rules.State]:
  """Reads and writes chunk by chunk in a kernel: equal to `scan_chunks`.

  Where `unsupported` names a reason, it is `scan_chunks`; a log line says so.

  Args:
    network: As in `scan_chunks`.
    rule: As in `scan_chunks`.
    initial: As in `scan_chunks`.
    state: As in `scan_chunks`.
    inputs: As in `scan_chunks`.
    project: As in `scan_chunks`. The kernel sees the arrays that it uses if it
      is a `jax.tree_util.Partial` of arrays [b, h, ...] and computes the same
      for arrays without these two axes.
    reset: As in `scan_chunks`.
    mask: As in `scan_chunks`.
    write: As in `scan_chunks`.
    starts_chunk: As in `scan_chunks`.
    interpret: Whether to interpret the kernel, on any device: slow, for tests.

  Returns:
    The `Result`, and the state after the tokens.
  """
  arguments = network, rule, initial, state, inputs
  options = {
    'project': project,
    'reset': reset,
    'mask': mask,
    'write': write,
    'starts_chunk': starts_chunk,
  }
  reason = unsupported(rule, project, write=write, interpret=interpret)
  if reason is None:
    from nested_learning.memory import fused_scan  # Pallas imports slowly

    call = _prepare(*arguments, **options)
    trees = call.body, call.shared, call.state, call.tokens
    reason = 'its network or its inputs are made with other arrays'
    if call.body is not None:
      width = max(x.shape[-1] for x in jax.tree.leaves(inputs))
      vmem_bytes = _vmem_bytes(interpret)
      plan = fused_plan.make_plan(
        *trees, vmem_bytes=vmem_bytes, interpret=interpret
      )
      if plan is not None:
        body, *arrays = trees
        if not interpret:
          _say_padding(width, fused_plan.padding(*arrays))
        return call.finish(*fused_scan.scan(body, plan, *arrays))
      reason = fused_plan.why_too_large(
        *trees, width=width, vmem_bytes=vmem_bytes
      )
  _say_once(reason)
  return chunk_scan.scan_chunks(*arguments, **options)


def unsupported(
  rule: rules.Rule,
  project: rules.Project,
  *,
  write: bool = True,
  interpret: bool = False,
) -> str | None:
  """Returns why a memory runs without the kernel, or None.

  Args:
    rule: How the memory is written and read.
    project: As in `scan_fused`.
    write: Whether tokens write.
    interpret: Whether the kernel is interpreted, on any device.
  """
  is_known = project is None or isinstance(project, jax.tree_util.Partial)
  mesh = jax.sharding.get_abstract_mesh()
  reasons = {
    'its rule has momentum': rule.momentum,
    'its rule has an extension': rule.extension is not None,
    'its rule reads a map of its weights': rule.to_weights is not None,
    'its tokens write nothing': not write,
    'it makes its inputs with arrays that a kernel cannot see': not is_known,
    f'chunk_size={rule.chunk_size} is no multiple of {_ROW_TILE}': (
      not interpret and rule.chunk_size % _ROW_TILE != 0
    ),
    'devices share the tokens of its rows': bool(mesh.manual_axes),
    'the device is no TPU': not interpret and not _is_tpu(),
  }
  return next((reason for reason, holds in reasons.items() if holds), None)


@functools.cache
def _say_once(reason: str) -> None:
  logging.warning('A memory runs without a fused kernel: %s.', reason)


@functools.cache
def _say_padding(width: int, ratio: float) -> None:
  if ratio > _WORTH_SAYING:
    logging.warning(
      'Arrays of a head of width %d take %.1f times their bytes in VMEM, where '
      'tiles have 8 x 128 entries; widths that are multiples of 128 waste '
      'least.',
      width,
      ratio,
    )


def _is_tpu() -> bool:
  """Returns whether the program is compiled for a TPU, here or elsewhere."""
  from jax.experimental.pallas import tpu as pltpu

  try:
    pltpu.get_tpu_info()
  except ValueError:
    return False
  return True


def _vmem_bytes(interpret: bool) -> int:
  if interpret:
    return _INTERPRET_VMEM
  from jax.experimental.pallas import tpu as pltpu

  return pltpu.get_tpu_info().vmem_capacity_bytes


class _Call(NamedTuple):
  """A call of the engine as a scan of a kernel.

  Attributes:
    body: Body of the kernel; None if it closes over arrays.
    shared: Arrays that are the same for all chunks, [b, h, ...].
    state: The state before the tokens, [b, h, ...].
    tokens: The tokens in chunks, packed, [b, h, n, ...].
    finish: Function from the last state and the outputs to what the engine
      returns.
  """

  body: fused_plan.Body | None
  shared: Any
  state: Any
  tokens: Any
  finish: Callable[[Any, Any], tuple[rules.Result, rules.State]]


def _prepare(
  network,
  rule,
  initial,
  state,
  inputs,
  *,
  project,
  reset,
  mask,
  write,
  starts_chunk,
) -> _Call:
  """Lays out a call's arrays for the kernel."""
  del write
  batch_size, heads = jax.tree.leaves(inputs)[0].shape[:2]
  is_aligned = (state is None or starts_chunk) and mask is None
  if state is None:
    state = rules.init_state(rule, initial, batch_size)
  chunks, restore = layout.lay_out(
    rule.chunk_size,
    state.offset,
    inputs,
    is_aligned=is_aligned,
    reset=reset,
    mask=mask,
  )
  inputs = jax.tree.map(_by_row, chunks.inputs)
  dtype = jnp.result_type(*jax.tree.leaves(inputs))
  marks, offset = _make_marks(rule.chunk_size, chunks, state.offset)
  marks = jax.tree.map(
    lambda x: _by_row(
      jnp.broadcast_to(
        x.astype(dtype)[:, :, None, :, None],
        (*x.shape[:2], heads, rule.chunk_size, 1),
      )
    ),
    marks,
  )
  tree = {'inputs': inputs, 'marks': marks}
  packing = fused_chunk.make_packing(tree)
  tokens = packing.pack(
    jax.tree.leaves(tree), lambda x: jnp.swapaxes(x, -1, -2)
  )
  written = [n for n in initial if writes.learns(rule, n, initial)]
  select = lambda maps: {name: maps[name] for name in written}
  carried = {'memory': select(state.memory)}
  if chunks.mask is not None:
    carried['anchor'] = select(state.anchor)
  arrays, structure = jax.tree.flatten(project)
  per_row = lambda w: jnp.broadcast_to(w, (batch_size, *w.shape))
  shared = {
    'fixed': {n: x for n, x in state.memory.items() if n not in written},
    'initial': jax.tree.map(per_row, initial),
    'arrays': arrays,
  }

  def chunk(shared, state, tokens):
    """Returns the state after the chunk, and the result's new arrays."""
    tree = packing.unpack(tokens, fused_chunk.to_column)
    made = structure.unflatten(shared['arrays'])  # `project`
    after, result = fused_chunk.solve(
      network, rule, made, shared, state, tree['inputs'], tree['marks']
    )
    known = {id(x): i for i, x in enumerate(jax.tree.leaves(tree['inputs']))}
    leaves, kind = jax.tree.flatten(result)
    handed_on = [known.get(id(x)) for x in leaves]
    new = [x for x, i in zip(leaves, handed_on, strict=True) if i is None]
    return after, new, (kind, handed_on)

  described = {}

  def body(shared, state, tokens):
    after, new, (kind, handed_on) = chunk(shared, state, tokens)
    own = fused_chunk.make_packing(new)
    described.update(packing=own, kind=kind, handed_on=handed_on)
    return after, own.pack(new, fused_chunk.to_row)

  body = _simplify(body, shared, carried, tokens)

  def finish(after, outputs):
    new = iter(
      described['packing'].unpack(outputs, lambda x: jnp.swapaxes(x, -1, -2))
    )
    known = jax.tree.leaves(inputs)
    leaves = [
      next(new) if i is None else known[i] for i in described['handed_on']
    ]
    result = described['kind'].unflatten(leaves)
    result = jax.tree.map(lambda x: restore(jnp.moveaxis(x, 2, 0)), result)
    fixed = shared['fixed']
    memory = {**fixed, **after['memory']}
    anchor = {**fixed, **after.get('anchor', after['memory'])}
    return result, rules.State(memory, anchor, None, offset)

  return _Call(body, shared, carried, tokens, finish)


def _by_row(x: jax.Array) -> jax.Array:
  """Moves chunks behind rows and heads: [n, b, h, ...] to [b, h, n, ...]."""
  return jnp.moveaxis(x, 0, 2)


def _make_marks(
  chunk_size: int, chunks: layout.Chunks, offset: jax.Array
) -> tuple[fused_chunk.Marks, jax.Array]:
  """Returns the marks [n, b, c] of slots, and the offset after the tokens."""
  marks = fused_chunk.Marks()
  if chunks.reset is not None:
    marks = marks._replace(document=jnp.cumsum(chunks.reset, axis=2))
  if chunks.mask is None:
    return marks, offset
  number = jnp.sum(chunks.mask, axis=2, dtype=jnp.int32)  # [n, b]
  after = (offset + jnp.cumsum(number, axis=0)) % chunk_size
  before = jnp.concatenate([offset[None], after[:-1]])
  slots = lambda x: jnp.broadcast_to(x[..., None], chunks.mask.shape)
  marks = marks._replace(
    present=chunks.mask,
    starts=slots(before == 0),
    ends=slots(before + number == chunk_size),
  )
  return marks, after[-1]


def _simplify(body, shared, state, tokens) -> fused_plan.Body | None:
  """Returns a body without the operations whose results nobody uses.

  Arrays without entries are among these, which kernels do not know. Returns
  None if the body closes over arrays, which no kernel can see.
  """
  shapes = tuple(
    layout.without_leading(tree, axes)
    for tree, axes in ((shared, 2), (state, 2), (tokens, 3))
  )
  if jax.make_jaxpr(body)(*shapes).consts:
    return None

  def simplified(*trees):
    # Traced where it runs: inside of `shard_map`, arrays know another mesh.
    shapes = layout.without_leading(trees, 0)
    closed, results = jax.make_jaxpr(body, return_shape=True)(*shapes)
    used = [True] * len(closed.jaxpr.outvars)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
    leaves = jax.core.eval_jaxpr(jaxpr, (), *jax.tree.leaves(trees))
    return jax.tree.unflatten(jax.tree.structure(results), leaves)

  return simplified
