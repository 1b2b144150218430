"""Declarations of parameters: shape, logical axes, init and weight decay.

A table is a nested dict whose leaves are `Param`. Initial values, counts,
abstract shapes, shardings and the mask of weight decay derive from the table,
so that they cannot disagree.
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
    shape: Shape of the array.
    axes: Logical name of each axis ('embed', 'heads', 'mlp', 'vocab', ...), or
      None for an axis that is never sharded.
    init: `init(key, shape, dtype)` returns the initial value.
    decay: Whether weight decay acts on it. True for matrices that project
      activations; False for scales, biases, filters, embeddings and initial
      memories, whose size carries information.
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
  """Returns an initializer that draws from a normal distribution."""
  return jax.nn.initializers.normal(stddev)


def fan_in(size: int, scale: float = 1.0) -> Initializer:
  """Returns a normal initializer with deviation scale / sqrt(size).

  Sums over `size` inputs with entries of size one have size `scale`.
  """
  return normal(scale / math.sqrt(size))


def constant(value: float) -> Initializer:
  """Returns an initializer that fills with one value."""
  return jax.nn.initializers.constant(value)


def values(make: Callable[[], Any]) -> Initializer:
  """Returns an initializer that broadcasts given values, such as one per head.

  Args:
    make: Makes the values; called when the parameters are initialised.
  """
  return lambda key, shape, dtype: jnp.broadcast_to(
    jnp.asarray(make(), dtype), shape
  )


def stack(table: Table, num_layers: int) -> Table:
  """Returns the table of equal layers, stacked along a leading axis."""

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
  """Draws the initial values of a table.

  Each parameter's key is derived from its path, so that adding or removing a
  parameter leaves the others unchanged.

  Args:
    key: A key from `jax.random.key`.
    table: Declarations of the parameters.
    dtype: Type of every parameter.

  Returns:
    A nested dict of arrays with the table's structure.
  """

  def leaf(path, param):
    path_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
    return param.init(path_key, param.shape, dtype)

  return jax.tree_util.tree_map_with_path(leaf, table, is_leaf=_is_param)


def path_name(path) -> str:
  """Writes the path of a tree as text, such as 'blocks/mixer/gate'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def abstract(table: Table, dtype=jnp.float32) -> Any:
  """Returns the table as `jax.ShapeDtypeStruct`s, without allocating arrays."""
  return jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, dtype), table, is_leaf=_is_param
  )


def count(table: Table) -> int:
  """Returns the number of weights in a table."""
  leaves = jax.tree.leaves(table, is_leaf=_is_param)
  return sum(math.prod(p.shape) for p in leaves)


def map_params(function: Callable[[Param], Any], table: Table) -> Any:
  """Applies `function` to every `Param` of a table."""
  return jax.tree.map(function, table, is_leaf=_is_param)


def _is_param(x: Any) -> bool:
  return isinstance(x, Param)
