"""What Delta Gradient Descent needs beyond a gradient, from any loss function.

DGD wants, for every linear map W with inputs x, the term W x x^T: the gradient
of 1/2 |W x|^2 with x and everything upstream held fixed. A backward pass
multiplies the error at the map's output by x^T anyway; adding the output
itself to that error, for the weights only, gives the sum of both terms for
one addition. To find the maps, the loss is traced once and every contraction
of a parameter with data is replaced, through jit, scan, remat and cond. This
works for Linen, for NNX and for functions of a plain tree alike.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp

# Operations after which a parameter is still the same linear map.
_LAYOUT = frozenset({
  'broadcast_in_dim', 'convert_element_type', 'copy', 'copy_p', 'expand_dims',
  'reduce_precision', 'reshape', 'sharding_constraint', 'squeeze', 'transpose',
})  # fmt: skip
# Of these, the ones that leave the leading axis in place.
_IN_PLACE = frozenset({
  'convert_element_type', 'copy', 'copy_p', 'reduce_precision',
  'sharding_constraint',
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Origin:
  """Which parameter a value is, seen from inside a traced function.

  Attributes:
    leaf: Index of the parameter among the leaves.
    depth: Scans that have consumed a leading axis of it (stacked layers).
    repeats: Times that the enclosing scans use it unchanged.
    in_place: Whether its leading axis is where the parameter has it.
  """

  leaf: int
  depth: int = 0
  repeats: int = 1
  in_place: bool = True


class _Interpreter:
  """Evaluates a traced function with its linear maps replaced."""

  def __init__(self, linear: Callable[..., Any]):
    self._linear = linear

  def run(self, jaxpr, consts, arguments, origins, probes) -> list[Any]:
    """Evaluates a jaxpr.

    Args:
      jaxpr: An open jaxpr.
      consts: Values of its constants.
      arguments: Values of its inputs.
      origins: For each input, its `_Origin`, or None.
      probes: By leaf, the scalar whose gradient is the energy of its input.

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

    for eqn in jaxpr.eqns:
      inputs = [read(var) for var in eqn.invars]
      sources = [origin(var) for var in eqn.invars]
      outputs = self._evaluate(eqn, inputs, sources, probes)
      values.update(zip(eqn.outvars, outputs, strict=True))
      if eqn.primitive.name in _LAYOUT and sources[0] is not None:
        if eqn.outvars[0].aval.size == eqn.invars[0].aval.size:
          kept = eqn.primitive.name in _IN_PLACE
          known[eqn.outvars[0]] = dataclasses.replace(
            sources[0], in_place=sources[0].in_place and kept
          )
    return [read(var) for var in jaxpr.outvars]

  def _evaluate(self, eqn, inputs, sources, probes) -> list[Any]:
    name = eqn.primitive.name
    bind = functools.partial(
      eqn.primitive.bind, **eqn.primitive.get_bind_params(eqn.params)
    )
    if name == 'dot_general' and (sources[0] is None) != (sources[1] is None):
      return [self._linear(bind, eqn, inputs, sources, probes)]
    if any(source is not None for source in sources):
      if name in ('jit', 'pjit'):
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
        return jax.lax.switch(inputs[0], branches, *inputs[1:])
      if name == 'scan':
        return self._scan(eqn, inputs, sources, probes)
    outputs = bind(*inputs)
    return outputs if eqn.primitive.multiple_results else [outputs]

  def _scan(self, eqn, inputs, sources, probes) -> list[Any]:
    closed, length = eqn.params['jaxpr'], eqn.params['length']
    num_consts, num_carry = eqn.params['num_consts'], eqn.params['num_carry']
    start = num_consts + num_carry
    inner, stacked = [None] * len(sources), {}
    for i, source in enumerate(sources):
      if source is None:
        continue
      if i < num_consts:
        repeats = source.repeats * length
        inner[i] = dataclasses.replace(source, repeats=repeats)
      elif i >= start and source.in_place:
        inner[i] = dataclasses.replace(source, depth=source.depth + 1)
        if source.leaf in probes:
          stacked[source.leaf] = probes[source.leaf]
    consts = inputs[:num_consts]

    def body(carry, slices):
      xs, sliced = slices
      outputs = self.run(
        closed.jaxpr,
        closed.consts,
        [*consts, *carry, *xs],
        inner,
        {**probes, **sliced},
      )
      return outputs[:num_carry], outputs[num_carry:]

    carry, ys = jax.lax.scan(
      body,
      inputs[num_consts:start],
      (inputs[start:], stacked),
      length=length,
      reverse=eqn.params['reverse'],
      unroll=eqn.params['unroll'],
    )
    return [*carry, *ys]


def _count_rows(eqn, data: int) -> int:
  """Number of input vectors that a dot_general multiplies with the weights."""
  contract, batch = eqn.params['dimension_numbers']
  shape = eqn.invars[data].aval.shape
  used = {*contract[data], *batch[data]}
  return math.prod(size for axis, size in enumerate(shape) if axis not in used)


def _find(jaxpr, consts, num_leaves) -> dict[int, int]:
  """Leaves that act as linear maps, with their number of stacked axes."""
  depths = {}

  def record(bind, eqn, inputs, sources, probes):
    del probes
    source = sources[0] or sources[1]
    depths.setdefault(source.leaf, set()).add(source.depth)
    return bind(*inputs)

  def walk(*arguments):
    origins = [_Origin(i) for i in range(num_leaves)]
    origins += [None] * (len(arguments) - num_leaves)
    return _Interpreter(record).run(jaxpr, consts, arguments, origins, {})

  jax.eval_shape(walk, *(var.aval for var in jaxpr.invars))
  # A parameter stacked in one place and whole in another has no one energy.
  return {leaf: d.pop() for leaf, d in depths.items() if len(d) == 1}


