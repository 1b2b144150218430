"""Selects, merges and indexes per-level parameters and per-row states."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nested_learning import parameters


def select(tree: Any, labels: Any, name: str) -> Any:
  """Selects the leaves of one level.

  Args:
    tree: Tree with a leaf at every path that `labels` gives this name; its
      other leaves are ignored, and may be missing.
    labels: Tree of level names.
    name: Name of the level.

  Returns:
    A tree with the structure of `labels`, with optax's masked nodes in place of
    the leaves of other levels.
  """
  leaves = {
    parameters.path_name(path): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }

  def leaf(path, label):
    if label != name:
      return optax.MaskedNode()
    return leaves[parameters.path_name(path)]

  return jax.tree_util.tree_map_with_path(leaf, labels)


def merge(tree: Any, labels: Any, parts: Mapping[str, Any]) -> Any:
  """Replaces the leaves of some levels.

  Args:
    tree: Any tree.
    labels: Tree of level names with its structure.
    parts: From level name to the result of `select` on another such tree.

  Returns:
    A tree like `tree`.
  """
  replaced = {
    parameters.path_name(path): leaf
    for part in parts.values()
    for path, leaf in jax.tree.leaves_with_path(part)
  }

  def leaf(path, label, old):
    return replaced[parameters.path_name(path)] if label in parts else old

  return jax.tree_util.tree_map_with_path(leaf, labels, tree)


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
