"""One chunk of one head for a kernel: equal to the body of the chunk scan.

Everything is computed by the functions of the chunk scan, in forms that the
compiler of kernels knows: the arrays of a head have two axes, roles come one
after the other, and sums of masked squares stand for sums along a column and
for transposes. Numbers per token travel as rows: a column would fill one of
128 lanes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import chunked
from nested_learning.memory import decays as decays_lib
from nested_learning.memory import networks
from nested_learning.memory import rule as rules
from nested_learning.memory import writes

_SMALLEST = 1e-12  # as in `decays.py`


class Packing(NamedTuple):
  """A tree of arrays [..., c, width] as wide ones, and rows of numbers.

  Attributes:
    structure: Structure of the tree.
    is_wide: Per leaf, whether its width is above 1.
  """

  structure: Any
  is_wide: tuple[bool, ...]

  def pack(self, leaves: list[jax.Array], to_row: Any) -> Any:
    """Returns 'wide' [..., c, width] and 'rows' [..., number, c]."""
    wide, columns = [], []
    for x, is_wide in zip(leaves, self.is_wide, strict=True):
      (wide if is_wide else columns).append(x)
    rows = [to_row(x) for x in columns]
    return {
      'wide': wide,
      'rows': jnp.concatenate(rows, axis=-2) if rows else None,
    }

  def unpack(self, packed: Any, to_column: Any) -> Any:
    """Returns the tree."""
    wide, number, leaves = iter(packed['wide']), 0, []
    for is_wide in self.is_wide:
      if is_wide:
        leaves.append(next(wide))
        continue
      leaves.append(to_column(packed['rows'][..., number : number + 1, :]))
      number += 1
    return jax.tree.unflatten(self.structure, leaves)


def make_packing(tree: Any) -> Packing:
  """Makes the `Packing` of a tree of arrays or shapes [..., c, width]."""
  leaves, structure = jax.tree.flatten(tree)
  return Packing(structure, tuple(x.shape[-1] > 1 for x in leaves))


class Marks(NamedTuple):
  """Borders of documents and empty slots of a chunk, as numbers [c, 1].

  Attributes:
    document: Borders of documents up to a token, itself included; None without
      borders.
    present: 1 for a token, 0 for an empty slot; None where all are filled, with
      the next two.
    starts: 1 if the first of these tokens starts the chunk.
    ends: 1 if the last of them ends it.
  """

  document: jax.Array | None = None
  present: jax.Array | None = None
  starts: jax.Array | None = None
  ends: jax.Array | None = None


def solve(
  network: networks.Network,
  rule: rules.Rule,
  project: rules.Project,
  shared: Mapping[str, Any],
  state: Mapping[str, Any],
  inputs: Any,
  marks: Marks,
) -> tuple[dict[str, Any], rules.Result]:
  """Reads and writes one chunk of one head.

  Args:
    network: The memory's network.
    rule: How it is written and read.
    project: Makes the `WriteInputs`, for arrays without rows and heads.
    shared: 'fixed' maps, which no token writes, and 'initial' maps, each
      [..., out, in].
    state: 'memory' and, where slots may be empty, 'anchor' of the other maps.
    inputs: A pytree of [c, width].
    marks: The marks of the slots.

  Returns:
    The state after the chunk, and the `Result`, [c, width] each.
  """
  initial, fixed = shared['initial'], shared['fixed']
  memory = {**fixed, **state['memory']}
  anchor = memory
  if marks.starts is not None:
    starts = marks.starts[:1] > 0.5  # [1, 1]
    anchor = fixed | _where(starts, state['memory'], state['anchor'])
  fresh = None if marks.document is None else marks.document > 0.5
  errors = writes.evaluate(network, rule, anchor, inputs, project)
  if fresh is not None:
    initially = writes.evaluate(network, rule, initial, inputs, project)
    errors = _where(fresh, initially, errors)
  write = None if marks.present is None else marks.present > 0.5
  rates = writes.token_rates(errors.token, write)
  decays = _make_decays(rates, marks.document, rule.erase_from)
  solved = {
    name: _solve_map(
      rule, name, memory[name], initial, errors, rates, decays, marks
    )
    for name in state['memory']
  }
  linear = _make_linear(solved, fixed)
  read = errors.read
  if rule.read == 'token':
    read = writes.read_vector(network, linear, errors.token.query)
  after = _end_chunk(rule, initial, anchor, solved, marks)
  return after, writes.result(rule, read, errors.token)


def _solve_map(rule, name, weights, initial, errors, rates, decays, marks):
  """Solves a chunk of a map: one `chunked.Solved` per role."""
  erase = writes.erases(rule, name, initial)

  def solve_role(weights, initial, x, delta, read):
    own = rates
    if erase and name != 'in':
      own = writes.normalized(rates, x)
    keys = chunked.make_keys(x, own, decays, erase=erase, small=x.shape[0])
    return chunked.solve_chunk(
      rules.Carry(weights),
      writes.reference(rule, initial),
      initial,
      keys,
      delta,
      own,
      # The anchor is the memory where all slots are filled.
      read=read if marks.present is None else None,
    )

  arrays = (
    weights,
    initial[name],
    errors.inputs[name],
    errors.deltas[name],
    errors.outputs[name],
  )
  if name == 'in':
    return [solve_role(*arrays)]
  return [
    solve_role(*(x[role] for x in arrays)) for role in range(weights.shape[0])
  ]


def _make_linear(solved, fixed) -> networks.Linear:
  """Makes the `linear` that applies each token's own weights."""

  def linear(name, x):
    if name in fixed:
      return networks.apply_map(fixed[name], x)
    if name == 'in':
      return chunked.read_chunk(solved[name][0], x)
    roles = enumerate(solved[name])
    return jnp.stack([chunked.read_chunk(one, x[i]) for i, one in roles])

  return linear


