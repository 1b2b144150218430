"""Follows parameters through a traced function to their products with data.

An interpreter walks through the jaxpr of a loss, through jit, scan, remat and
cond, with the origin of every value beside it. `usage.py` notes with it how a
loss uses its parameters; `capture.py` replaces the products.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
from jax.extend import core

from nested_learning.optimizers.tracing import origins as origins_lib

Origin = origins_lib.Origin

JITS = ('jit', 'pjit')
REMATS = ('checkpoint', 'remat', 'remat2')


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
    """Evaluates an equation; returns its outputs and their origins."""
    name, nothing = eqn.primitive.name, [None] * len(eqn.outvars)
    bind = origins_lib.binder(eqn)
    weights = find_weights(eqn, sources)
    if weights is not None:
      source = sources[weights]
      return [self._linear(bind, eqn, inputs, source, weights, probes)], nothing
    if any(sources):
      if name in JITS:
        # Inlined: the caller compiles the whole function anyway.
        closed = eqn.params['jaxpr']
        return self.run(closed.jaxpr, closed.consts, inputs, sources, probes)
      if name in REMATS:
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
    inner = enter_scan(eqn, sources)
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


def enter_scan(eqn, sources) -> list[Origin | None]:
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


def find_weights(eqn, sources) -> int | None:
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