def find_maps(loss_fn: Callable[..., Any], params, *args) -> Any:
  """Says which parameters multiply data, and so can be trained by DGD.

  Args:
    loss_fn: Function of (params, *args).
    params: Tree of parameters, or of `jax.ShapeDtypeStruct`.
    *args: Further arguments of loss_fn: arrays or shapes.

  Returns:
    A tree with the structure of params, True at the maps.
  """
  closed = jax.make_jaxpr(loss_fn)(params, *args)
  leaves, structure = jax.tree.flatten(params)
  found = _find(closed.jaxpr, closed.consts, len(leaves))
  return structure.unflatten([i in found for i in range(len(leaves))])


def value_and_delta_grad(
  loss_fn: Callable[..., Any],
  *,
  erase: float = 1.0,
  num_samples: int | None = None,
  has_aux: bool = False,
) -> Callable[..., tuple[Any, Any, Mapping[str, Any]]]:
  r"""`jax.value_and_grad` with the term of Delta Gradient Descent added.

  For a linear map with inputs x_s, outputs W x_s and N samples, the gradient is
  that of the loss plus

  .. math:: \text{erase}\; W \frac{1}{N} \sum_s x_s x_s^\top ,

  and its energy is :math:`\frac{1}{N} \sum_s |x_s|^2`. Other parameters have
  the plain gradient and energy 0. A map that is applied in several places sums
  its terms, as it does its gradients. The loss is a mean over samples and must
  not be scaled (the added term would not be).

  Args:
    loss_fn: Scalar function of (params, *args); all further arguments are
      arrays.
    erase: Weight of the added term; 1 is the paper's rule.
    num_samples: What the loss averages over. None: for each use of a map, the
      number of vectors that it is applied to, all turns of an enclosing loop
      together (a loop runs over pieces of the data).
    has_aux: Whether loss_fn returns (loss, anything).

  Returns:
    A function of (params, *args) that returns the loss (with aux), the
    gradients, and {'energy': tree like params}, to be passed on to `dgd`.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 56-57.
  """

  def value_and_grad(params, *args):
    closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, *args)
    leaves, structure = jax.tree.flatten(params)
    found = _find(closed.jaxpr, closed.consts, len(leaves))
    probes = {
      leaf: jnp.zeros(leaves[leaf].shape[:depth], _wide(leaves[leaf].dtype))
      for leaf, depth in found.items()
    }

    def linear(bind, eqn, inputs, sources, probes):
      weights = 0 if sources[0] is not None else 1
      source = sources[weights]
      if source.leaf not in probes:
        return bind(*inputs)
      rows = _count_rows(eqn, 1 - weights) * source.repeats
      apply = bind if weights else lambda x, w: bind(w, x)
      contract, batch = eqn.params['dimension_numbers']
      return _make_linear(
        apply, batch[1 - weights], erase, num_samples or rows
      )(inputs[1 - weights], inputs[weights], probes[source.leaf])

    def loss(leaves, probes):
      arguments = jax.tree.leaves((structure.unflatten(leaves), *args))
      origins = [_Origin(i) for i in range(len(leaves))]
      origins += [None] * (len(arguments) - len(leaves))
      outputs = _Interpreter(linear).run(
        closed.jaxpr, closed.consts, arguments, origins, probes
      )
      outputs = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
      return outputs if has_aux else (outputs, None)

    (value, aux), (gradients, energies) = jax.value_and_grad(
      loss, argnums=(0, 1), has_aux=True
    )(leaves, probes)
    zero = jnp.zeros((), jnp.float32)
    energy = structure.unflatten(
      [energies.get(leaf, zero) for leaf in range(len(leaves))]
    )
    value = (value, aux) if has_aux else value
    return value, structure.unflatten(gradients), {'energy': energy}

  return value_and_grad


def _make_linear(apply, batch_axes, erase, num_samples):
  """A linear map whose weights are also pulled towards answering 0."""

  @jax.custom_vjp
  def linear(x, w, probe):
    del probe
    return apply(x, w)

  def forward(x, w, probe):
    y = apply(x, w)
    square = jnp.square(x.astype(probe.dtype))
    kept = [axis for axis in range(x.ndim) if axis not in batch_axes]
    # Maps side by side (a batch axis of the weights) share one step, which
    # must be short enough for the one with the longest inputs.
    energy = jnp.max(jnp.sum(square, axis=kept)) / num_samples
    return y, (x, w, y, energy)

  def backward(residuals, error):
    x, w, y, energy = residuals
    (x_bar,) = jax.linear_transpose(lambda x: apply(x, w), x)(error)
    # d/dW of L + erase / (2 N) sum |W x|^2, with x held fixed.
    pulled = error + (erase / num_samples * y).astype(error.dtype)
    (w_bar,) = jax.linear_transpose(lambda w: apply(x, w), w)(pulled)
    return x_bar, w_bar, energy

  linear.defvjp(forward, backward)
  return linear


def _wide(dtype):
  return jnp.promote_types(dtype, jnp.float32)