def _end_chunk(rule, initial, anchor, solved, marks):
  """Returns the state after the last token."""
  ended = {}
  for name, roles in solved.items():
    weights = [_end_map(one) for one in roles]
    ended[name] = weights[0] if name == 'in' else jnp.stack(weights)
  select = lambda maps: {name: maps[name] for name in ended}
  bounded, _ = writes.bound(rule, select(initial), ended, None)
  if marks.ends is None:
    return {'memory': bounded}
  memory = ended
  if rule.max_norm is not None:
    memory = _where(marks.ends[:1] > 0.5, bounded, ended)
  anchor = select(anchor)
  if marks.document is not None:
    anchor = _where(marks.document[-1:] > 0.5, select(initial), anchor)
  return {'memory': memory, 'anchor': anchor}


def _end_map(chunk: chunked.Solved) -> jax.Array:
  """Returns the weights of a map after the last token, [out, in]."""
  decays = chunk.keys.decays
  weights = chunk.carry.weights
  if decays.fresh is not None:
    weights = jnp.where(decays.fresh[-1:], chunk.initial, weights)
  kept = decays.kept[-1:]
  weights = kept * weights
  if chunk.reference is not None:
    weights = weights + (1.0 - kept) * chunk.reference
  rows = to_column(decays.between[-1:]) * chunk.written
  return weights + jnp.einsum('to,ti->oi', rows, chunk.keys.x)


def _make_decays(rates, document, erase_from) -> decays_lib.Decays:
  """Computes a chunk's `Decays`, as `decays.make_decays` does."""
  retention = rates.masked().retention  # [c, 1]
  row, column = _square(retention.shape[0])
  same = column <= row
  fresh = None
  if document is not None:
    same = same & (jnp.abs(document - to_row(document)) < 0.5)
    fresh = document > 0.5
  strictly = same & (column < row)
  log = jnp.log(jnp.maximum(retention, _SMALLEST))
  # Sums within a document, exact to the last digit.
  total = jnp.sum(jnp.where(same, to_row(log), 0.0), axis=1, keepdims=True)
  by_row = to_row(total)
  ratio = lambda pairs, x: jnp.exp(jnp.where(pairs, x - by_row, -jnp.inf))
  before = total if erase_from == 'retained' else total - log
  return decays_lib.Decays(
    kept=jnp.exp(total),
    kept_before=jnp.exp(before),
    between=ratio(same, total),
    between_before=ratio(strictly, before),
    fresh=fresh,
    trace=None,
  )


def to_row(column: jax.Array) -> jax.Array:
  """Transposes a column [c, 1] by a masked sum."""
  row, other = _square(column.shape[0])
  return jnp.sum(jnp.where(row == other, column, 0.0), axis=0, keepdims=True)


def to_column(row: jax.Array) -> jax.Array:
  """Transposes a row [1, c] by a masked sum."""
  other, column = _square(row.shape[1])
  return jnp.sum(jnp.where(other == column, row, 0.0), axis=1, keepdims=True)


def _square(size):
  """Returns the numbers of rows and columns, int32 [size, size]."""
  return (
    jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)
  )


def _where(condition: jax.Array, yes: Any, no: Any) -> Any:
  """Selects among two trees by a condition [c, 1] or [1, 1]."""

  def select(a, b):
    # Inputs that are handed on stay the same arrays.
    return b if a is b or not a.size else jnp.where(condition, a, b)

  return jax.tree.map(select, yes, no)
