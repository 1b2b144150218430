"""Parts of nested dicts, such as the parameters that are trained."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from nested_learning import parameters


def select(
  tree: Mapping[str, Any],
  keep: Callable[[str], bool],
  *,
  is_leaf: Callable[[Any], bool] | None = None,
) -> dict[str, Any]:
  """Returns the leaves with some paths, in dicts without the others.

  Args:
    tree: A nested dict.
    keep: `keep(path)` says which leaves stay, by paths such as 'blocks/norm'.
    is_leaf: As for `jax.tree.map`.
  """
  found = {}
  for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf):
    if not keep(parameters.path_name(path)):
      continue
    below = found
    for key in path[:-1]:
      below = below.setdefault(key.key, {})
    below[path[-1].key] = leaf
  return found


def merge(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a nested dict with the leaves of two; those of `other` win."""
  merged = dict(tree)
  for name, value in other.items():
    both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
    merged[name] = merge(merged[name], value) if both else value
  return merged


def paths(
  tree: Any, *, is_leaf: Callable[[Any], bool] | None = None
) -> list[str]:
  """Returns the paths of all leaves, in the order of `jax.tree.leaves`."""
  found = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
  return [parameters.path_name(path) for path, _ in found]
