"""Origins of the values inside a traced function.

An `Origin` says which parameters make up a value. An operation passes it on
exactly, if its output still consists of entries of the parameters (`follow`),
or loosely, if rows and columns are still those of the parameters
(`follow_loosely`): scaled, masked or broadcast weights, sums of weights.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nested_learning.optimizers.tracing import layouts as layouts_lib

# Operations that return all of a parameter, in another shape or type.
_LAYOUT = frozenset({
  'broadcast_in_dim', 'convert_element_type', 'copy', 'copy_p',
  'optimization_barrier', 'reduce_precision', 'reshape', 'reshard',
  'sharding_constraint', 'squeeze', 'transpose', *layouts_lib.MANUAL_CASTS,
})  # fmt: skip
# Of these, the ones that leave every entry in its place.
_IN_PLACE = frozenset({
  'convert_element_type', 'copy', 'copy_p', 'optimization_barrier',
  'reduce_precision', 'reshard', 'sharding_constraint',
  *layouts_lib.MANUAL_CASTS,
})  # fmt: skip
# Operations that return parts of a parameter.
_PARTS = frozenset({'rev', 'slice', 'split', 'unstack'})
# Operations on every entry by itself.
_ELEMENTWISE = frozenset({
  'abs', 'add', 'add_any', 'atan2', 'clamp', 'cos', 'div', 'erf', 'exp', 'exp2',
  'expm1', 'floor', 'integer_pow', 'log', 'log1p', 'logistic', 'max', 'min',
  'mul', 'neg', 'pow', 'round', 'rsqrt', 'select_n', 'sign', 'sin', 'sqrt',
  'square', 'stop_gradient', 'sub', 'tanh',
})  # fmt: skip
# Of these, the ones that scale or mask weights by data.
_MASKS = frozenset({'div', 'mul', 'select_n'})


@dataclasses.dataclass(frozen=True)
class Origin:
  """The parameters whose entries make up a value, inside a traced function.

  Attributes:
    leaves: Indices of the parameters among the leaves. None at all: the value
      is computed from parameters and constants, and from no data.
    whole: Whether the value is all of one parameter, or, inside a scan, all of
      one layer of it.
    depth: Number of leading axes that scans have consumed (stacked layers).
    repeats: Number of times that the enclosing scans use the value unchanged.
    in_place: Whether the leading axis is the parameter's own.
    twin: For parameters used in parts, an array of zeros in the shape of the
      value. Its gradient is the energy of the inputs, entry by entry.
    layouts: For each of the leaves, which of its axes make up the value's.
    exact: Whether every entry of the value is an entry of a parameter.
    has_data: Whether data scaled, masked or chose the entries.
  """

  leaves: tuple[int, ...]
  whole: bool = True
  depth: int = 0
  repeats: int = 1
  in_place: bool = True
  twin: jax.Array | None = None
  layouts: tuple[layouts_lib.Layout, ...] = ()
  exact: bool = True
  has_data: bool = False


CONSTANT = Origin((), exact=False)


def initial(leaf: int, shape, twin: jax.Array | None = None) -> Origin:
  """Returns the origin of a parameter itself."""
  if 0 in shape:
    return CONSTANT
  return Origin((leaf,), layouts=(layouts_lib.initial(shape),), twin=twin)


def exactly(source: Origin | None) -> Origin | None:
  """Returns the origin if it is exact, else None."""
  return source if source is not None and source.exact else None


def loosely(source: Origin | None) -> Origin | None:
  """Returns the origin without the claim that it is exact."""
  if source is None:
    return None
  return Origin(
    source.leaves,
    layouts=source.layouts,
    exact=False,
    has_data=source.has_data,
  )


def either(sources) -> Origin | None:
  """Returns the origin of a value that has one of several origins."""
  if None in sources:
    return None
  return Origin(
    tuple(leaf for source in sources for leaf in source.leaves),
    layouts=tuple(part for source in sources for part in source.layouts),
    exact=False,
    has_data=any(source.has_data for source in sources),
  )


def unknown(eqn, sources) -> list[Origin | None]:
  """Returns origins of outputs that are data if any input is."""
  has_data = any(source is None or source.has_data for source in sources)
  return [None if has_data else CONSTANT] * len(eqn.outvars)


def stacked(source: Origin) -> Origin:
  """Returns the origin of one slice along the leading axis, inside a scan."""
  return dataclasses.replace(
    source,
    depth=source.depth + 1,
    whole=source.whole and source.in_place,
    layouts=tuple(layouts_lib.drop(part, (0,)) for part in source.layouts),
  )


def resized(source: Origin, shape) -> Origin:
  """Returns the origin of a part of a value, or of a padded one."""
  parts = tuple(layouts_lib.resize(part, shape) for part in source.layouts)
  return dataclasses.replace(source, layouts=parts)


def makes_data(eqn, var) -> bool:
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


def only_moves(eqn) -> bool:
  """Returns whether a function with its own gradient returns its input.

  It may change types and shardings, as one does that gathers a sharded
  parameter and scatters its gradient.
  """
  if not eqn.primitive.name.startswith('custom_vjp_call'):
    return False
  body = eqn.params['call_jaxpr'].jaxpr
  return (
    len(body.invars) == len(body.outvars) == 1
    and len(eqn.invars) == 1
    and all(inner.primitive.name in _IN_PLACE for inner in body.eqns)
  )


def follow(eqn, sources) -> list[Origin | None]:
  """Returns the origins of the outputs of an operation, where they are exact.

  Args:
    eqn: An equation of a jaxpr.
    sources: For each input, its origin if it is exact, else None.

  Returns:
    For each output, its origin or None.
  """
  name, nothing = eqn.primitive.name, [None] * len(eqn.outvars)
  if name in ('concatenate', 'stack') and all(sources):
    return [_join(eqn, sources)]
  if name == 'optimization_barrier' or only_moves(eqn):
    return list(sources)
  source = sources[0] if sources else None
  if source is None or any(sources[1:]) or 0 in eqn.outvars[0].aval.shape:
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
  twins = [source.twin] * len(nothing)
  if source.twin is not None and name not in _IN_PLACE:
    twins = binder(eqn)(source.twin)
    twins = twins if eqn.primitive.multiple_results else [twins]
  moved = [layouts_lib.follow(eqn, part) for part in source.layouts]
  return [
    dataclasses.replace(changed, twin=twin, layouts=tuple(layouts))
    for twin, *layouts in zip(twins, *moved, strict=True)
  ]


def follow_loosely(eqn, sources) -> list[Origin | None]:
  """Returns the origins of the outputs of an operation, exact or not.

  Args:
    eqn: An equation of a jaxpr.
    sources: For each input, its origin; None if it is data.

  Returns:
    For each output, its origin; None if it is data.
  """
  name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
  other = unknown(eqn, sources)
  if not any(source and source.leaves for source in sources) or 0 in shape:
    return other
  if name == 'optimization_barrier':
    return [loosely(source) for source in sources]
  if name in ('concatenate', 'stack') and None not in sources:
    return [loosely(_join(eqn, sources))]
  if name in _ELEMENTWISE and len(other) == 1:
    return [_combine(eqn, sources)]
  if sources[0] and sources[0].leaves:
    # Further inputs, if any, are indices.
    source = dataclasses.replace(loosely(sources[0]), has_data=other[0] is None)
    moved = [layouts_lib.follow(eqn, part) for part in source.layouts]
    if None not in moved:
      return [
        dataclasses.replace(source, layouts=layouts)
        for layouts in zip(*moved, strict=True)
      ]
  return other


def _combine(eqn, sources) -> Origin | None:
  """Returns the origin of the result of an elementwise operation."""
  name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
  has_data = None in sources
  leaves, layouts = [], []
  for source, var in zip(sources, eqn.invars, strict=True):
    if source is None or var.aval.shape != shape:
      continue
    for leaf, layout in zip(source.leaves, source.layouts, strict=True):
      # Data with rows of its own, scaled by a parameter, remains data.
      scales = name != 'select_n' and layouts_lib.is_broadcast(layout)
      if not (has_data and scales):
        leaves.append(leaf)
        layouts.append(layout)
  if has_data and (name not in _MASKS or not leaves):
    return None
  if not leaves:
    return unknown(eqn, sources)[0]
  has_data |= any(source is not None and source.has_data for source in sources)
  return Origin(
    tuple(leaves), layouts=tuple(layouts), exact=False, has_data=has_data
  )


def _join(eqn, sources) -> Origin:
  """Returns the origin of parameters that are concatenated."""
  twins = [source.twin for source in sources]
  joined = None
  if all(twin is not None for twin in twins):
    # Parameters of several types were cast to one; their twins may differ.
    dtype = jnp.result_type(*twins)
    joined = binder(eqn)(*(twin.astype(dtype) for twin in twins))
  return Origin(
    leaves=tuple(leaf for source in sources for leaf in source.leaves),
    whole=False,
    depth=sources[0].depth,
    repeats=max(source.repeats for source in sources),
    in_place=False,
    twin=joined,
    layouts=tuple(
      layout
      for source in sources
      for layout in layouts_lib.join(eqn, source.layouts)
    ),
    has_data=any(source.has_data for source in sources),
  )


def binder(eqn):
  """Returns a function that evaluates an equation."""
  return functools.partial(
    eqn.primitive.bind, **eqn.primitive.get_bind_params(eqn.params)
  )
