"""Follows parameters through a traced function to their products with data.

An interpreter walks through the jaxpr of a loss, through jit, scan, remat and
cond, with the origin of every value beside it. `find` looks for the linear maps
of a model, without any computation; `capture.py` replaces them.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.extend import core

from nested_learning.optimizers import layouts
from nested_learning.optimizers import origins as origins_lib

Origin = origins_lib.Origin

_PRODUCTS = ('conv_general_dilated', 'dot_general', 'ragged_dot_general')
_JITS = ('jit', 'pjit')
_REMATS = ('checkpoint', 'remat', 'remat2')


class Interpreter:
  """Evaluates a traced function with its linear maps replaced.

  Args:
    linear: Function of (bind, eqn, inputs, source, weights, probes) that
      evaluates a product of a parameter with data; `weights` is the
      parameter's place among the inputs.
  """

  literal = None  # The origin of a literal.

  def __init__(self, linear: Callable[..., Any]):
    self._linear = linear

  def run(
    self, jaxpr, consts, arguments, origins, probes
  ) -> tuple[list[Any], list[Origin | None]]:
    """Evaluates a jaxpr.

    Args:
      jaxpr: An open jaxpr.
      consts: Values of its constants.
      arguments: Values of its inputs.
      origins: For each input, its `Origin`, or None.
      probes: By leaf, the array whose gradient is the energy of its inputs.

    Returns:
      Values of the outputs, and their origins.
    """
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    known = dict(zip(jaxpr.invars, origins, strict=True))

    def read(var):
      return var.val if isinstance(var, core.Literal) else values[var]

    def origin(var):
      return self.literal if isinstance(var, core.Literal) else known.get(var)

    # As `jax.core.eval_jaxpr` does, with the origins beside the values.
    for eqn in jaxpr.eqns:
      inputs = [read(var) for var in eqn.invars]
      sources = [origin(var) for var in eqn.invars]
      outputs, followed = self._evaluate(eqn, inputs, sources, probes)
      values.update(zip(eqn.outvars, outputs, strict=True))
      known.update(zip(eqn.outvars, followed, strict=True))
    outputs = [read(var) for var in jaxpr.outvars]
    return outputs, [origin(var) for var in jaxpr.outvars]

  def _evaluate(self, eqn, inputs, sources, probes):
    name, nothing = eqn.primitive.name, [None] * len(eqn.outvars)
    bind = origins_lib.binder(eqn)
    weights = _find_weights(eqn, sources)
    if weights is not None:
      source = sources[weights]
      return [self._linear(bind, eqn, inputs, source, weights, probes)], nothing
    if any(sources):
      if name in _JITS:
        # Inlined: the caller compiles the whole function anyway.
        closed = eqn.params['jaxpr']
        return self.run(closed.jaxpr, closed.consts, inputs, sources, probes)
      if name in _REMATS:
        body = lambda *args: self.run(
          eqn.params['jaxpr'], (), args, sources, probes
        )[0]
        body = jax.checkpoint(
          body,
          prevent_cse=eqn.params['prevent_cse'],
          policy=eqn.params['policy'],
        )
        return body(*inputs), nothing
      if name == 'cond':
        branches = [
          lambda *args, c=closed: self.run(
            c.jaxpr, c.consts, args, sources[1:], probes
          )[0]
          for closed in eqn.params['branches']
        ]
        # Input 0 is the index of the branch.
        return jax.lax.switch(inputs[0], branches, *inputs[1:]), nothing
      if name == 'scan':
        return self._scan(eqn, inputs, sources, probes), nothing
    outputs = bind(*inputs)
    outputs = outputs if eqn.primitive.multiple_results else [outputs]
    return outputs, origins_lib.follow(eqn, sources)

  def _scan(self, eqn, inputs, sources, probes) -> list[Any]:
    closed, length = eqn.params['jaxpr'], eqn.params['length']
    num_consts, num_carry = eqn.params['num_consts'], eqn.params['num_carry']
    start = num_consts + num_carry
    inner = _enter_scan(eqn, sources)
    # Stacked layers have an energy each: slice the probes with them.
    sliced_probes = {
      leaf: probes[leaf]
      for source in sources[start:]
      if source is not None
      for leaf in source.leaves
      if leaf in probes
    }
    sliced_twins = {
      i: source.twin
      for i, source in enumerate(sources)
      if i >= start and source is not None and source.twin is not None
    }
    # Constants are closed over; so are the probes and twins of parameters that
    # every turn uses whole, whose gradients then sum over the turns.
    consts = inputs[:num_consts]

    def body(carry, slices):
      xs, layer_probes, twins = slices
      origins = list(inner)
      for i, twin in twins.items():
        origins[i] = dataclasses.replace(origins[i], twin=twin)
      outputs, _ = self.run(
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


class _Search(Interpreter):
  """Walks through a traced function, by shapes alone, and notes what it finds.

  Attributes:
    depths: By leaf that multiplies data as it is, the depths of its uses; None
      for a use in parts.
    lost: By leaf, the operations after which it is not followed exactly.
    uses: By leaf, its uses in products.
    ends: By leaf, the operations after which it is not followed at all.
  """

  literal = origins_lib.CONSTANT

  def __init__(self):
    self.depths, self.lost, self.uses, self.ends = {}, {}, {}, {}

  def look(self, jaxpr, sources) -> list[Origin | None]:
    """Walks through a jaxpr and returns the origins of its outputs."""
    shapes = [var.aval for var in jaxpr.invars]
    consts = [var.aval for var in jaxpr.constvars]
    return self.run(jaxpr, consts, shapes, sources, {})[1]

  def _evaluate(self, eqn, inputs, sources, probes):
    del inputs, probes
    shapes = [var.aval for var in eqn.outvars]
    exact = [origins_lib.exactly(source) for source in sources]
    weights = _find_weights(eqn, exact)
    if eqn.primitive.name in _PRODUCTS:
      self._note_uses(eqn, sources)
    if weights is not None:
      source = exact[weights]
      for leaf in source.leaves:
        depth = source.depth if source.whole else None
        self.depths.setdefault(leaf, set()).add(depth)
      return shapes, origins_lib.follow_loosely(eqn, sources)
    if any(source and source.leaves for source in sources):
      followed = self._enter(eqn, sources, exact)
      if followed is not None:
        return shapes, followed
    followed = origins_lib.follow(eqn, exact)
    if not any(followed):
      self._lose(eqn, exact)
      followed = origins_lib.follow_loosely(eqn, sources)
    if followed[0] is None:
      for source in sources:
        for leaf in source.leaves if source else ():
          self.ends.setdefault(leaf, set()).add(eqn.primitive.name)
    return shapes, followed

  def _enter(self, eqn, sources, exact) -> list[Origin | None] | None:
    """Walks through what an operation calls; None if it calls nothing."""
    name, params = eqn.primitive.name, eqn.params
    other = [None if None in sources else origins_lib.CONSTANT]
    other = other * len(eqn.outvars)
    if name in _JITS:
      return self.look(params['jaxpr'].jaxpr, sources)
    if name in _REMATS:
      followed = self.look(params['jaxpr'], sources)
      return [origins_lib.loosely(source) for source in followed]
    if name == 'cond':
      for closed in params['branches']:
        followed = self.look(closed.jaxpr, sources[1:])
      return [origins_lib.loosely(source) for source in followed]
    if name == 'scan':
      first = params['num_consts']
      last = first + params['num_carry']
      for source in exact[first:last]:  # May change from turn to turn.
        self._lose_source(source, 'the carry of a scan')
      carry = [
        origins_lib.loosely(source)
        if source and source.leaves
        else other[0]
        if other
        else None
        for source in sources[first:last]
      ]
      inner = _enter_scan(eqn, sources)
      inner[first:last] = carry
      self.look(params['jaxpr'].jaxpr, inner)
      return other
    inner = [origins_lib.loosely(source) for source in sources]
    if name == 'while':
      self._lose(eqn, exact)
      num = params['cond_nconsts']
      self.look(params['body_jaxpr'].jaxpr, inner[num:])
      return other
    body = params.get('call_jaxpr', params.get('jaxpr'))
    body = getattr(body, 'jaxpr', body)
    if body is None or len(body.invars) != len(inner):
      return None
    self._lose(eqn, exact)
    # A shard_map passes on parts of values.
    inner = [
      source
      and dataclasses.replace(
        source,
        layouts=tuple(
          layouts.resize(layout, var.aval.shape) for layout in source.layouts
        ),
      )
      for source, var in zip(inner, body.invars, strict=True)
    ]
    followed = self.look(body, inner)
    return other if name == 'shard_map' else followed

  def _note_uses(self, eqn, sources):
    """Notes the roles of the axes of parameters in a product."""
    for side, source in enumerate(sources[:2]):
      other = sources[1 - side]
      for leaf, layout in zip(
        source.leaves if source else (),
        source.layouts if source else (),
        strict=True,
      ):
        weak = False
        if other is not None:
          # With two weights, what was broadcast over samples counts as data.
          if layouts.is_broadcast(layout):
            continue
          weak = not any(map(layouts.is_broadcast, other.layouts))
        roles = layouts.roles(eqn, side, layout)
        if roles is not None:
          self.uses.setdefault(leaf, []).append(Use(roles, weak))

  def _lose(self, eqn, exact):
    for source, var in zip(exact, eqn.invars, strict=True):
      if source is not None and not origins_lib.makes_data(eqn, var):
        self._lose_source(source, eqn.primitive.name)

  def _lose_source(self, source, name):
    for leaf in source.leaves if source else ():
      self.lost.setdefault(leaf, {}).setdefault(name, source.depth)


def _enter_scan(eqn, sources) -> list[Origin | None]:
  """Returns the origins of the inputs of the body of a scan."""
  num_consts = eqn.params['num_consts']
  start = num_consts + eqn.params['num_carry']
  inner = [None] * len(sources)
  for i, source in enumerate(sources):
    if source is None:
      continue
    if i < num_consts:
      repeats = source.repeats * eqn.params['length']
      inner[i] = dataclasses.replace(source, repeats=repeats)
    elif i >= start:  # The carry in between may change from turn to turn.
      inner[i] = origins_lib.stacked(source)
  return inner


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


@dataclasses.dataclass(frozen=True)
class Use:
  """A product that a parameter enters.

  Attributes:
    roles: By axis of the parameter, its roles among 'reduction', 'output' and
      'batch'; axes of which one index was taken are missing.
    weak: Whether the other factor is made of parameters, too.
  """

  roles: Mapping[int, set[str]]
  weak: bool


@dataclasses.dataclass(frozen=True)
class Maps:
  """The result of looking for linear maps in a loss.

  Attributes:
    depths: By leaf whose inputs can be captured, the number of its leading axes
      that count stacked layers; None if it is used in parts.
    lost: By leaf that is none but might be, the operations that it enters.
    uses: By leaf, its uses in products with data or other parameters, whether
      their inputs can be captured or not.
    ends: By leaf, the operations with data that it enters otherwise.
  """

  depths: Mapping[int, int | None]
  lost: Mapping[int, frozenset[str]]
  uses: Mapping[int, list[Use]]
  ends: Mapping[int, set[str]]


def find(jaxpr, leaves) -> Maps:
  """Finds the leaves that act as linear maps.

  Args:
    jaxpr: An open jaxpr whose first inputs are the leaves.
    leaves: The parameters, or their shapes.

  Returns:
    The maps, and the matrices that could not be followed.
  """
  search = _Search()
  origins = [
    origins_lib.initial(leaf, var.aval.shape)
    for leaf, var in enumerate(jaxpr.invars[: len(leaves)])
  ]
  search.look(jaxpr, origins + [None] * (len(jaxpr.invars) - len(leaves)))
  lost = {
    leaf: frozenset(
      name for name, depth in names.items() if leaves[leaf].ndim - depth >= 2
    )
    for leaf, names in search.lost.items()
    if leaf not in search.depths
  }
  return Maps(
    # A parameter stacked in one place and whole in another counts by entry.
    {k: d.pop() if len(d) == 1 else None for k, d in search.depths.items()},
    {leaf: names for leaf, names in lost.items() if names},
    search.uses,
    search.ends,
  )


def as_pure(
  loss_fn: Callable[..., Any], model: Any, has_aux: bool = False
) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
  """Returns a loss as a function of a tree of parameters.

  Args:
    loss_fn: Function of (params, *args) or (module, *args).
    model: The parameters, or an NNX module.
    has_aux: Whether loss_fn returns (loss, anything).

  Returns:
    The function, the parameters, and the arguments between these and *args:
    none, or the rest of the module's state. The function of a module returns
    (loss, (aux or None, the rest of its state afterwards)).
  """
  if not isinstance(model, nnx.Module):
    return loss_fn, model, ()
  graph, params, rest = nnx.split(model, nnx.Param, ...)

  def pure(params, rest, *args):
    module = nnx.merge(graph, params, rest)
    outputs = loss_fn(module, *args)
    value, aux = outputs if has_aux else (outputs, None)
    return value, (aux, nnx.state(module, nnx.Not(nnx.Param)))

  return pure, params, (rest,)


def name_of(path) -> str:
  """Returns a parameter's path, the same with and without NNX variables."""
  # nnx.Param keeps its array in an attribute; gradients are bare arrays.
  if path and path[-1] == jax.tree_util.GetAttrKey('value'):
    path = path[:-1]
  return jax.tree_util.keystr(path)
