"""Deep Momentum Gradient Descent: a small network holds the momentum."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning.optimizers import axes as axes_lib
from nested_learning.optimizers import placement
from nested_learning.optimizers import settings
from nested_learning.optimizers import trees


class DeepMomentumState(NamedTuple):
  """State of `scale_by_deep_momentum` for a tree of matrices [..., m, n].

  Attributes:
    count: Steps taken so far, int32.
    down: First layer B of each matrix's memory, [..., hidden, m].
    up: Second layer A, [..., n, hidden].
    mean_square: Running mean of squared gradients, one number per matrix.
  """

  count: jax.Array
  down: Any
  up: Any
  mean_square: Any


def deep_momentum(
  learning_rate: optax.ScalarOrSchedule,
  *,
  form: str = 'stable',
  decay: float = 0.9,
  inner_rate: float = 0.1,
  inner_steps: int = 1,
  state_ratio: float | None = None,
  seed: int = 0,
  fallback: optax.GradientTransformation | None = None,
  dimension_numbers: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum in a network that learns gradients by its own inner steps.

  For a kernel W of shape [m, n], the memory is a map from inputs to outputs
  like W^T itself, :math:`M(x) = A \tanh(B x)` with A of shape [n, h] and B of
  shape [h, m]. W is updated by the memory's output for the unit vectors,
  :math:`M(I) = A \tanh(B)`, which for a linear memory is the momentum matrix.
  With G the gradient (transposed to [n, m], over its running RMS) and
  rate = 1 - decay,

  .. math::
    E &= M(I) - G \\
    A &\leftarrow A - \text{rate}\; E \tanh(B)^\top / \lambda_B, \qquad
    B \leftarrow B - \text{rate}\; (A^\top E \circ \tanh'(B)) / \lambda_A \\
    W &\leftarrow W - \text{lr} \left(M(I) + \text{rate}\,(G - M(I))\right)^\top

  which are steps on 1/2 |M(I) - G|^2; lambda_A and lambda_B bound the largest
  eigenvalues of A^T A and tanh(B) tanh(B)^T, so that the rates are those of
  a normalised step. With a linear memory of full rank, M(I) would be the
  exponential moving average of gradients. The last term passes on the part of
  the gradient that a small memory cannot hold. h is the largest for which A and
  B together have at most `state_ratio` times the entries of W (at least 1).

  Form 'paper' is eq. 50 with its own example, the objective <M(u^T), 1> on
  the raw gradient. For shapes to agree and for a linear M to be momentum, 1
  must be the identity and the objective a trace: with u_i the i-th column of
  the gradient,

  .. math::
    A &\leftarrow \alpha A - \text{inner\_rate}\; \tanh(u B^\top) \\
    B &\leftarrow \alpha B
      - \text{inner\_rate}\; (A \circ \tanh'(u B^\top))^\top u \\
    W &\leftarrow W + \text{lr}\; M(I)^\top .

  Print has lr = 1 and calls inner_rate eta. It has no term that maintains the
  two layers: alpha decays B to zero, and the momentum with it. Print says
  W + M(u), whose shape is not that of W.

  Args:
    learning_rate: Step size, a scalar or an optax schedule (per step).
    form: 'stable' or 'paper'.
    decay: Fraction of the momentum kept per step; NL writes alpha.
    inner_rate: Step size of the memory's own descent (form 'paper').
    inner_steps: Inner steps per gradient (form 'stable').
    state_ratio: Bound on the size of the state over that of the parameters.
      None: 1/2.
    seed: Seed of the first layer's initial value (random and orthogonal).
    fallback: Rule for parameters that are no matrices, or without entries.
      None: `optax.adam` at the same learning rate.
    dimension_numbers: Tree of `optax.contrib.MuonDimensionNumbers` with the
      axes in and out of every matrix and None for other parameters, or a
      function from the parameters to one; see `optimizers.dimension_numbers`.
      None: the last two axes of every parameter of rank 2 or more, the others
      being a stack of matrices.

  Returns:
    An optax gradient transformation.

  Raises:
    ValueError: If a setting is out of its range, or if a parameter is not of a
      floating type or the dimension numbers do not fit it.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 50.
  """
  settings.check_rate(learning_rate=learning_rate)
  if fallback is None:
    fallback = settings.allow_promotion(optax.adam(learning_rate))
  settings.check_transformation(fallback=fallback)
  direction = scale_by_deep_momentum(
    form=form,
    decay=decay,
    inner_rate=inner_rate,
    inner_steps=inner_steps,
    state_ratio=state_ratio,
    seed=seed,
    dimension_numbers=dimension_numbers,
  )

  def label(leaf, axes):
    # A matrix without entries has no memory to learn it.
    return 'fallback' if axes is None or not leaf.size else 'deep'

  partition = optax.partition(
    {
      'deep': optax.chain(
        direction, optax.scale_by_learning_rate(learning_rate)
      ),
      'fallback': fallback,
    },
    lambda params: jax.tree.map(
      label, params, _find_axes(dimension_numbers, params)
    ),
  )

  return settings.check_trees(partition)


