"""The errors of tokens and the rates of maps, for both engines.

The token loop and the chunk scan share everything in this file; they differ
only in how they solve the update rule.
"""

from collections.abc import Iterable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import sharding
from nested_learning.memory import layout
from nested_learning.memory import networks
from nested_learning.memory import rule as rules

# Added to the square of a hidden input's norm under a quotient: hidden inputs
# may be zero.
_SMALL_SQUARE = 1e-2
_SMALL_NORM = 1e-12  # keeps the inverse root of a zero departure finite


class Errors(NamedTuple):
  """Tokens evaluated with an anchor's weights.

  Attributes:
    token: Their `WriteInputs`.
    inputs: Input of each map for the key, [b, h, (r,) t, i].
    outputs: Output of each map for the key, [b, h, (r,) t, o].
    deltas: Error at the output of each map.
    read: What the anchor reads, [b, h, t, d], with rule.read 'chunk'.
  """

  token: rules.WriteInputs
  inputs: dict[str, jax.Array]
  outputs: dict[str, jax.Array]
  deltas: dict[str, jax.Array]
  read: jax.Array | None


def evaluate(
  network: networks.Network,
  rule: rules.Rule,
  anchor: Any,
  inputs: Any,
  project: rules.Project = None,
) -> Errors:
  """Evaluates tokens with an anchor: their writes, reads and errors.

  Args:
    network: The memory's network.
    rule: How it is written and read.
    anchor: Weights per map, [b, h, ..., out, in] or without b.
    inputs: Inputs of `project`, a pytree of [b, h, t, ...].
    project: Makes the `WriteInputs`; None where the inputs are them.

  Returns:
    The `Errors`; deltas are the objective's gradient at each map's output.
  """
  linear = networks.linear_of(anchor)
  token = inputs if project is None else project(anchor, inputs)
  target = _targets(network, rule, linear, token.value)

  # The gradient with respect to zeros added to a map's output is the gradient
  # at that output.
  def loss(bumps):
    maps = {}

    def bumped(name, x):
      y = linear(name, x)
      maps[name] = x, y
      return y if bumps is None else y + bumps[name]

    prediction = network.apply(bumped, token.key)
    total = sum(
      jnp.sum(rule.objective(p, t))
      for p, t in zip(prediction, target, strict=True)
      if p.size
    )
    return total, maps

  _, maps = jax.eval_shape(loss, None)
  bumps = {name: jnp.zeros(y.shape, y.dtype) for name, (_, y) in maps.items()}
  deltas, maps = jax.grad(loss, has_aux=True)(bumps)
  map_inputs = {name: x for name, (x, _) in maps.items()}
  map_outputs = {name: y for name, (_, y) in maps.items()}
  read = None
  if rule.read == 'chunk':
    read = read_vector(network, linear, token.query)
  return Errors(token, map_inputs, map_outputs, deltas, read)


def _targets(network, rule, linear, value):
  """Returns the objective's targets, `networks.Outputs`."""
  if rule.target == 'value':  # one vector role, no scalar
    value = value[..., None, :, :]
    return networks.Outputs(value, value[..., :0])
  vectors, scalars = network.apply(linear, value)
  if rule.normalize_target is not None:
    vectors = rule.normalize_target(vectors)
  return networks.Outputs(vectors, scalars)


def evaluate_documents(
  network: networks.Network,
  rule: rules.Rule,
  anchor: Any,
  initial: Any,
  inputs: Any,
  project: rules.Project,
  fresh: jax.Array | None,
  has_border: jax.Array | None,
) -> Errors:
  """Evaluates a chunk; after a border the initial memory is the anchor.

  Args:
    network: The memory's network.
    rule: How it is written and read.
    anchor: Weights per map, [b, h, ..., out, in].
    initial: Initial memory per map and row, [b, h, ..., out, in].
    inputs: Inputs of `project`, a pytree of [b, h, t, ...].
    project: As in `evaluate`.
    fresh: bool [b, t], tokens after a border of this chunk; None without.
    has_border: bool, whether any row has a border; None without.

  Returns:
    The `Errors`.
  """
  errors = evaluate(network, rule, anchor, inputs, project)
  if fresh is None:
    return errors

  # A branch must also fill what the other branch saves for the backward pass;
  # recomputed, it saves nothing.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def evaluate_again():
    initially = evaluate(network, rule, rule.weights(initial), inputs, project)
    return layout.where_tokens(fresh[:, None, :, None], initially, errors)

  # Branches lose the shardings of their results, so pin them on both sides.
  pin = sharding.pin_heads
  return pin(
    jax.lax.cond(has_border, lambda: pin(evaluate_again()), lambda: pin(errors))
  )


