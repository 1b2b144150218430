"""Finds how a loss uses its parameters, from shapes alone."""

from collections.abc import Mapping
import dataclasses

from nested_learning.optimizers.tracing import interpreter
from nested_learning.optimizers.tracing import layouts
from nested_learning.optimizers.tracing import origins

PRODUCTS = ('conv_general_dilated', 'dot_general', 'ragged_dot_general')


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product or a convolution that a parameter enters.

  Attributes:
    operation: Its name.
    roles: By axis of the parameter, its roles among 'reduction', 'output' and
      'batch'; axes of which one index was taken are missing.
    has_data: Whether the other factor is data, not made of parameters, too.
  """

  operation: str
  roles: Mapping[int, set[str]]
  has_data: bool


@dataclasses.dataclass(frozen=True)
class Usage:
  """Everything that a loss does with a parameter.

  Attributes:
    depths: For its products with data whose inputs can be captured, the numbers
      of leading axes that scans consumed; None for a product with a part of it.
    lost: By operation after which its inputs cannot be captured, the number of
      leading axes consumed before it.
    products: Its products, whether their inputs can be captured or not.
    ends: Operations with data that it enters otherwise, such as the addition of
      a bias.
    constants: Operations without data after which it cannot be followed, such
      as the sum in a penalty.
  """

  depths: set[int | None] = dataclasses.field(default_factory=set)
  lost: dict[str, int] = dataclasses.field(default_factory=dict)
  products: list[Product] = dataclasses.field(default_factory=list)
  ends: set[str] = dataclasses.field(default_factory=set)
  constants: set[str] = dataclasses.field(default_factory=set)

  @property
  def depth(self) -> int | None:
    """Number of leading axes that count stacked maps; None if used in parts."""
    # A parameter stacked in one place and whole in another counts by entry.
    return next(iter(self.depths)) if len(self.depths) == 1 else None

  def lost_matrix(self, rank: int) -> list[str]:
    """Names the operations that hide a matrix from DGD; none if it is a map.

    Args:
      rank: Number of axes of the parameter.

    Returns:
      The names; none for vectors, as the biases of stacked layers.
    """
    names = (name for name, depth in self.lost.items() if rank >= depth + 2)
    return [] if self.depths else sorted(names)


def find(jaxpr, num_leaves: int) -> list[Usage]:
  """Finds how a traced loss uses its parameters.

  Args:
    jaxpr: An open jaxpr whose first inputs are the parameters.
    num_leaves: Number of parameters.

  Returns:
    The usage of each.
  """
  usages = [Usage() for _ in range(num_leaves)]
  sources = [
    origins.initial(leaf, var.aval.shape)
    for leaf, var in enumerate(jaxpr.invars[:num_leaves])
  ]
  sources += [None] * (len(jaxpr.invars) - num_leaves)
  _Search(usages).look(jaxpr, sources)
  return usages


class _Search(interpreter.Interpreter):
  """Walks through a traced function with shapes in place of values."""

  literal = origins.CONSTANT

  def __init__(self, usages: list[Usage]):
    self._usages = usages

  def look(self, jaxpr, sources) -> list[origins.Origin | None]:
    """Walks through a jaxpr; returns the origins of its outputs."""
    shapes = [var.aval for var in jaxpr.invars]
    consts = [var.aval for var in jaxpr.constvars]
    return self.run(jaxpr, consts, shapes, sources, {})[1]

  def _evaluate(self, eqn, inputs, sources, probes):
    del inputs, probes
    shapes = [var.aval for var in eqn.outvars]
    if not any(source and source.leaves for source in sources):
      return shapes, origins.follow_loosely(eqn, sources)
    exact = [origins.exactly(source) for source in sources]
    if eqn.primitive.name in PRODUCTS:
      self._note_product(eqn, sources, exact)
    elif (called := self._call(eqn, sources, exact)) is not None:
      return shapes, called
    followed = origins.follow(eqn, exact)
    if not any(followed):
      weights = interpreter.find_weights(eqn, exact)
      if weights is None:
        self._lose(eqn, exact)
      followed = origins.follow_loosely(eqn, sources)
    if eqn.primitive.name not in PRODUCTS:
      self._note_end(eqn, sources, followed)
    return shapes, followed

  def _call(self, eqn, sources, exact) -> list[origins.Origin | None] | None:
    """Walks through what an operation calls; returns None if that is nothing.

    Inputs are captured in what `interpreter.Interpreter` inlines. In everything
    else, parameters are followed loosely.
    """
    name, params = eqn.primitive.name, eqn.params
    bodies = _bodies(eqn)
    if name in interpreter.JITS:
      return self.look(bodies[0], sources)
    if name == 'scan':
      return self._scan(eqn, sources, exact)
    if name in interpreter.REMATS:
      return [origins.loosely(x) for x in self.look(bodies[0], sources)]
    if name == 'cond':
      branches = [self.look(body, sources[1:]) for body in bodies]
      return [
        origins.either(outputs) for outputs in zip(*branches, strict=True)
      ]
    if origins.only_moves(eqn):
      return None
    first = params.get('cond_nconsts', 0)  # of a while loop
    if not bodies or _ranks(bodies[0].invars) != _ranks(eqn.invars[first:]):
      return None
    self._lose(eqn, exact)
    sources = [origins.loosely(source) for source in sources]
    inner = [
      source and origins.resized(source, var.aval.shape)  # as in a shard_map
      for source, var in zip(sources[first:], bodies[0].invars, strict=True)
    ]
    followed = self.look(bodies[0], inner)
    if name.startswith('custom_'):
      return followed
    return origins.unknown(eqn, sources)

  def _scan(self, eqn, sources, exact) -> list[origins.Origin | None]:
    first = eqn.params['num_consts']
    last = first + eqn.params['num_carry']
    for source in exact[first:last]:
      self._lose_source(source, 'the carry of a scan')
    inner = interpreter.enter_scan(eqn, sources)
    # The carry is the parameter in the first turn alone, which tells its role.
    unknown = origins.unknown(eqn, sources)[0]
    for i in range(first, last):
      followed = sources[i] and sources[i].leaves
      inner[i] = origins.loosely(sources[i]) if followed else unknown
    self.look(eqn.params['jaxpr'].jaxpr, inner)
    return origins.unknown(eqn, sources)

  def _note_product(self, eqn, sources, exact):
    weights = interpreter.find_weights(eqn, exact)
    if weights is not None:
      source = exact[weights]
      for leaf in source.leaves:
        self._usages[leaf].depths.add(source.depth if source.whole else None)
    for side, source in enumerate(sources[:2]):
      other = sources[1 - side]
      for leaf, layout in zip(
        source.leaves if source else (),
        source.layouts if source else (),
        strict=True,
      ):
        # Of two factors made of parameters, those that were broadcast over
        # samples or scaled by data count as data.
        is_data = layouts.is_broadcast(layout) or source.has_data
        if other and is_data and not _is_data(other):
          self._usages[leaf].ends.add(eqn.primitive.name)
        elif roles := layouts.roles(eqn, side, layout):
          has_data = _is_data(other) and not (other and is_data)
          product = Product(eqn.primitive.name, roles, has_data)
          self._usages[leaf].products.append(product)

  def _note_end(self, eqn, sources, followed):
    kept = {leaf for source in followed if source for leaf in source.leaves}
    has_data = None in followed
    for source in sources:
      for leaf in source.leaves if source else ():
        usage = self._usages[leaf]
        if leaf not in kept:
          ends = usage.ends if has_data else usage.constants
          ends.add(eqn.primitive.name)

  def _lose(self, eqn, exact):
    for source, var in zip(exact, eqn.invars, strict=True):
      if source is not None and not origins.makes_data(eqn, var):
        self._lose_source(source, eqn.primitive.name)

  def _lose_source(self, source, name):
    for leaf in source.leaves if source else ():
      lost = self._usages[leaf].lost
      lost[name] = min(lost.get(name, source.depth), source.depth)


def _is_data(source: origins.Origin | None) -> bool:
  """Returns whether a factor is data to a factor made of parameters alone."""
  if source is None or source.has_data:
    return True
  return any(map(layouts.is_broadcast, source.layouts))


def _bodies(eqn):
  """Returns the jaxprs that an operation calls on its inputs."""
  params = eqn.params
  if eqn.primitive.name == 'cond':
    return [closed.jaxpr for closed in params['branches']]
  for name in ('body_jaxpr', 'call_jaxpr', 'call', 'jaxpr'):
    if name in params:
      return [getattr(params[name], 'jaxpr', params[name])]
  return []


def _ranks(variables):
  return [getattr(var.aval, 'ndim', None) for var in variables]
