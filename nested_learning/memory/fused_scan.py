"""A scan over chunks as one kernel: states stay in fast memory.

The body is an ordinary function of one chunk of one head. The kernel reads the
inputs of every chunk once and writes its outputs once; the state goes from
chunk to chunk in VMEM. The forward pass keeps a copy of the state in HBM every
few chunks. The backward pass recomputes the states between two copies and walks
back through them, with `jax.vjp` of the body inside the kernel.

Trees of arrays, by their leading axes (b rows, h heads, n chunks):

* shared: [b, h, ...], the same for all chunks of a row;
* state: [b, h, ...], before the first chunk;
* tokens and outputs: [b, h, n, ...].

Behind these axes every array has at least two more, as tiles of VMEM have.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from nested_learning.memory import fused_plan


def scan(
  body: fused_plan.Body,
  plan: fused_plan.Plan,
  shared: Any,
  state: Any,
  tokens: Any,
) -> tuple[Any, Any]:
  """Scans a body over the chunks of every row and head.

  Under a mesh whose axes divide rows and heads, each device scans its own.
  Second derivatives are those of `scan_plain`.

  Args:
    body: The body; it may close over no arrays.
    plan: From `fused_plan.make_plan`.
    shared: Arrays [b, h, ...].
    state: The state before the first chunk, [b, h, ...].
    tokens: Arrays [b, h, n, ...].

  Returns:
    The last state, and the outputs [b, h, n, ...].
  """
  return _scan(body, plan, shared, state, tokens)


def scan_plain(
  body: fused_plan.Body, shared: Any, state: Any, tokens: Any
) -> tuple[Any, Any]:
  """Does the same with `jax.lax.scan`."""
  run = jax.checkpoint(jax.vmap(jax.vmap(body)), prevent_cse=False)
  by_chunk = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), tokens)
  state, outputs = jax.lax.scan(
    lambda state, chunk: run(shared, state, chunk), state, by_chunk
  )
  return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(body, plan, shared, state, tokens):
  end, outputs, _ = _forward(body, plan, shared, state, tokens, keep=False)
  return end, outputs


def _scan_forward(body, plan, shared, state, tokens):
  end, outputs, kept = _scan_kept(body, plan, shared, state, tokens)
  return (end, outputs), (shared, state, tokens, kept)


def _scan_backward(body, plan, residuals, cotangents):
  return _pull_back(body, plan, *residuals, *cotangents)


_scan.defvjp(_scan_forward, _scan_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan_kept(body, plan, shared, state, tokens):
  """Scans and returns the states that are kept, too; for derivatives."""
  return _forward(body, plan, shared, state, tokens, keep=True)


def _scan_kept_forward(body, plan, shared, state, tokens):
  results = _scan_kept(body, plan, shared, state, tokens)
  return results, (shared, state, tokens, results[2])


def _scan_kept_backward(body, plan, residuals, cotangents):
  d_end, d_outputs, _ = cotangents  # no gradient reaches what is kept
  return _pull_back(body, plan, *residuals, d_end, d_outputs)


_scan_kept.defvjp(_scan_kept_forward, _scan_kept_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pull_back(body, plan, shared, state, tokens, kept, d_end, d_outputs):
  """Returns the gradients of `shared`, `state` and `tokens`."""
  del state  # the first that is kept
  return _backward(body, plan, shared, tokens, kept, d_end, d_outputs)


def _pull_back_forward(body, plan, *arrays):
  return _pull_back(body, plan, *arrays), arrays


def _pull_back_backward(body, plan, arrays, cotangents):
  """Differentiates the backward pass of `scan_plain`."""
  del plan
  shared, state, tokens, kept, d_end, d_outputs = arrays

  def plain(shared, state, tokens, d_end, d_outputs):
    scan = functools.partial(scan_plain, body)
    return jax.vjp(scan, shared, state, tokens)[1]((d_end, d_outputs))

  _, pull = jax.vjp(plain, shared, state, tokens, d_end, d_outputs)
  d_shared, d_state, d_tokens, dd_end, dd_outputs = pull(cotangents)
  no_kept = jax.tree.map(jnp.zeros_like, kept)
  return d_shared, d_state, d_tokens, no_kept, dd_end, dd_outputs


_pull_back.defvjp(_pull_back_forward, _pull_back_backward)


def _forward(body, plan, shared, state, tokens, *, keep):
  chunks = jax.tree.leaves(tokens)[0].shape[2]
  _, outputs = jax.eval_shape(
    functools.partial(scan_plain, body), shared, state, tokens
  )
  kept = _like(state, chunks // plan.every) if keep else None
  run = _call(
    functools.partial(_forward_kernel, body, plan),
    plan,
    inputs=((shared, _BY_ROW), (state, _BY_ROW), (tokens, _BY_CHUNK)),
    outputs=((state, _BY_ROW), (outputs, _BY_CHUNK), (kept, _BY_GROUP)),
    scratch=[_scratch(state, plan.heads)],
    cost=fused_plan.cost(body, shared, state, tokens),
  )
  return run(shared, state, tokens)


def _forward_kernel(body, plan, inputs, outputs, scratch):
  (shared, start, tokens), (end, read, kept) = inputs, outputs
  (state,) = scratch
  run = jax.vmap(body)
  group, last = pl.program_id(2), pl.num_programs(2) - 1
  pl.when(group == 0)(lambda: _store(state, _load(start)))
  if kept is not None:
    _store(kept, _load(state))
  weights = _load(shared)

  def step(i, _):
    after, out = run(weights, _load(state), _load(tokens, i))
    _store(read, out, i)
    _store(state, after)

  _repeat(plan.every, step)
  pl.when(group == last)(lambda: _store(end, _load(state)))


def _backward(body, plan, shared, tokens, kept, d_end, d_outputs):
  state = jax.tree.map(lambda x: x[:, :, 0], kept)
  cost = fused_plan.cost(body, shared, state, tokens, gradient=True)
  run = _call(
    functools.partial(_backward_kernel, body, plan),
    plan,
    inputs=(
      (shared, _BY_ROW),
      (tokens, _BY_CHUNK),
      (kept, _BY_GROUP),
      (d_end, _BY_ROW),
      (d_outputs, _BY_CHUNK),
    ),
    outputs=((shared, _BY_ROW), (state, _BY_ROW), (tokens, _BY_CHUNK)),
    scratch=[
      _scratch(state, plan.every, plan.heads),
      _scratch(state, plan.heads),
    ],
    cost=cost,
    reverse=True,
  )
  return run(shared, tokens, kept, d_end, d_outputs)


def _backward_kernel(body, plan, inputs, outputs, scratch):
  shared, tokens, kept, d_end, d_outputs = inputs
  (d_shared, d_start, d_tokens), (states, d_state) = outputs, scratch
  run = jax.vmap(body)
  group, last = pl.program_id(2), pl.num_programs(2) - 1

  @pl.when(group == 0)
  def _():
    _store(d_state, _load(d_end))
    _store(d_shared, jax.tree.map(jnp.zeros_like, _load(shared)))

  weights = _load(shared)
  _store(states, _load(kept), 0, axis=0)

  def recompute(i, _):
    after, _ = run(weights, _load(states, i, axis=0), _load(tokens, i))
    _store(states, after, i + 1, axis=0)

  if plan.every > 1:
    _repeat(plan.every - 1, recompute)

  def step(i, _):
    i = plan.every - 1 - i
    state = _load(states, i, axis=0)
    _, pull = jax.vjp(run, weights, state, _load(tokens, i))
    grads = pull((_load(d_state), _load(d_outputs, i)))
    _store(d_shared, jax.tree.map(jnp.add, _load(d_shared), grads[0]))
    _store(d_state, grads[1])
    _store(d_tokens, grads[2], i)

  _repeat(plan.every, step)
  pl.when(group == last)(lambda: _store(d_start, _load(d_state)))


def _repeat(times, step):
  if times == 1:
    step(0, None)
  else:
    jax.lax.fori_loop(0, times, step, None)


def _load(refs: Any, at: Any = None, *, axis: int = 1) -> Any:
  """Reads a tree of references, whole or chunk `at` of an axis."""
  return jax.tree.map(lambda ref: ref[_index(at, axis)], refs)


def _store(refs: Any, values: Any, at: Any = None, *, axis: int = 1) -> None:
  def store(ref, value):
    ref[_index(at, axis)] = value

  jax.tree.map(store, refs, values)


def _index(at, axis):
  return ... if at is None else (slice(None),) * axis + (at,)


# The part of an array that a program sees: the same block for all chunks of a
# row, some chunks, or the first state of these.
_BY_ROW, _BY_CHUNK, _BY_GROUP = 'row', 'chunk', 'group'


def _call(kernel, plan, *, inputs, outputs, scratch, cost, reverse=False):
  """Makes the call of a kernel on all devices.

  Args:
    kernel: `kernel(inputs, outputs, scratch)`, trees of references.
    plan: The plan.
    inputs: Pairs of a tree and how its blocks go with the chunks.
    outputs: The same for the results.
    scratch: Trees of `pltpu.VMEM`.
    cost: The `pl.CostEstimate` of all devices together.
    reverse: Whether programs go from the last chunk to the first.

  Returns:
    A function from the inputs' trees to the outputs' trees.
  """
  trees, ways = zip(*inputs, strict=True)
  out_trees, out_ways = zip(*outputs, strict=True)
  rows, heads = jax.tree.leaves(trees[0] or trees[1])[0].shape[:2]
  axes = fused_plan.mesh_axes(rows, heads)
  shards = fused_plan.num_row_shards(rows) * fused_plan.num_head_shards(heads)
  rows, heads = (
    rows // fused_plan.num_row_shards(rows),
    heads // fused_plan.num_head_shards(heads),
  )
  chunks = next(
    x.shape[2]
    for tree, way in inputs
    if way == _BY_CHUNK
    for x in jax.tree.leaves(tree)
  )
  groups = chunks // plan.every
  block = functools.partial(_block, plan, groups if reverse else None)
  specs = lambda trees, ways: [
    block(x, way)
    for tree, way in zip(trees, ways, strict=True)
    for x in jax.tree.leaves(tree)
  ]
  results, treedef = jax.tree.flatten(out_trees)
  local = [
    jax.ShapeDtypeStruct((rows, heads, *x.shape[2:]), x.dtype) for x in results
  ]
  scratch, scratch_tree = jax.tree.flatten(scratch)
  in_tree = jax.tree.structure(trees)

  def flat(*refs):
    cuts = in_tree.num_leaves, in_tree.num_leaves + treedef.num_leaves
    kernel(
      jax.tree.unflatten(in_tree, refs[: cuts[0]]),
      jax.tree.unflatten(treedef, refs[cuts[0] : cuts[1]]),
      jax.tree.unflatten(scratch_tree, refs[cuts[1] :]),
    )

  call = pl.pallas_call(
    flat,
    grid=(rows, heads // plan.heads, groups),
    in_specs=specs(trees, ways),
    out_specs=specs(out_trees, out_ways),
    out_shape=local,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=plan.vmem_bytes,
    ),
    cost_estimate=pl.CostEstimate(*(n // shards for n in cost)),
    interpret=plan.interpret,
  )
  if _num_devices() > 1:  # the compiler cannot divide a kernel
    call = jax.shard_map(call, in_specs=axes, out_specs=axes, check_vma=False)

  def run(*trees):
    return jax.tree.unflatten(treedef, call(*jax.tree.leaves(trees)))

  return run


def _block(plan, groups, x, way) -> pl.BlockSpec:
  """Returns the block of an array; from the last group if `groups` is set."""
  at = (lambda m: m) if groups is None else (lambda m: groups - 1 - m)
  if way == _BY_ROW:
    rest = x.shape[2:]
    index = lambda b, h, m: (b, h, *[0] * len(rest))
    return pl.BlockSpec((None, plan.heads, *rest), index)
  rest = x.shape[3:]
  index = lambda b, h, m: (b, h, at(m), *[0] * len(rest))
  some = plan.every if way == _BY_CHUNK else None
  return pl.BlockSpec((None, plan.heads, some, *rest), index)


def _scratch(state, *lead):
  return jax.tree.map(
    lambda x: pltpu.VMEM((*lead, *x.shape[2:]), x.dtype), state
  )


def _like(state, groups):
  """Returns the shapes of the states that are kept, [b, h, groups, ...]."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (*x.shape[:2], groups, *x.shape[2:]), x.dtype
    ),
    state,
  )


def _num_devices() -> int:
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.size
