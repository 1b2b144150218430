"""Captures the inputs of linear maps, for Delta Gradient Descent.

For every linear map W with inputs x, DGD needs the mean of |x|^2 and, in the
printed form, W x x^T: the gradient of 1/2 |W x|^2 with x and everything
upstream held fixed. A backward pass multiplies the error at the map's output by
x^T anyway. Adding the output itself to that error, for the weights only, gives
the sum of both terms for one addition. To find the maps, the loss is traced
once and every contraction or convolution of a parameter with data is replaced,
see `interpreter.py`. This works for Linen, for NNX and for functions of a plain
tree alike.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning.optimizers import settings
from nested_learning.optimizers import trees
from nested_learning.optimizers.tracing import interpreter
from nested_learning.optimizers.tracing import origins
from nested_learning.optimizers.tracing import usage


def find_maps(loss_fn: Callable[..., Any], params, *args) -> Any:
  """Finds the parameters that multiply data, and so can be trained by DGD.

  Args:
    loss_fn: Function of (params, *args).
    params: Tree of parameters, or of `jax.ShapeDtypeStruct`.
    *args: Further arguments of loss_fn: arrays or shapes.

  Returns:
    A tree with the structure of params, True at the maps.
  """
  return trace_maps(loss_fn, params, *args)[0]


def trace_maps(
  loss_fn: Callable[..., Any], params, *args
) -> tuple[Any, dict[str, list[str]]]:
  """Finds the maps as `find_maps` does, and the parameters it cannot follow.

  Args:
    loss_fn: Function of (params, *args).
    params: Tree of parameters, or of `jax.ShapeDtypeStruct`.
    *args: Further arguments of loss_fn: arrays or shapes.

  Returns:
    A tree with the structure of params, True at the maps; and, by path of each
    matrix that was not found to multiply data, the operations that it enters.
  """
  closed = jax.make_jaxpr(loss_fn)(params, *args)
  paths, structure = jax.tree.flatten_with_path(params)
  usages = usage.find(closed.jaxpr, len(paths))
  lost = {
    trees.path_name(path): names
    for (path, leaf), used in zip(paths, usages, strict=True)
    if (names := used.lost_matrix(len(leaf.shape)))
  }
  return structure.unflatten([bool(used.depths) for used in usages]), lost


def value_and_delta_grad(
  loss_fn: Callable[..., Any],
  *,
  target: Any = 'corrected',
  erase: Any = 1.0,
  num_samples: int | Callable[..., Any] | None = None,
  has_aux: bool = False,
) -> Callable[..., tuple[Any, Any, Mapping[str, Any]]]:
  r"""Extends `jax.value_and_grad` by what Delta Gradient Descent needs.

  For a linear map with inputs x_s and N samples, that is the energy
  :math:`\frac{1}{N} \sum_s |x_s|^2`. With target 'printed', the gradient is
  that of the loss plus

  .. math:: \text{erase}\; W \frac{1}{N} \sum_s x_s x_s^\top .

  Other parameters have the plain gradient and energy 0. A map that is applied
  in several places sums its energies and terms, as it does its gradients. The
  loss is a mean over samples; with target 'printed' it must not be scaled (the
  added term would not be). Inside a `jax.shard_map` over samples, let it be the
  mean over all devices (`jax.lax.pmean`), as for `jax.grad`.

  An input vector is a sample if the loss depends on the map's output for it,
  that is, if the gradient of the loss there is not exactly zero. Padding that
  the loss masks out is no sample: it is neither erased nor counted, whatever
  it holds.

  A kernel of a convolution is a map of patches. A parameter that is used in
  parts (split, sliced, indexed by a constant, concatenated with others) has an
  energy per entry, that of the parts that the entry belongs to.

  Args:
    loss_fn: Scalar function of (params, *args); all further arguments are
      arrays.
    target: The target of `dgd` that takes the gradients: 'corrected' or
      'printed'. A tree that is a prefix of params gives parameters their own;
      None is for parameters of other optimisers, whose inputs are not captured:
      they have the plain gradient and energy 0.
    erase: Weight of the added term of target 'printed'; 1 is the paper's rule.
      A number, or a tree like the target.
    num_samples: Number N that the loss averages over, or a function of *args
      that returns it. None: for each use of a map, the number of its samples.
      Inside a loop that uses a map repeatedly (over pieces of the data, over
      time), that number is not known until all turns are done, and None counts
      the vectors of all turns, padding included; give the number if the loss
      masks vectors there.
    has_aux: Whether loss_fn returns (loss, anything).

  Returns:
    A function of (params, *args) that returns the loss (with aux), the
    gradients, and {'energy': tree like params}, to be passed on to `dgd`. The
    energy of a leaf is a scalar, an array over its leading axes (stacked
    layers), or an array of the leaf's shape.

  Raises:
    ValueError: If the target is unknown or no prefix of params, erase is set
      for another one than 'printed', num_samples is not above 0, or a parameter
      is not of a floating type.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 56-57.
  """
  check = lambda t, e: None if t is None else settings.check_target(t, e)
  if isinstance(target, str):  # A tree can be checked beside params alone.
    check(target, erase)

  def value_and_grad(params, *args):
    settings.check_params(params)
    closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, *args)
    leaves, structure = jax.tree.flatten(params)
    targets = _spread(target, params, 'target')
    erases = _spread(erase, params, 'erase')
    for pair in zip(targets, erases, strict=True):
      check(*pair)
    depths = {
      leaf: used.depth
      for leaf, used in enumerate(usage.find(closed.jaxpr, len(leaves)))
      if used.depths and targets[leaf] is not None
    }
    count = num_samples(*args) if callable(num_samples) else num_samples
    if settings.is_known(count) and not count > 0:
      raise ValueError(f'num_samples={count} must be above 0, or None.')
    count = None if count is None else jnp.asarray(count, jnp.float32)
    # The energies are the gradients of the probes and the twins.
    probes = {
      leaf: _zeros(leaves[leaf], leaves[leaf].shape[:depth])
      for leaf, depth in depths.items()
      if depth is not None
    }
    twins = {
      leaf: _zeros(leaves[leaf], leaves[leaf].shape)
      for leaf, depth in depths.items()
      if depth is None
    }

    def linear(bind, eqn, inputs, source, weights, probes):
      if any(targets[leaf] is None for leaf in source.leaves):
        return bind(*inputs)
      probe = source.twin
      if probe is None:
        probe = probes[source.leaves[0]]
      apply = bind if weights else lambda x, w: bind(w, x)
      geometry = _make_geometry(eqn, weights, source.repeats)
      x, w = inputs[1 - weights], inputs[weights]
      first = source.leaves[0]
      pull = erases[first] if targets[first] == 'printed' else None
      # Inside a shard_map, other devices have further samples of a map that
      # does not vary by device: terms and energies of all are added up.
      shared = (_varying(x) | _varying(w)) - _varying(probe)
      shared, probe = tuple(sorted(shared)), _vary(probe, shared)
      return _make_linear(apply, geometry, pull, shared)(x, w, probe, count)

    def loss(leaves, probes, twins):
      arguments = jax.tree.leaves((structure.unflatten(leaves), *args))
      sources = [
        origins.exactly(origins.initial(i, jnp.shape(leaf), twins.get(i)))
        for i, leaf in enumerate(leaves)
      ]
      sources += [None] * (len(arguments) - len(leaves))
      outputs, _ = interpreter.Interpreter(linear).run(
        closed.jaxpr, closed.consts, arguments, sources, probes
      )
      outputs = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
      return outputs if has_aux else (outputs, None)

    (value, aux), (gradients, *energies) = jax.value_and_grad(
      loss, argnums=(0, 1, 2), has_aux=True
    )(leaves, probes, twins)
    energies = {**energies[0], **energies[1]}
    zero = jnp.zeros((), jnp.float32)
    energy = structure.unflatten(
      [energies.get(leaf, zero) for leaf in range(len(leaves))]
    )
    value = (value, aux) if has_aux else value
    return value, structure.unflatten(gradients), {'energy': energy}

  return value_and_grad


def _spread(prefix: Any, params: Any, name: str) -> list[Any]:
  """Returns the value of a prefix of params for each of their leaves."""
  # None is a value here, and no leaf to JAX; a namespace is one.
  boxes = jax.tree.map(
    lambda x: types.SimpleNamespace(value=x),
    prefix,
    is_leaf=lambda x: x is None,
  )
  boxes = jax.tree.leaves(trees.broadcast(boxes, params, name))
  return [box.value for box in boxes]


@dataclasses.dataclass(frozen=True)
class _Geometry:
  """The layout of the outputs of a product.

  Attributes:
    split: Brings outputs into a layout in which every axis counts maps side by
      side, samples, or the outputs of one map.
    join: Undoes `split`.
    measure: Maps squared inputs to the squared norm of every input vector, in
      the layout of `split`, with size 1 where outputs are counted.
    samples: Axes that count samples.
    outputs: Axes that count the outputs of one map.
    num_vectors: Number of input vectors of all turns of the enclosing loops;
      None outside loops.
  """

  split: Callable[[jax.Array], jax.Array]
  join: Callable[[jax.Array], jax.Array]
  measure: Callable[[jax.Array], jax.Array]
  samples: tuple[int, ...]
  outputs: tuple[int, ...]
  num_vectors: int | None


def _make_geometry(eqn, weights: int, repeats: int) -> _Geometry:
  if eqn.primitive.name == 'dot_general':
    return _dot_geometry(eqn, weights, repeats)
  return _convolution_geometry(eqn, repeats)


def _dot_geometry(eqn, weights: int, repeats: int) -> _Geometry:
  """Outputs are [batch axes, free axes of the lhs, free axes of the rhs]."""
  data = 1 - weights
  contracted, batch = (pair[data] for pair in eqn.params['dimension_numbers'])
  rank = eqn.invars[data].aval.ndim
  free = [i for i in range(rank) if i not in contracted and i not in batch]
  num_outputs = eqn.outvars[0].aval.ndim - len(batch) - len(free)
  first = len(batch) + (0 if data == 0 else num_outputs)
  samples = tuple(range(first, first + len(free)))
  outputs = range(len(batch), eqn.outvars[0].aval.ndim)
  outputs = tuple(axis for axis in outputs if axis not in samples)
  left = [i for i in range(rank) if i not in contracted]
  order = [left.index(axis) for axis in (*batch, *free)]

  def measure(square):
    # [batch, free axes of the data], with the outputs' axes put in between.
    norms = jnp.transpose(jnp.sum(square, axis=tuple(contracted)), order)
    return jnp.expand_dims(norms, outputs)

  same = lambda y: y
  total = _num_vectors(eqn.outvars[0].aval.shape, samples, repeats)
  return _Geometry(same, same, measure, samples, outputs, total)


def _convolution_geometry(eqn, repeats: int) -> _Geometry:
  """Every group of features is a map from patches to its own outputs."""
  groups = eqn.params['feature_group_count']
  kernel, numbers = eqn.invars[1].aval, eqn.params['dimension_numbers']
  shape = eqn.outvars[0].aval.shape
  feature = numbers.out_spec[1]
  parts = (groups, shape[feature] // groups)
  grouped = (*shape[:feature], *parts, *shape[feature + 1 :])
  ones = list(kernel.shape)
  ones[numbers.rhs_spec[0]] = groups

  def measure(square):
    # The sum over each patch: one output of weights 1 for every group.
    norms = eqn.primitive.bind(
      square,
      jnp.ones(ones, square.dtype),
      **{
        **eqn.params,
        # Energies bound the step, so they are exact to float32.
        'precision': jax.lax.Precision.HIGHEST,
        'preferred_element_type': None,  # that of the squares
      },
    )
    return jnp.expand_dims(norms, feature + 1)  # [..., groups, 1, ...]

  samples = tuple(
    axis for axis in range(len(grouped)) if axis not in (feature, feature + 1)
  )
  return _Geometry(
    lambda y: y.reshape(grouped),
    lambda y: y.reshape(shape),
    measure,
    samples,
    (feature + 1,),
    _num_vectors(grouped, samples, repeats),
  )


def _num_vectors(shape, samples, repeats: int) -> int | None:
  """Returns the number of input vectors of all turns, or None if one turn."""
  if repeats == 1:
    return None
  return repeats * math.prod(shape[axis] for axis in samples)


def _make_linear(apply, geometry: _Geometry, erase, shared: tuple[str, ...]):
  """Makes a linear map whose weights are also pulled towards an output of 0.

  Args:
    apply: Function of (x, w) that is linear in each.
    geometry: The layout of its outputs.
    erase: Weight of the pull; None leaves it out.
    shared: Axes of the mesh along which devices have samples of the same map.

  Returns:
    A function of (x, w, probe, count) with the value of `apply`; the gradient
    of the probe is the energy of x, and count is the number of samples, or
    None.
  """

  @jax.custom_vjp
  def linear(x, w, probe, count):
    del probe, count
    return apply(x, w)

  def forward(x, w, probe, count):
    y = apply(x, w)
    # Without an erasing term, the backward pass does not need the output.
    return y, (x, w, None if erase is None else y, probe, count)

  def backward(residuals, error):
    x, w, y, probe, count = residuals
    # Vectors whose output the loss does not depend on are no samples. Let
    # counted be in the layout of split(y), with size 1 along the outputs.
    nonzero = geometry.split(error) != 0
    counted = jnp.any(nonzero, axis=geometry.outputs, keepdims=True)
    if count is not None:
      num = count
    elif geometry.num_vectors is not None:
      num = jnp.float32(geometry.num_vectors)
    else:
      num = jnp.sum(counted, geometry.samples, jnp.float32, keepdims=True)
    if shared and count is None:
      num = jax.lax.psum(_vary(num, shared), shared)
    num = jnp.maximum(num, 1).astype(probe.dtype)  # 0 if all are masked

    norms = geometry.measure(jnp.square(x.astype(probe.dtype)))
    norms = jnp.where(counted, norms, 0)
    # Maps side by side (a batch axis of the weights) share one step, which
    # must be short enough for the one with the longest inputs.
    energy = jnp.sum(norms, geometry.samples, keepdims=True) / num
    energy = jnp.max(energy, initial=0)

    (x_bar,) = jax.linear_transpose(lambda x: apply(x, w), x)(error)
    pulled = error
    if erase is not None:
      # d/dW of L + erase / (2 N) sum |W x|^2, with x held fixed.
      # `where` rather than a product, since masked vectors may hold NaN.
      held = jnp.where(counted, erase / num * geometry.split(y), 0)
      pulled = error + geometry.join(held).astype(error.dtype)
    (w_bar,) = jax.linear_transpose(lambda w: apply(x, w), w)(pulled)
    no_count = None if count is None else jnp.zeros_like(count)
    return x_bar, w_bar, jnp.zeros_like(probe) + energy, no_count

  linear.defvjp(forward, backward)
  return linear


def _zeros(leaf, shape):
  """Returns zeros that vary over the devices of a shard_map as a leaf does."""
  # In float32 at least: energies are sums over many samples.
  zeros = jnp.zeros(shape, _wide(leaf.dtype))
  return _vary(zeros, _varying(leaf))


def _varying(x) -> frozenset[str]:
  """Returns the axes of the mesh over which a value varies in a shard_map."""
  return jax.typeof(x).mat.varying


def _vary(x, axes):
  missing = tuple(sorted(set(axes) - _varying(x)))
  return jax.lax.pcast(x, missing, to='varying') if missing else x


def _wide(dtype):
  return jnp.promote_types(dtype, jnp.float32)