def scale_by_deep_momentum(
  *,
  form: str = 'stable',
  decay: float = 0.9,
  inner_rate: float = 0.1,
  inner_steps: int = 1,
  state_ratio: float | None = None,
  seed: int = 0,
  dimension_numbers: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
  """Computes the direction of `deep_momentum` for trees of matrices.

  Args:
    form: See `deep_momentum`.
    decay: See `deep_momentum`.
    inner_rate: See `deep_momentum`.
    inner_steps: See `deep_momentum`.
    state_ratio: See `deep_momentum`.
    seed: See `deep_momentum`.
    dimension_numbers: See `deep_momentum`; every parameter is a matrix.

  Returns:
    An optax gradient transformation.

  Raises:
    ValueError: See `deep_momentum`.
  """
  if state_ratio is None:  # A number would be traced by inject_hyperparams.
    state_ratio = 0.5
  settings.check_choice(('stable', 'paper'), form=form)
  settings.check_rate(inner_rate=inner_rate, state_ratio=state_ratio)
  settings.check_decay(decay=decay)
  settings.check_period(inner_steps=inner_steps)

  def find_axes(params):
    found = _find_axes(dimension_numbers, params)
    items, structure = jax.tree.flatten_with_path(params)
    axes = structure.flatten_up_to(found)  # None may also be an empty subtree
    for (path, _), its in zip(items, axes, strict=True):
      if its is None:
        raise ValueError(
          f'scale_by_deep_momentum: parameter {trees.path_name(path)} is no '
          'matrix; use deep_momentum, which has a fallback.'
        )
    return found

  def init_fn(params):
    settings.check_params(params)
    leaves, structure = jax.tree.flatten(params)
    axes = structure.flatten_up_to(find_axes(params))
    key = jax.random.key(seed)
    layers = [
      _init_layers(leaf, its, state_ratio, jax.random.fold_in(key, i))
      for i, (leaf, its) in enumerate(zip(leaves, axes, strict=True))
    ]
    downs, ups, squares = zip(*layers, strict=True) if layers else ((), (), ())
    return DeepMomentumState(
      count=jnp.zeros((), jnp.int32),
      down=structure.unflatten(downs),
      up=structure.unflatten(ups),
      mean_square=structure.unflatten(squares),
    )

  def update_fn(updates, state, params=None):
    del params

    def learn(g, axes, down, up, mean_square):
      merged = axes.reduction[1:] + axes.output[1:]
      u = placement.gather(g.astype(down.dtype), merged)
      u = axes_lib.to_matrices(u, axes)
      u = jnp.matrix_transpose(u)  # [..., n, m]
      if form == 'paper':
        down, up = _literal_step(u, down, up, decay, inner_rate)
        direction = -placement.matmul(up, jnp.tanh(down))
      else:
        mean_square, u = _normalize(u, mean_square, decay, state.count)
        step = functools.partial(_inner_step, u, rate=1 - decay)
        down, up = _repeat(step, inner_steps, (down, up))
        held = placement.matmul(up, jnp.tanh(down))
        direction = held + (1 - decay) * (u - held)
      direction = jnp.matrix_transpose(direction).astype(g.dtype)
      direction = axes_lib.from_matrices(direction, axes, g.shape)
      direction = placement.put(direction, placement.spec_of(g), like=g)
      return direction, down, up, mean_square

    found = find_axes(updates)
    trees.check_like(*_matrix_shapes(updates, found, state))
    leaves, structure = jax.tree.flatten(updates)
    axes = structure.flatten_up_to(found)
    memories = state.down, state.up, state.mean_square
    parts = map(jax.tree.leaves, memories)
    results = [learn(*leaf) for leaf in zip(leaves, axes, *parts, strict=True)]
    columns = zip(*results, strict=True) if results else ((), (), (), ())
    updates, *learned = (structure.unflatten(column) for column in columns)
    count = optax.safe_increment(state.count)
    learned = jax.tree.map(_keep_type, tuple(learned), memories)
    return updates, DeepMomentumState(count, *learned)

  return optax.GradientTransformation(init_fn, update_fn)


def _repeat(step, num_steps, memory):
  """Applies a step to (down, up) several times."""
  if isinstance(num_steps, jax.core.Tracer):  # under optax.inject_hyperparams
    return jax.lax.fori_loop(0, num_steps, lambda _, m: step(m), memory)
  for _ in range(int(num_steps)):
    memory = step(memory)
  return memory


def _find_axes(dimension_numbers, params):
  """Returns the axes of every matrix, and None for other parameters."""
  if dimension_numbers is not None:
    return axes_lib.find(dimension_numbers, params)
  return jax.tree.map(
    lambda leaf: axes_lib.last_two(leaf.ndim) if leaf.ndim >= 2 else None,
    params,
  )


def _matrix_shapes(updates, axes, state):
  """Returns the matrices of gradients and those of a state, as shapes."""
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  given = jax.tree.map(
    lambda g, its: shape(
      *(g.shape[axis] for axis in its.stack), *its.sides(g.shape)
    ),
    updates,
    axes,
  )
  held = jax.tree.map(
    lambda down, up: shape(*down.shape[:-2], down.shape[-1], up.shape[-2]),
    state.down,
    state.up,
  )
  return given, held


def _init_layers(leaf, axes, state_ratio, key):
  """Returns the two layers for a leaf, and its mean square."""
  m, n = axes.sides(leaf.shape)
  stack = tuple(leaf.shape[axis] for axis in axes.stack)
  dtype = trees.wide(leaf.dtype)
  hidden = min(max(1, int(state_ratio * m * n / (m + n))), m)
  down = jax.nn.initializers.orthogonal()(key, (hidden, m), dtype)
  down = jnp.broadcast_to(down, (*stack, hidden, m))
  # Shard inputs, outputs and stacked matrices like those of the leaf.
  spec = placement.spec_of(leaf)
  layers = [spec[axis] for axis in axes.stack]
  # Axes that make one dimension are sharded along the first.
  inputs, outputs = spec[axes.reduction[0]], spec[axes.output[0]]
  up, square = jnp.zeros((*stack, n, hidden), dtype), jnp.zeros(stack, dtype)
  return (
    placement.put(down, jax.P(*layers, None, inputs), like=leaf),
    placement.put(up, jax.P(*layers, outputs, None), like=leaf),
    placement.put(square, jax.P(*layers), like=leaf),
  )


def _keep_type(new, old):
  return placement.put(new.astype(old.dtype), placement.spec_of(old), like=old)


def _normalize(u, mean_square, decay, count):
  """Returns the new mean square of gradients, and u over its root."""
  step = (count + 1).astype(u.dtype)
  square = jnp.mean(jnp.square(u), axis=(-2, -1))
  mean_square = decay * mean_square + (1 - decay) * square
  # Corrected for its start at zero; a zero gradient stays zero.
  scale = jnp.sqrt(mean_square / (1 - decay**step)) + 1e-12
  return mean_square, u / scale[..., None, None]


def _inner_step(u, memory, *, rate):
  """Takes a normalised step on 1/2 |up tanh(down) - u|^2."""
  down, up = memory
  features = jnp.tanh(down)
  error = placement.matmul(up, features) - u
  slope = 1 - jnp.square(features)
  up_gradient = placement.matmul(error, jnp.matrix_transpose(features))
  down_gradient = placement.matmul(jnp.matrix_transpose(up), error) * slope
  new_up = up - rate * up_gradient / _bound(features)
  return down - rate * down_gradient / _bound(jnp.matrix_transpose(up)), new_up


def _literal_step(u, down, up, decay, rate):
  """Takes a step on the trace of up tanh(down u^T), as printed."""
  features = jnp.tanh(placement.matmul(u, jnp.matrix_transpose(down)))
  slope = 1 - jnp.square(features)
  down_gradient = placement.matmul(jnp.matrix_transpose(up * slope), u)
  return decay * down - rate * down_gradient, decay * up - rate * features


def _bound(x):
  """Returns a positive bound on the largest eigenvalue of x x^T."""
  gram = placement.matmul(x, jnp.matrix_transpose(x))
  # The largest row sum bounds every eigenvalue (Gershgorin).
  largest = jnp.max(jnp.sum(jnp.abs(gram), -1), -1)[..., None, None]
  return jnp.maximum(largest, jnp.finfo(x.dtype).tiny)
