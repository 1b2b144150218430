"""One table declares every parameter: its shape, its logical axes, its init.

A table is a nested dict whose leaves are `Param`. Initial values, counts,
abstract shapes and shardings all derive from it, so that none of them can
disagree with another.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp

Table = Mapping[str, Any]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Param:
  """Declaration of one parameter.

  Attributes:
    shape: Its shape.
    axes: The logical name of each axis ('embed', 'heads', 'mlp', 'vocab', ...)
      or None for an axis that is never sharded.
    init: `init(key, shape, dtype)` gives the initial value.
    decay: Whether weight decay pulls it to zero. True for the matrices that
      project activations; False for scales, biases, filters, embeddings and
      initial memories, whose size is part of what they say.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: Initializer
  decay: bool = dataclasses.field(kw_only=True)

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(
        f'shape={self.shape} and axes={self.axes} differ in length; name every '
        'axis.'
      )


def normal(stddev: float) -> Initializer:
  """An initializer that draws from a normal distribution."""
  return jax.nn.initializers.normal(stddev)


def fan_in(size: int, scale: float = 1.0) -> Initializer:
  """Normal with standard deviation scale / sqrt(size), `size` inputs summed."""
  return normal(scale / math.sqrt(size))


def constant(value: float) -> Initializer:
  """An initializer that fills with one value."""
  return jax.nn.initializers.constant(value)


def values(make: Callable[[], Any]) -> Initializer:
  """An initializer that broadcasts given values, for instance one per head."""
  return lambda key, shape, dtype: jnp.broadcast_to(
    jnp.asarray(make(), dtype), shape
  )


def stack(table: Table, num_layers: int) -> Table:
  """The table of `num_layers` equal layers, stacked along a leading axis."""

  def stacked(param: Param) -> Param:
    def init(key, shape, dtype):
      keys = jax.random.split(key, shape[0])
      return jax.vmap(lambda k: param.init(k, shape[1:], dtype))(keys)

    return dataclasses.replace(
      param,
      shape=(num_layers, *param.shape),
      axes=('layers', *param.axes),
      init=init,
    )

  return jax.tree.map(stacked, table, is_leaf=_is_param)


def init(key: jax.Array, table: Table, dtype=jnp.float32) -> Any:
  """Initial values of a table.

  Each parameter's key is derived from its path, so that adding or removing one
  leaves the others as they were.

  Args:
    key: A key from `jax.random.key`.
    table: The parameters.
    dtype: Type of every parameter.

  Returns:
    A nested dict of arrays with the table's structure.
  """

  def leaf(path, param):
    path_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
    return param.init(path_key, param.shape, dtype)

  return jax.tree_util.tree_map_with_path(leaf, table, is_leaf=_is_param)


def path_name(path) -> str:
  """A tree path as text, for instance 'blocks/mixer/gate'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def abstract(table: Table, dtype=jnp.float32) -> Any:
  """The table as `jax.ShapeDtypeStruct`s: nothing is allocated."""
  return jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, dtype), table, is_leaf=_is_param
  )


def count(table: Table) -> int:
  """Number of parameters in a table."""
  leaves = jax.tree.leaves(table, is_leaf=_is_param)
  return sum(math.prod(p.shape) for p in leaves)


def map_params(function: Callable[[Param], Any], table: Table) -> Any:
  """Applies `function` to every `Param` of a table."""
  return jax.tree.map(function, table, is_leaf=_is_param)


def _is_param(x: Any) -> bool:
  return isinstance(x, Param)
