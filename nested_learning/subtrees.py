"""Parts of nested dicts, such as the parameters that are trained."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from nested_learning import parameters


def select(
  tree: Mapping[str, Any], keep: Callable[[str], bool], *, below: str = ''
) -> dict[str, Any]:
  """Returns the leaves with some paths, in dicts without the others.

  Args:
    tree: A nested dict. Empty dicts in it stay.
    keep: `keep(path)` says which leaves stay, by paths such as 'blocks/norm'.
    below: Path of the tree, with a slash at its end; '' for the root.
  """
  found = {}
  for name, value in tree.items():
    path = f'{below}{name}'
    if isinstance(value, Mapping):
      selected = select(value, keep, below=f'{path}/')
      if selected or not value:
        found[name] = selected
    elif keep(path):
      found[name] = value
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
