"""What a token writes: its feed, its errors, and each map's rates.

The token loop and the chunk scan share everything in this file; they differ
only in how they solve the update rule.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning.memory import interface
from nested_learning.memory import networks
from nested_learning.memory import rule as rules

# Added to the square of a hidden input's norm, of which there may be nothing.
_SMALL_SQUARE = 1e-2


class Seen(NamedTuple):
  """Tokens as an anchor sees them."""

  feed: interface.Feed
  inputs: dict[str, jax.Array]  # of each map, for the key
  outputs: dict[str, jax.Array]  # of each map, for the key
  deltas: dict[str, jax.Array]  # error at each map's output
  read: jax.Array | None  # from the anchor, with rule.read 'chunk'


def evaluate(
  network: networks.Network,
  rule: interface.Rule,
  anchor: Any,
  inputs: Any,
  project: interface.Project,
) -> Seen:
  """What the tokens write and read, and the errors, seen from the anchor.

  Args:
    network: What the memory is.
    rule: How it is written and read.
    anchor: Weights per map, [b, h, ..., out, in] or without b.
    inputs: What `project` takes, a pytree of [b, h, t, ...].
    project: Makes the `Feed` of the tokens, or None where the inputs are it.

  Returns:
    The `Seen`; its deltas are the objective's gradient at each map's output.
  """
  linear = networks.linear_of(anchor)
  feed = inputs if project is None else project(anchor, inputs)
  target = feed.value[:, :, None], feed.value[:, :, None, :, :0]
  if rule.target == 'own':
    vectors, scalars = network.apply(linear, feed.value)
    if rule.normalize_target is not None:
      vectors = rule.normalize_target(vectors)
    target = vectors, scalars
  target = networks.Outputs(*target)

  def loss(bumps):
    maps = {}

    def bumped(name, x):
      y = linear(name, x)
      maps[name] = x, y
      return y if bumps is None else y + bumps[name]

    prediction = network.apply(bumped, feed.key)
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
    read = read_vector(network, linear, feed.query)
  return Seen(feed, map_inputs, map_outputs, deltas, read)


def read_vector(
  network: networks.Network, linear: networks.Linear, query: jax.Array
) -> jax.Array:
  """The vector [b, h, t, d] that a one-vector network gives for a query."""
  return network.apply(linear, query).vectors[:, :, 0]


def feed_rates(feed: interface.Feed, write: jax.Array | None) -> rules.Rates:
  """The rates at which tokens write the map that reads the key."""
  return rules.Rates(feed.inner_lr, feed.retention, feed.momentum, write)


def map_rates(
  rule: interface.Rule, name: str, seen: Seen, write: jax.Array | None
) -> rules.Rates:
  """The rates of one map: inner_lr is the share that the delta rule erases.

  Keys have norm one; hidden inputs have any, and are taken as if they had been
  normalised, as NL eq. 57 has them.
  """
  rates = per_map(feed_rates(seen.feed, write), name)
  if name == 'in' or not erases(rule, name, seen.inputs):
    return rates
  square = jnp.sum(jnp.square(seen.inputs[name]), axis=-1, keepdims=True)
  return rates._replace(inner_lr=rates.inner_lr / (square + _SMALL_SQUARE))


def per_map(tree: Any, name: str) -> Any:
  """Adds the role axis that hidden maps have: [b, h, ...] -> [b, h, 1, ...]."""
  if name == 'in':
    return tree
  return jax.tree.map(lambda x: x[:, :, None], tree)


def erases(rule: interface.Rule, name: str, maps: Iterable[str]) -> bool:
  """Whether the delta rule acts on one of a memory's maps."""
  erased = {
    'none': False,
    'input': name == 'in',
    'output': _makes_output(name, maps),
    'every_map': True,
  }[rule.erase]
  return erased and learns(rule, name, maps)


def learns(rule: interface.Rule, name: str, maps: Iterable[str]) -> bool:
  """Whether tokens write one of a memory's maps."""
  return rule.learns == 'every_map' or _makes_output(name, maps)


def _makes_output(name: str, maps: Iterable[str]) -> bool:
  return name != 'in' or not {'vector', 'scalar'}.intersection(maps)


def error_weights(rule: interface.Rule, feed: interface.Feed) -> jax.Array:
  """What tokens' errors are weighted with in steps that sum several."""
  return feed.weight if rule.step == 'orthogonal' else feed.inner_lr


def reference(rule: interface.Rule, initial: jax.Array) -> jax.Array | None:
  """What retention decays a map towards; None is zero."""
  return initial if rule.retain_to == 'initial' else None


def bound(
  rule: interface.Rule, initial: Any, memory: Any, trace: Any
) -> tuple[Any, Any]:
  """Scales back what left the initial memory farther than max_norm.

  The trace is scaled with it: it would carry the memory out again.

  Args:
    rule: Of the memory.
    initial: Initial memory per map, [(b,) h, ..., out, in].
    memory: Its weights.
    trace: Its momentum's buffer, or None.

  Returns:
    Memory and trace.
  """
  if rule.max_norm is None:
    return memory, trace

  def factor(start, weights):
    square = jnp.sum(jnp.square(weights - start), axis=(-1, -2), keepdims=True)
    return jnp.minimum(1.0, rule.max_norm * jax.lax.rsqrt(square + 1e-12))

  factors = jax.tree.map(factor, initial, memory)
  memory = jax.tree.map(
    lambda f, start, w: start + f * (w - start), factors, initial, memory
  )
  return memory, trace and jax.tree.map(jnp.multiply, factors, trace)


def result(
  rule: interface.Rule, read: jax.Array | None, feed: interface.Feed
) -> interface.Result:
  """What the tokens give: their read, or their feed where nothing is read."""
  return interface.Result(read, feed if rule.read == 'none' else None)
