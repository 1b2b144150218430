"""Follows parameters through a traced function to their products with data.

An interpreter evaluates the jaxpr of a loss, through jit, scan, remat and cond,
and hands every contraction or convolution of a parameter with data to a
callback. `capture.py` finds the linear maps of a model with it, and replaces
them.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp

# Operations that return all of a parameter, in another shape or type.
_LAYOUT = frozenset({
  'broadcast_in_dim', 'convert_element_type', 'copy', 'copy_p', 'expand_dims',
  'optimization_barrier', 'reduce_precision', 'reshape', 'reshard',
  'sharding_constraint', 'squeeze', 'transpose',
})  # fmt: skip
# Of these, the ones that leave every entry in its place.
_IN_PLACE = frozenset({
  'convert_element_type', 'copy', 'copy_p', 'optimization_barrier',
  'reduce_precision', 'reshard', 'sharding_constraint',
})  # fmt: skip
# Operations that return parts of a parameter.
_PARTS = frozenset({'rev', 'slice', 'split', 'unstack'})


@dataclasses.dataclass(frozen=True)
class Origin:
  """The parameters whose entries make up a value, inside a traced function.

  Attributes:
    leaves: Indices of the parameters among the leaves.
    whole: Whether the value is all of one parameter, or, inside a scan, all of
      one layer of it.
    depth: Number of leading axes that scans have consumed (stacked layers).
    repeats: Number of times that the enclosing scans use the value unchanged.
    in_place: Whether the leading axis is the parameter's own.
    twin: For parameters used in parts, an array of zeros in the shape of the
      value. Its gradient is the energy of the inputs, entry by entry.
  """

  leaves: tuple[int, ...]
  whole: bool = True
  depth: int = 0
  repeats: int = 1
  in_place: bool = True
  twin: jax.Array | None = None


class Interpreter:
  """Evaluates a traced function with its linear maps replaced.

  Args:
    linear: Function of (bind, eqn, inputs, source, weights, probes) that
      evaluates a product of a parameter with data; `weights` is the
      parameter's place among the inputs.
    lose: Function of (origin, name of an operation), called where a parameter
      enters an operation that is not understood.
  """

  def __init__(self, linear: Callable[..., Any], lose: Callable[..., None]):
    self._linear = linear
    self._lose = lose

  def run(self, jaxpr, consts, arguments, origins, probes) -> list[Any]:
    """Evaluates a jaxpr.

    Args:
      jaxpr: An open jaxpr.
      consts: Values of its constants.
      arguments: Values of its inputs.
      origins: For each input, its `Origin`, or None.
      probes: By leaf, the array whose gradient is the energy of its inputs.

    Returns:
      Values of the outputs.
    """
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    known = dict(zip(jaxpr.invars, origins, strict=True))

    def read(var):
      return var.val if isinstance(var, core.Literal) else values[var]

    def origin(var):
      return None if isinstance(var, core.Literal) else known.get(var)

    # As `jax.core.eval_jaxpr` does, with the origins beside the values.
    for eqn in jaxpr.eqns:
      inputs = [read(var) for var in eqn.invars]
      sources = [origin(var) for var in eqn.invars]
      outputs = self._evaluate(eqn, inputs, sources, probes)
      values.update(zip(eqn.outvars, outputs, strict=True))
      if any(sources):
        known.update(zip(eqn.outvars, _follow(eqn, sources), strict=True))
    return [read(var) for var in jaxpr.outvars]

  def _evaluate(self, eqn, inputs, sources, probes) -> list[Any]:
    name = eqn.primitive.name
    bind = _binder(eqn)
    weights = _find_weights(eqn, sources)
    if weights is not None:
      source = sources[weights]
      return [self._linear(bind, eqn, inputs, source, weights, probes)]
    if any(sources):
      if name in ('jit', 'pjit'):
        # Inlined: the caller compiles the whole function anyway.
        closed = eqn.params['jaxpr']
        return self.run(closed.jaxpr, closed.consts, inputs, sources, probes)
      if name in ('checkpoint', 'remat', 'remat2'):
        body = lambda *args: self.run(
          eqn.params['jaxpr'], (), args, sources, probes
        )
        return jax.checkpoint(
          body,
          prevent_cse=eqn.params['prevent_cse'],
          policy=eqn.params['policy'],
        )(*inputs)
      if name == 'cond':
        branches = [
          lambda *args, c=closed: self.run(
            c.jaxpr, c.consts, args, sources[1:], probes
          )
          for closed in eqn.params['branches']
        ]
        # Input 0 is the index of the branch.
        return jax.lax.switch(inputs[0], branches, *inputs[1:])
      if name == 'scan':
        return self._scan(eqn, inputs, sources, probes)
      if not any(_follow(eqn, sources)):
        for source, var in zip(sources, eqn.invars, strict=True):
          if source is not None and not _makes_data(eqn, var):
            self._lose(source, name)
    outputs = bind(*inputs)
    return outputs if eqn.primitive.multiple_results else [outputs]

  def _scan(self, eqn, inputs, sources, probes) -> list[Any]:
    closed, length = eqn.params['jaxpr'], eqn.params['length']
    num_consts, num_carry = eqn.params['num_consts'], eqn.params['num_carry']
    start = num_consts + num_carry
    inner, sliced_probes, sliced_twins = [None] * len(sources), {}, {}
    for i, source in enumerate(sources):
      if source is None:
        continue
      if i < num_consts:
        repeats = source.repeats * length
        inner[i] = dataclasses.replace(source, repeats=repeats)
      elif i < start:  # May change from turn to turn.
        self._lose(source, 'the carry of a scan')
      else:
        inner[i] = dataclasses.replace(
          source,
          depth=source.depth + 1,
          whole=source.whole and source.in_place,
        )
        if source.twin is not None:
          sliced_twins[i] = source.twin
        # Stacked layers have an energy each: slice the probes with them.
        for leaf in source.leaves:
          if leaf in probes:
            sliced_probes[leaf] = probes[leaf]
    # Constants are closed over; so are the probes and twins of parameters that
    # every turn uses whole, whose gradients then sum over the turns.
    consts = inputs[:num_consts]

    def body(carry, slices):
      xs, layer_probes, twins = slices
      origins = list(inner)
      for i, twin in twins.items():
        origins[i] = dataclasses.replace(origins[i], twin=twin)
      outputs = self.run(
        closed.jaxpr,
        closed.consts,
        [*consts, *carry, *xs],
        origins,
        {**probes, **layer_probes},
      )
      return outputs[:num_carry], outputs[num_carry:]

    carry, ys = jax.lax.scan(
      body,
      inputs[num_consts:start],
      (inputs[start:], sliced_probes, sliced_twins),
      length=length,
      reverse=eqn.params['reverse'],
      unroll=eqn.params['unroll'],
    )
    return [*carry, *ys]


def _binder(eqn) -> Callable[..., Any]:
  return functools.partial(
    eqn.primitive.bind, **eqn.primitive.get_bind_params(eqn.params)
  )


def _find_weights(eqn, sources) -> int | None:
  """Returns which input of a product is a parameter, if the other is data."""
  match eqn.primitive.name:
    case 'dot_general':
      if (sources[0] is None) != (sources[1] is None):
        return 0 if sources[0] is not None else 1
    case 'conv_general_dilated':
      # Batch groups occur in gradients of convolutions alone.
      if sources[0] is None and eqn.params['batch_group_count'] == 1:
        return 1 if sources[1] is not None else None
  return None


def _makes_data(eqn, var) -> bool:
  """Returns whether an operation turns an input, a parameter, into data.

  A lookup of rows does, as in an embedding, and a broadcast over samples, as of
  a bias or a scale. A lookup of whole matrices does not.
  """
  match eqn.primitive.name:
    case 'gather':
      return sum(size > 1 for size in eqn.params['slice_sizes']) < 2
    case 'broadcast_in_dim':
      return True
    case 'add' | 'sub' | 'mul' | 'div':  # broadcast axes of size 1 themselves
      return var.aval.size != eqn.outvars[0].aval.size
  return False


def _follow(eqn, sources) -> list[Origin | None]:
  """Returns the origins of the outputs of an operation."""
  name, nothing = eqn.primitive.name, [None] * len(eqn.outvars)
  if name in ('concatenate', 'stack') and all(sources):
    return [_join(eqn, sources)]
  if name == 'optimization_barrier':
    return list(sources)
  source = sources[0]
  if source is None or any(sources[1:]):
    return nothing
  if name in _LAYOUT:
    # A broadcast that repeats entries: no longer the parameter's own layout.
    if eqn.outvars[0].aval.size != eqn.invars[0].aval.size:
      return nothing
    in_place = source.in_place and name in _IN_PLACE
    changed = dataclasses.replace(source, in_place=in_place)
  elif name in _PARTS:
    changed = dataclasses.replace(source, whole=False, in_place=False)
  else:
    return nothing
  if source.twin is None or name in _IN_PLACE:
    return [changed] * len(nothing)
  twins = _binder(eqn)(source.twin)
  twins = twins if eqn.primitive.multiple_results else [twins]
  return [dataclasses.replace(changed, twin=twin) for twin in twins]


def _join(eqn, sources) -> Origin:
  """Returns the origin of parameters that are concatenated."""
  twins = [source.twin for source in sources]
  joined = None
  if all(twin is not None for twin in twins):
    # Parameters of several types were cast to one; their twins may differ.
    dtype = jnp.result_type(*twins)
    joined = _binder(eqn)(*(twin.astype(dtype) for twin in twins))
  return Origin(
    leaves=tuple(leaf for source in sources for leaf in source.leaves),
    whole=False,
    depth=sources[0].depth,
    repeats=max(source.repeats for source in sources),
    in_place=False,
    twin=joined,
  )


@dataclasses.dataclass(frozen=True)
class Maps:
  """The result of looking for linear maps in a loss.

  Attributes:
    depths: By leaf that is a map, the number of its leading axes that count
      stacked layers; None if it is used in parts.
    lost: By leaf that is none but might be, the operations that it enters.
  """

  depths: Mapping[int, int | None]
  lost: Mapping[int, frozenset[str]]


def find(jaxpr, consts, leaves) -> Maps:
  """Finds the leaves that act as linear maps.

  Args:
    jaxpr: An open jaxpr whose first inputs are the leaves.
    consts: Values of its constants.
    leaves: The parameters, or their shapes.

  Returns:
    The maps, and the matrices that could not be followed.
  """
  depths, lost = {}, {}

  def record(bind, eqn, inputs, source, weights, probes):
    del eqn, weights, probes
    for leaf in source.leaves:
      depth = source.depth if source.whole else None
      depths.setdefault(leaf, set()).add(depth)
    return bind(*inputs)

  def lose(source, name):
    for leaf in source.leaves:
      if leaves[leaf].ndim - source.depth >= 2:
        lost.setdefault(leaf, set()).add(name)

  def walk(*arguments):
    origins = [Origin((i,)) for i in range(len(leaves))]
    origins += [None] * (len(arguments) - len(leaves))
    interpreter = Interpreter(record, lose)
    return interpreter.run(jaxpr, consts, arguments, origins, {})

  # Abstractly, so that looking costs no computation.
  jax.eval_shape(walk, *(var.aval for var in jaxpr.invars))
  return Maps(
    # A parameter stacked in one place and whole in another counts by entry.
    {leaf: d.pop() if len(d) == 1 else None for leaf, d in depths.items()},
    {k: frozenset(v) for k, v in lost.items() if k not in depths},
  )
