"""Indexes states per row, and takes norms per row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import parameters


def row_axes(init_state: Callable[[Any, int], Any], params: Any) -> Any:
  """Finds the axis of each leaf of a model's state that counts rows.

  Args:
    init_state: `init_state(params, batch_size) -> state`.
    params: The model's parameters, or their shapes.

  Returns:
    A tree of ints with the state's structure.

  Raises:
    ValueError: A leaf has no axis that grows with the number of rows.
  """
  one, two = (
    jax.eval_shape(lambda p, size=size: init_state(p, size), params)
    for size in (1, 2)
  )

  def axis(path, a, b):
    differs = [m != n for m, n in zip(a.shape, b.shape, strict=True)]
    if sum(differs) != 1:
      raise ValueError(
        f'{parameters.path_name(path)} of the state has shape {a.shape} for '
        f'one row and {b.shape} for two; one axis must count rows.'
      )
    return differs.index(True)

  return jax.tree_util.tree_map_with_path(axis, one, two)


def rows_first(axes: Any, state: Any) -> Any:
  """Moves the row axis of every leaf to the front."""
  return jax.tree.map(lambda i, x: jnp.moveaxis(x, i, 0), axes, state)


def rows_back(axes: Any, state: Any) -> Any:
  """Undoes `rows_first`."""
  return jax.tree.map(lambda i, x: jnp.moveaxis(x, 0, i), axes, state)


def add_row_axis(axes: Any, row: Any) -> Any:
  """Adds a row axis of length 1 to every leaf of one row's state."""
  return jax.tree.map(lambda i, x: jnp.expand_dims(x, i), axes, row)


def drop_row_axis(axes: Any, state: Any) -> Any:
  """Removes the row axis of length 1 from every leaf."""
  return jax.tree.map(lambda i, x: jnp.squeeze(x, i), axes, state)


def where(rows: jax.Array, new: Any, old: Any) -> Any:
  """Selects whole rows from one of two trees.

  Args:
    rows: bool [b], True to take the row from `new`.
    new: A tree of [b, ...].
    old: A tree like `new`.

  Returns:
    A tree like `old`, with its types.
  """

  def leaf(a, b):
    picked = rows.reshape(rows.shape + (1,) * (b.ndim - 1))
    # Steps in a wider type do not change the type that a scan carries.
    return jnp.where(picked, a, b).astype(b.dtype)

  return jax.tree.map(leaf, new, old)


def norm(tree: Any) -> jax.Array:
  """Returns the Euclidean norm of each row of a tree of [b, ...], [b].

  No gradient flows through it: norms are telemetry, and the derivative of a
  root at zero is not finite.
  """
  squares = [
    jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))
    for x in map(widen, jax.tree.leaves(jax.lax.stop_gradient(tree)))
  ]
  return jnp.sqrt(sum(squares))


def widen(x: jax.Array) -> jax.Array:
  """Casts to float32, or keeps a wider type: sums lose digits in bfloat16."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
