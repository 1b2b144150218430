"""Checksums of arrays, the same wherever they are computed.

A checksum is the sum modulo 2^32 of an array's words times odd weights made
from their places. Any one changed word changes it, and being integer
arithmetic it is the same on one device, on any mesh and in NumPy.
"""

import json
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from nested_learning import parameters


def inspect(tree: Any) -> dict[str, tuple[int, bool]]:
  """The checksum of every array of a tree, and whether it is all finite.

  It runs on the devices that hold the arrays.

  Args:
    tree: Arrays of floating, integer or boolean types.

  Returns:
    From path to checksum and finiteness.
  """
  names = [
    parameters.path_name(path) for path, _ in jax.tree.leaves_with_path(tree)
  ]
  values = jax.device_get(_inspect(jax.tree.leaves(tree)))
  return {
    name: (int(checksum), bool(finite))
    for name, (checksum, finite) in zip(names, values, strict=True)
  }


def of_numpy(x: np.ndarray) -> int:
  """The checksum that `inspect` gives, computed without a device."""
  if x.dtype == np.bool_:
    x = x.astype(np.uint8)
  word = np.dtype(_word(x.dtype))
  words = np.ascontiguousarray(x).reshape(*x.shape, 1).view(word)
  if x.dtype.itemsize <= word.itemsize:
    words = words[..., 0]
  # The weights are a product over axes, so that one axis goes at a time.
  total = words.astype(np.uint32)
  for axis in reversed(range(words.ndim)):
    index = np.arange(words.shape[axis], dtype=np.uint32)
    total = np.matmul(total, 2 * (index * _factor(axis)) + 1)
  return int(total)


def of_json(value: Any) -> int:
  """The checksum of a value that JSON can hold, whatever its spacing."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _inspect(leaves):
  return [(_checksum(x), jnp.all(jnp.isfinite(x))) for x in leaves]


def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, _word(x.dtype)).astype(jnp.uint32)
  weights = jnp.ones(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    weights *= 2 * (index * _factor(axis)) + 1
  return jnp.sum(words * weights, dtype=jnp.uint32)


def _word(dtype):
  return {1: jnp.uint8, 2: jnp.uint16}.get(dtype.itemsize, jnp.uint32)


def _factor(axis: int) -> np.uint32:
  """An odd number for every axis, so that every word's weight is odd."""
  return np.uint32(zlib.crc32(bytes([axis])) | 1)
