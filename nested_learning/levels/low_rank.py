r"""Levels that learn changes of low rank in place of their matrices.

.. math:: W = W_0 + A B, \quad A \in R^{in \times r}, \; B \in R^{r \times out}

A is drawn and B starts at zero, so that a stream begins with the model as it
is. The state of a level holds A, B and what the optimiser keeps of them: r (in
+ out) numbers of a matrix in place of in * out. Matrices alone learn.

References:
  Hu et al., LoRA, arXiv:2106.09685, 2021.
"""

import dataclasses
import math
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.levels import rows

_LETTERS = 'abcdefghij'


class Changed(NamedTuple):
  """Parameters of a model beside changes of low rank.

  Attributes:
    model: Prepared parameters of the model.
    changes: A tree like `model`, with `Change` at the matrices that learn and
      None elsewhere.
  """

  model: Any
  changes: Any


class Change(NamedTuple):
  """The factors of a change of stacked matrices [l, in, out].

  Attributes:
    a: [l, in, r].
    b: [l, r, out].
  """

  a: Any
  b: Any


def add(matrix: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns stacked matrices with the products of two factors added.

  Args:
    matrix: [l, *in, *out].
    a: [l, *in, r].
    b: [l, r, *out].

  Returns:
    The sum, in the wider type.
  """
  first, last = a.ndim - 2, b.ndim - 2  # axes beside layers and rank
  ins, outs = _LETTERS[:first], _LETTERS[first : first + last]
  product = jnp.einsum(f'l{ins}r,lr{outs}->l{ins}{outs}', a, b)
  # Not in the type of a frozen matrix, whose digits would swallow the change.
  wide = jnp.promote_types(matrix.dtype, product.dtype)
  return matrix.astype(wide) + product


def learn_changes(spec: rows.ReaderSpec, rank: int) -> rows.ReaderSpec:
  """Makes levels learn changes of low rank of their matrices.

  Args:
    spec: A model and how its levels learn. Every parameter with the label of a
      level is a stack of matrices [l, in, out].
    rank: Columns r of A, at most.

  Returns:
    The same for parameters of which `prepare` makes `Changed`.
  """
  labels = spec.steps.labels

  def prepare(params):
    if isinstance(params, Changed):
      return params
    model = spec.prepare(params)
    return Changed(model, _start(model, labels, rank))

  def merged(function):
    return lambda params, *args, **kwargs: function(
      _merge(params), *args, **kwargs
    )

  own = Changed(
    jax.tree.map(lambda _: 'base', labels),
    jax.tree.map(
      lambda label: None if label == 'base' else Change(label, label), labels
    ),
  )
  return dataclasses.replace(
    spec,
    forward=merged(spec.forward),
    init_state=merged(spec.init_state),
    steps=dataclasses.replace(spec.steps, labels=own),
    split=spec.split
    and spec.split._replace(
      below=merged(spec.split.below), above=merged(spec.split.above)
    ),
    prepare=prepare,
  )


def _start(model: Any, labels: Any, rank: int) -> Any:
  """Returns the changes at the start of streams."""

  def factors(path, label, x):
    if label == 'base':
      return None
    layers, num_in, num_out = x.shape
    width = min(rank, num_in, num_out)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    number = zlib.crc32(parameters.path_name(path).encode())
    key = jax.random.fold_in(jax.random.key(0), number)
    a = jax.random.normal(key, (layers, num_in, width), dtype)
    b = jnp.zeros((layers, width, num_out), dtype)
    return Change(a / math.sqrt(num_in), b)

  return jax.tree_util.tree_map_with_path(factors, labels, model)


def _merge(params: Changed) -> Any:
  """Returns the parameters of the model with the changes added."""
  return jax.tree.map(
    lambda change, x: x if change is None else add(x, *change),
    params.changes,
    params.model,
    is_leaf=lambda x: x is None or isinstance(x, Change),
  )