def read_vector(
  network: networks.Network, linear: networks.Linear, query: jax.Array
) -> jax.Array:
  """Reads the vector [b, h, t, d] of a network of one vector role."""
  return network.apply(linear, query).vectors[..., 0, :, :]


def token_rates(
  inputs: rules.WriteInputs, write: jax.Array | None
) -> rules.Rates:
  """Returns the rates of the map that reads the key."""
  return rules.Rates(inputs.inner_lr, inputs.retention, inputs.momentum, write)


def map_rates(
  rule: rules.Rule, name: str, errors: Errors, write: jax.Array | None
) -> rules.Rates:
  """Returns the rates of one map; inner_lr is the fraction that is erased.

  Keys have norm one. Hidden inputs have any norm, and inner_lr is divided by
  its square, as if they had been normalised (NL eq. 57).
  """
  rates = per_map(token_rates(errors.token, write), name)
  if name == 'in' or not erases(rule, name, errors.inputs):
    return rates
  return normalized(rates, errors.inputs[name])


def normalized(rates: rules.Rates, x: jax.Array) -> rules.Rates:
  """Divides inner_lr by the squared norm of a map's inputs [..., t, i]."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return rates._replace(inner_lr=rates.inner_lr / (square + _SMALL_SQUARE))


def per_map(tree: Any, name: str) -> Any:
  """Adds the role axis of hidden maps: [b, h, t, i] to [b, h, 1, t, i]."""
  if name == 'in':
    return tree
  return jax.tree.map(lambda x: x[..., None, :, :], tree)


def erases(rule: rules.Rule, name: str, maps: Iterable[str]) -> bool:
  """Whether the delta rule acts on one of a memory's maps."""
  erased = {
    'none': False,
    'input': name == 'in',
    'output': _makes_output(name, maps),
    'every_map': True,
  }[rule.erase]
  return erased and learns(rule, name, maps)


def learns(rule: rules.Rule, name: str, maps: Iterable[str]) -> bool:
  """Whether tokens write one of a memory's maps."""
  return rule.learns == 'every_map' or _makes_output(name, maps)


def _makes_output(name: str, maps: Iterable[str]) -> bool:
  return name != 'in' or not {'vector', 'scalar'}.intersection(maps)


def reference(rule: rules.Rule, initial: jax.Array) -> jax.Array | None:
  """Returns W_ref of a map, [..., out, in]; None is zero."""
  return initial if rule.retain_to == 'initial' else None


def bound(
  rule: rules.Rule, initial: Any, memory: Any, trace: Any
) -> tuple[Any, Any]:
  """Scales weights back to within `max_norm` of the initial memory.

  The trace is scaled with them: it would carry the memory out again.

  Args:
    rule: How the memory is written.
    initial: Initial memory per map, [(b,) h, ..., out, in].
    memory: Weights per map, [b, h, ..., out, in].
    trace: The momentum's buffer per map, or None.

  Returns:
    Memory and trace.
  """
  if rule.max_norm is None:
    return memory, trace

  def factor(start, weights):
    square = jnp.sum(jnp.square(weights - start), axis=(-1, -2), keepdims=True)
    return jnp.minimum(1.0, rule.max_norm * jax.lax.rsqrt(square + _SMALL_NORM))

  factors = jax.tree.map(factor, initial, memory)
  memory = jax.tree.map(
    lambda f, start, w: start + f * (w - start), factors, initial, memory
  )
  return memory, trace and jax.tree.map(jnp.multiply, factors, trace)


def result(
  rule: rules.Rule, read: jax.Array | None, inputs: rules.WriteInputs
) -> rules.Result:
  """Returns the tokens' reads, or their inputs where nothing is read."""
  return rules.Result(read, inputs if rule.read == 'none' else None)
