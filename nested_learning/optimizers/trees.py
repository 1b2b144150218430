"""Selects and merges the leaves of a part of the parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def path_name(path) -> str:
  """Writes the path of a parameter, the same with and without NNX variables."""
  # nnx.Param keeps its array in an attribute; gradients are bare arrays.
  if path and path[-1] == jax.tree_util.GetAttrKey('value'):
    path = path[:-1]
  return jax.tree_util.keystr(path) or '(the whole tree)'


def wide(dtype: Any) -> Any:
  """Returns a floating type of at least 32 bits.

  Sums and averages of many steps lose small gradients in 16 bits.
  """
  # Not jnp.promote_types, which strict dtype promotion forbids.
  return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def zeros(tree: Any) -> Any:
  """Returns zeros like a tree, in float32 or wider."""
  return jax.tree.map(
    lambda leaf: jnp.zeros_like(leaf, dtype=wide(leaf.dtype)), tree
  )


def broadcast(prefix: Any, tree: Any, name: str) -> Any:
  """Returns the value of a prefix of a tree for every leaf of the tree.

  Args:
    prefix: Tree of values, a prefix of the tree.
    tree: The tree.
    name: What the values are, for errors.

  Returns:
    A tree like `tree`.

  Raises:
    ValueError: If it is no prefix of the tree.
  """
  try:
    return jax.tree.broadcast(prefix, tree)
  except ValueError:
    paths = lambda tree: _shown(
      path_name(path) for path, _ in jax.tree.leaves_with_path(tree)
    )
    raise ValueError(
      f'{name}, with {paths(prefix)}, is no prefix of the tree of parameters, '
      f'with {paths(tree)}: give a value for every parameter, or for a branch.'
    ) from None


def select_level(tree: Any, labels: Any, name: str) -> Any:
  """Selects the leaves of one level.

  Args:
    tree: Tree with a leaf at every path that `labels` gives this name; its
      other leaves are ignored, and may be missing.
    labels: Tree of level names.
    name: Name of the level.

  Returns:
    A tree with the structure of `labels`, with optax's masked nodes in place of
    the leaves of other levels.

  Raises:
    ValueError: If a leaf is missing.
  """
  own = jax.tree.map(
    lambda label: label if label == name else optax.MaskedNode(), labels
  )
  return match(tree, own, f'A tree of level {name!r}')


def merge_levels(tree: Any, labels: Any, parts: Mapping[str, Any]) -> Any:
  """Replaces the leaves of some levels.

  Args:
    tree: Any tree.
    labels: Tree of level names with its structure.
    parts: From level name to the result of `select_level` on another such tree.

  Returns:
    A tree like `tree`.
  """
  replaced = {
    path_name(path): leaf
    for part in parts.values()
    for path, leaf in jax.tree.leaves_with_path(part)
  }

  def leaf(path, label, old):
    return replaced[path_name(path)] if label in parts else old

  return jax.tree_util.tree_map_with_path(leaf, labels, tree)


def match(tree: Any, like: Any, name: str) -> Any:
  """Selects the leaves of a tree at the paths of another one.

  Args:
    tree: Tree with a leaf at every path of `like`; it may have more.
    like: A part of the parameters, as in `optax.masked`.
    name: What the tree is, for errors.

  Returns:
    The leaves of `tree`, in a tree like `like`.

  Raises:
    ValueError: If a leaf is missing.
  """
  if jax.tree.structure(tree) == jax.tree.structure(like):
    return tree
  leaves = {
    path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)
  }

  def leaf(path, _):
    if path_name(path) not in leaves:
      raise ValueError(
        f'{name} has no value for the parameter {path_name(path)}; it has '
        f'{_shown(leaves)}.'
      )
    return leaves[path_name(path)]

  return jax.tree_util.tree_map_with_path(leaf, like)


def check_like(gradients: Any, tree: Any, name: str = 'the state'):
  """Checks that gradients are of the parameters that a tree was made for.

  Args:
    gradients: The gradients.
    tree: Tree with an array for every parameter.
    name: What the tree is, for errors.

  Raises:
    ValueError: If one has a parameter that the other lacks, or of another
      shape.
  """
  is_masked = lambda node: isinstance(node, optax.MaskedNode)
  given, known = (
    {
      path_name(path): 'masked' if is_masked(leaf) else np.shape(leaf)
      for path, leaf in jax.tree.leaves_with_path(side, is_leaf=is_masked)
    }
    for side in (gradients, tree)
  )
  for key in sorted(set(given) | set(known)):
    shapes = given.get(key, 'missing'), known.get(key, 'missing')
    if shapes[0] != shapes[1]:
      raise ValueError(
        f'Parameter {key} is {shapes[0]} in the gradients and {shapes[1]} in '
        f'{name}: init and update need the same tree.'
      )


def _shown(names) -> str:
  names = sorted(names)
  return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')
