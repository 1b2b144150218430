"""Parts of a tree of parameters, and states whose rows lie anywhere."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nested_learning import parameters


def select(tree: Any, labels: Any, name: str) -> Any:
  """The leaves of one label; all others become optax's masked nodes."""
  return jax.tree.map(
    lambda label, leaf: leaf if label == name else optax.MaskedNode(),
    labels,
    tree,
  )


def pick(tree: Any, labels: Any, name: str) -> Any:
  """What `select` makes, of a tree that need not have any other leaves."""
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
  """The tree with the leaves of some labels replaced.

  Args:
    tree: Any tree.
    labels: A tree of names with its structure.
    parts: From name to what `select` made of another such tree.

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
  """Which axis of each leaf of a model's state counts rows.

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
        f'one row and {b.shape} for two; rows must be counted by one axis.'
      )
    return differs.index(True)

  return jax.tree_util.tree_map_with_path(axis, one, two)


def rows_first(axes: Any, state: Any) -> Any:
  """Moves the axis of rows to the front of every leaf."""
  return jax.tree.map(lambda i, x: jnp.moveaxis(x, i, 0), axes, state)


def add_row_axis(axes: Any, row: Any) -> Any:
  """One row of a state, as the state of one row."""
  return jax.tree.map(lambda i, x: jnp.expand_dims(x, i), axes, row)


def drop_row_axis(axes: Any, state: Any) -> Any:
  """The state of one row, without the axis of rows."""
  return jax.tree.map(lambda i, x: jnp.squeeze(x, i), axes, state)


def where(rows: jax.Array, new: Any, old: Any) -> Any:
  """Takes whole rows from one of two trees.

  Args:
    rows: bool [b].
    new: A tree of [b, ...].
    old: A tree like `new`.

  Returns:
    A tree like `old`, with its types.
  """

  def leaf(a, b):
    picked = rows.reshape(rows.shape + (1,) * (b.ndim - 1))
    return jnp.where(picked, a, b).astype(b.dtype)

  return jax.tree.map(leaf, new, old)


def norm(tree: Any) -> jax.Array:
  """Euclidean norm of each row of a tree of [b, ...], [b]; no gradient."""
  squares = [
    jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))
    for x in map(_wide, jax.tree.leaves(jax.lax.stop_gradient(tree)))
  ]
  return jnp.sqrt(sum(squares))


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
