"""The networks that serve as memories: a matrix and a residual MLP.

A network is written once, as a function of `linear(name, x)`, which applies its
linear map `name` to x. Another `linear` makes the same function read a memory,
back-propagate an error to each map, or read each token's own state inside a
chunk.

Memories that are written with the same keys (the roles k, v, inner_lr and
retention of self-modifying Titans) form one network: their input maps are
stacked along the output axis. Each of `num_vectors` roles outputs d numbers,
with a residual connection in the MLP; each of `num_scalars` outputs one, with a
linear skip connection.

Axes: b batch, h head, r role, t token, d head dim, f hidden. The token axis is
always the last but one; b and h may be missing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import parameters
from nested_learning.memory import objectives

Linear = Callable[[str, jax.Array], jax.Array]

# Initial size of W1 h for hidden entries of size one: small, so that a memory
# starts near its residual connection.
_OUT_SCALE = 0.1


class Outputs(NamedTuple):
  """Outputs of a network: vectors [b, h, r, t, d], scalars [b, h, r, t, 1]."""

  vectors: jax.Array
  scalars: jax.Array


class Network(NamedTuple):
  """A network as a table of parameters and two functions.

  Only the map 'in' reads the network's input; every other map has a role axis.

  Attributes:
    table: Initial memory per map, [h, ..., out, in].
    apply: `apply(linear, x) -> Outputs` for x [b, h, t, d].
    read: `read(memory, x, vectors, scalars) -> Outputs` of a range of roles, at
      the cost of these roles; vectors and scalars are pairs (first, last + 1).
  """

  table: parameters.Table
  apply: Callable[[Linear, jax.Array], Outputs]
  read: Callable[[Any, jax.Array, tuple[int, int], tuple[int, int]], Outputs]


# Makes the output [b, h, r, t, d] of vector roles from the network's input,
# [b, h, 1, t, d], and the output of the last map.
Finish = Callable[[jax.Array, jax.Array], jax.Array]


def make_matrix(
  *,
  num_heads: int,
  dim: int,
  num_vectors: int,
  num_scalars: int = 0,
  finish: Finish = lambda x, y: y,
  init: parameters.Initializer | None = None,
) -> Network:
  """Makes M(x) = W x; vector roles start as the identity, scalars at zero.

  Args:
    num_heads: Independent memories h.
    dim: Width d of inputs and vector outputs.
    num_vectors: Roles with d outputs.
    num_scalars: Roles with one output.
    finish: Makes a vector role's output from x and W x.
    init: Another initializer, for all roles.

  Returns:
    A `Network` with the map 'in' [h, num_vectors d + num_scalars, d].
  """
  num_outputs = num_vectors * dim + num_scalars
  identity = lambda: jnp.concatenate(
    [jnp.eye(dim)] * num_vectors + [jnp.zeros((num_scalars, dim))]
  )
  table = {
    'in': parameters.Param(
      (num_heads, num_outputs, dim),
      ('heads', None, None),
      parameters.values(identity) if init is None else init,
      decay=False,
    )
  }

  def apply(linear: Linear, x: jax.Array) -> Outputs:
    y = linear('in', x)
    vectors = _split_roles(y[..., : num_vectors * dim], num_vectors)
    scalars = y[..., num_vectors * dim :]
    if num_vectors:
      vectors = finish(x[..., None, :, :], vectors)
    return Outputs(vectors, _split_roles(scalars, num_scalars))

  def read(memory, x, vectors, scalars):
    part = make_matrix(
      num_heads=num_heads,
      dim=dim,
      finish=finish,
      num_vectors=vectors[1] - vectors[0],
      num_scalars=scalars[1] - scalars[0],
    )
    cuts = [
      (vectors[0] * dim, vectors[1] * dim),
      (num_vectors * dim + scalars[0], num_vectors * dim + scalars[1]),
    ]
    return part.apply(linear_of({'in': _rows(memory['in'], cuts)}), x)

  return Network(table, apply, read)


def make_mlp(
  *,
  num_heads: int,
  dim: int,
  hidden_dim: int,
  num_vectors: int,
  num_scalars: int = 0,
  activation: objectives.Activation,
  finish: Finish = jnp.add,
) -> Network:
  """Makes M(x) = x + W1 activation(W2 x); scalar roles have skip x for x.

  Args:
    num_heads: Independent memories h.
    dim: Width d of inputs and vector outputs.
    hidden_dim: Hidden width f.
    num_vectors: Roles with d outputs.
    num_scalars: Roles with one output.
    activation: Elementwise function.
    finish: Makes a vector role's output from x and W1 activation(W2 x).

  Returns:
    A `Network` with the maps 'in' [h, (num_vectors + num_scalars) f +
    num_scalars, d], 'vector' [h, num_vectors, d, f] and 'scalar' [h,
    num_scalars, 1, f]. Maps without a role are left out.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 89, 91.
  """
  num_hidden = (num_vectors + num_scalars) * hidden_dim

  def init_in(key, shape, dtype):
    # Entries of W2 x have size one for a key of norm one.
    weights = parameters.normal(1.0)(key, shape, dtype)
    is_hidden = jnp.arange(shape[1])[:, None] < num_hidden
    return jnp.where(is_hidden, weights, 0.0)  # skips start at zero

  def out_param(num_roles, out_dim):
    return parameters.Param(
      (num_heads, num_roles, out_dim, hidden_dim),
      ('heads', None, None, None),
      parameters.fan_in(hidden_dim * out_dim, _OUT_SCALE),
      decay=False,
    )

  table = {
    'in': parameters.Param(
      (num_heads, num_hidden + num_scalars, dim),
      ('heads', None, None),
      init_in,
      decay=False,
    )
  }
  if num_vectors:
    table['vector'] = out_param(num_vectors, dim)
  if num_scalars:
    table['scalar'] = out_param(num_scalars, 1)

  def apply(linear: Linear, x: jax.Array) -> Outputs:
    y = linear('in', x)
    hidden = activation(y[..., :num_hidden])
    hidden = _split_roles(hidden, num_vectors + num_scalars)
    vectors = hidden[..., :num_vectors, :, :]
    scalars = _split_roles(y[..., num_hidden:], num_scalars)
    if num_vectors:
      vectors = finish(x[..., None, :, :], linear('vector', vectors))
    if num_scalars:
      scalars = scalars + linear('scalar', hidden[..., num_vectors:, :, :])
    return Outputs(vectors, scalars)

  def read(memory, x, vectors, scalars):
    part = make_mlp(
      num_heads=num_heads,
      dim=dim,
      hidden_dim=hidden_dim,
      num_vectors=vectors[1] - vectors[0],
      num_scalars=scalars[1] - scalars[0],
      activation=activation,
      finish=finish,
    )
    after = num_vectors + scalars[0], num_vectors + scalars[1]
    cuts = [
      (vectors[0] * hidden_dim, vectors[1] * hidden_dim),
      (after[0] * hidden_dim, after[1] * hidden_dim),
      (num_hidden + scalars[0], num_hidden + scalars[1]),
    ]
    weights = {'in': _rows(memory['in'], cuts)}
    for name, (start, stop) in (('vector', vectors), ('scalar', scalars)):
      if stop > start:
        weights[name] = memory[name][..., start:stop, :, :]
    return part.apply(linear_of(weights), x)

  return Network(table, apply, read)


def linear_of(memory: Any) -> Linear:
  """Makes the `linear` that applies one memory to all tokens: y = W x."""
  return lambda name, x: apply_map(memory[name], x)


def apply_map(weights: jax.Array, x: jax.Array) -> jax.Array:
  """Computes W x for weights [..., o, i] and x [..., t, i]: [..., t, o]."""
  if x.ndim == 3:  # only heads may be a second axis of a kernel's product
    return jnp.stack([apply_map(w, y) for w, y in zip(weights, x, strict=True)])
  return jnp.einsum('...oi,...ti->...to', weights, x)


def _rows(weights: jax.Array, cuts: Sequence[tuple[int, int]]) -> jax.Array:
  """Selects outputs of a map [..., o, i]; joins cuts that touch."""
  merged = []
  for start, stop in [cut for cut in cuts if cut[1] > cut[0]]:
    if merged and merged[-1][1] == start:
      start = merged.pop()[0]
    merged.append((start, stop))
  parts = [weights[..., start:stop, :] for start, stop in merged]
  return jnp.concatenate(parts, axis=-2)


def _split_roles(x: jax.Array, num_roles: int) -> jax.Array:
  """Splits the last axis among roles: [..., t, r d] to [..., r, t, d]."""
  if not num_roles:
    return x[..., None, :, :0][..., :0, :, :]
  # Kernels can cut the last axis but not reshape it.
  return jnp.stack(jnp.split(x, num_roles, axis=-1), axis=-3)
