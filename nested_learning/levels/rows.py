"""A model's forward pass and gradients, each row with its own levels."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning import errors
from nested_learning import optimizers
from nested_learning.levels import steps
from nested_learning.levels import trees

# Losses of the model's logits; all other objectives are local.
_GLOBAL = ('next_token', 'in_segment')


class Split(NamedTuple):
  """A model in two parts: blocks that rest, and those above, which learn.

  Attributes:
    num_below: Length of the part below of each leaf of the model's state.
    max_length: Most tokens of a call.
    below: `below(params, state, tokens, *, reset=None)` returns the output x
      [b, t, e] of the blocks that rest, and their states.
    above: `above(params, state, x, *, reset=None, mask=None, write=True)`
      returns logits [b, t, v] and the states of the blocks above.
  """

  num_below: int
  max_length: int
  below: Callable[..., tuple[jax.Array, Any]]
  above: Callable[..., tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class ReaderSpec:
  """A model and how its levels learn.

  Attributes:
    forward: `forward` of the model, see `models.make_model`.
    init_state: `init_state` of the model.
    steps: Which levels learn, when and how.
    gradient: How an outer loss is differentiated: 'second_order' through the
      steps, 'first_order' with inner gradients as constants.
    local_sums: `local_sums(params, state, tokens, counts, *, reset)` returns
      logits, the state and `steps.Sums` over the tokens, each weighted by
      counts [b, t], for the levels with a local objective. Its trees have
      values at the paths of the levels' parameters. None if there are none.
    split: The parts of the model; None if it is read in one.
    prepare: See `Reader`. `steps.labels` are those of prepared parameters.
  """

  forward: Callable[..., tuple[jax.Array, Any]]
  init_state: Callable[[Any, int], Any]
  steps: steps.StepSpec
  gradient: str = 'second_order'
  local_sums: Callable[..., tuple[jax.Array, Any, steps.Sums]] | None = None
  split: Split | None = None
  prepare: Callable[[Any], Any] = lambda params: params

  @functools.cached_property
  def objectives(self) -> dict[str, list[str]]:
    """Names of the levels by objective; 'local', the first, for local ones."""
    found = {'local': []}
    for level in self.steps.levels:
      is_global = level.objective in _GLOBAL
      key = level.objective if is_global else 'local'
      found.setdefault(key, []).append(level.name)
    return {key: names for key, names in found.items() if names}

  @functools.cached_property
  def passes(self) -> list[tuple[int, str, list[str]]]:
    """Backward passes of a segment: member, objective and names of levels."""
    groups = self.objectives.items()
    if not self.steps.nested:
      return [(0, objective, names) for objective, names in groups]
    return [
      (i, objective, [name])
      for i, name in enumerate(self.steps.by_name)
      for objective, names in groups
      if name in names
    ]


def forward(
  spec: ReaderSpec,
  params: Any,
  members: Sequence[Mapping[str, Any]],
  model: Sequence[Any],
  tokens: jax.Array,
  *,
  reset: jax.Array | None,
  mask: jax.Array | None,
  write: bool,
) -> tuple[list[jax.Array], tuple[Any, ...]]:
  """Reads tokens, each row with its own levels, which do not change.

  Args:
    spec: The model and how its levels learn.
    params: Prepared parameters.
    members: Weights of the levels by name, rows first, see `steps.members`.
    model: The model's state of each member, rows first.
    tokens: int [b, t].
    reset: bool [b, t] or None.
    mask: bool [b, t] or None.
    write: Whether memories are written.

  Returns:
    Logits [b, t, v] and the model's state, rows first, of each member.
  """
  axes = trees.row_axes(spec.init_state, params)
  row = functools.partial(_forward_row, spec, params, axes, write)
  read = jax.vmap(row)
  said = [
    read(weights, own, tokens, reset, mask)
    for weights, own in zip(members, model, strict=True)
  ]
  logits, model = zip(*said, strict=True)
  return list(logits), model


def sums(
  spec: ReaderSpec,
  params: Any,
  members: Sequence[Mapping[str, Any]],
  model: Sequence[Any],
  tokens: jax.Array,
  reset: jax.Array | None,
  x: jax.Array | None = None,
) -> tuple[dict[str, steps.Sums], list[jax.Array], tuple[Any, ...], jax.Array]:
  """Reads a full segment of every row and differentiates its losses.

  Levels with the same objective share one pass through the model, and those
  with local objectives share one without a backward pass.

  Args:
    spec: The model and how its levels learn.
    params: Prepared parameters.
    members: Weights of the levels by name, rows first, see `steps.members`.
    model: The model's state of each member before the segment, rows first.
    tokens: int [b, s].
    reset: bool [b, s] or None.
    x: Output [b, s, e] of the blocks that rest, if these were read before; then
      the model's states are those of the blocks above.

  Returns:
    Sums over the segment by level [b, ...]; logits [b, s, v] and the model's
    state, rows first, of each member; and the number of targets, float32 [b].
  """
  axes = trees.row_axes(spec.init_state, params)
  row = functools.partial(_sums_row, spec, params, axes)
  found, *rest = jax.vmap(row)(members, model, tokens, reset, x)
  if spec.gradient == 'first_order':
    found = jax.lax.stop_gradient(found)
  return found, *rest


def energy_shapes(
  spec: ReaderSpec, params: Any, model: Any, num_rows: int
) -> dict[str, Any]:
  """Finds the shapes of the energies of a segment; computes nothing.

  Args:
    spec: The model and how its levels learn.
    params: Prepared parameters.
    model: The model's state of each member, rows first.
    num_rows: Rows b.

  Returns:
    Shapes of `steps.Sums.energy` [b, ...], by level; of levels with Delta
    Gradient Descent alone.

  Raises:
    errors.UserError: Such a level has no parameter that multiplies data.
  """
  names = [x.name for x in spec.steps.levels if x.dgd is not None]
  if not names:
    return {}
  shape = num_rows, spec.steps.segment_size

  def find(tokens):
    weights, _ = steps.start(spec.steps, params, num_rows)
    axes = trees.row_axes(spec.init_state, params)
    check = functools.partial(_check_maps, spec, params, axes)
    jax.vmap(check)(weights, model[0], tokens)
    members = [weights] * len(model)
    found, *_ = sums(spec, params, members, model, tokens, None)
    return {name: found[name].energy for name in names}

  return jax.eval_shape(find, jax.ShapeDtypeStruct(shape, jnp.int32))


def _forward_row(
  spec, params, axes, write, weights, model, tokens, reset, mask, x=None
):
  """Returns logits [t, v] and the model's state of one row."""
  add_axis = lambda x: None if x is None else x[None]
  read, inputs = spec.forward, tokens
  if x is not None:
    read, inputs = spec.split.above, x
  logits, model = read(
    optimizers.merge_levels(params, spec.steps.labels, weights),
    trees.add_row_axis(axes, model),
    inputs[None],
    reset=add_axis(reset),
    mask=add_axis(mask),
    write=write,
  )
  return logits[0], trees.drop_row_axis(axes, model)


def _sums_row(spec, params, axes, members, model, tokens, reset, x):
  """Reads a full segment [s] of one row; see `sums`."""
  counts = jnp.ones((tokens.shape[0] - 1,), jnp.float32)  # of targets
  if reset is not None:  # a document does not predict the next one
    counts = 1 - reset[1:].astype(jnp.float32)
  found, said = {}, {}
  for member, objective, names in spec.passes:
    weights = members[member]
    if objective == 'local':
      add, *said[member] = _local_sums(
        spec, params, axes, names, weights, model[member], tokens, reset, counts
      )
    else:
      inputs = weights, model[member], tokens, reset, counts, x
      loss = _make_loss(spec, params, axes, objective, *inputs)
      own = {name: weights[name] for name in names}
      add, *said[member] = _differentiate(spec, loss, own)
    found |= add
  if not spec.passes:  # no level learns
    said[0] = _forward_row(
      spec, params, axes, True, {}, model[0], tokens, reset, None, x
    )
  found = {name: found[name] for name in members[0]}
  logits, after = zip(*said.values(), strict=True)
  return found, list(logits), after, jnp.sum(counts)


def _local_sums(
  spec, params, axes, names, weights, model, tokens, reset, counts
):
  """Returns the sums of levels with a local objective, logits and state."""
  labels = spec.steps.labels
  logits, model, local = spec.local_sums(
    optimizers.merge_levels(params, labels, weights),
    trees.add_row_axis(axes, model),
    tokens[None],
    jnp.pad(counts, (0, 1))[None],
    reset=None if reset is None else reset[None],
  )
  found = {}
  for name in names:
    energy = ()
    if spec.steps.by_name[name].dgd is not None:
      energy = optimizers.select_level(local.energy, labels, name)
    gradient = optimizers.select_level(local.gradient, labels, name)
    found[name] = steps.Sums(gradient, energy)
  return found, logits[0], trees.drop_row_axis(axes, model)


def _make_loss(
  spec, params, axes, objective, weights, model, tokens, reset, counts, x=None
):
  """Makes the summed loss of a segment of one row as a function of levels."""

  def loss(own):
    weights_now = {**weights, **own}
    logits, after = _forward_row(
      spec, params, axes, True, weights_now, model, tokens, reset, None, x
    )
    predicted, targets = logits[:-1], tokens[1:]
    if objective == 'in_segment':
      predicted = _among(targets, predicted)
    losses = optax.softmax_cross_entropy_with_integer_labels(predicted, targets)
    return jnp.sum(losses * counts), (logits, after)

  return loss


def _differentiate(spec, loss, weights):
  """Returns the sums of some levels for one loss, logits and the state."""
  rules = {name: spec.steps.by_name[name].dgd for name in weights}
  if not any(rules.values()):
    gradients, (logits, after) = jax.grad(loss, has_aux=True)(weights)
    found = {name: steps.Sums(x) for name, x in gradients.items()}
    return found, logits, after
  grad = optimizers.value_and_delta_grad(
    loss,
    target={name: dgd and dgd.target for name, dgd in rules.items()},
    erase={name: dgd.erase if dgd else 1.0 for name, dgd in rules.items()},
    num_samples=1,  # sums, which are divided when a level steps
    has_aux=True,
  )
  (_, (logits, after)), gradients, extra = grad(weights)
  found = {
    name: steps.Sums(gradients[name], extra['energy'][name] if dgd else ())
    for name, dgd in rules.items()
  }
  return found, logits, after


def _check_maps(spec, params, axes, weights, model, tokens):
  """Checks that levels with Delta Gradient Descent have linear maps."""
  counts = jnp.ones((tokens.shape[0] - 1,), jnp.float32)
  for objective, names in spec.objectives.items():
    if objective == 'local':  # takes the inputs of the level's own maps
      continue
    loss = _make_loss(
      spec, params, axes, objective, weights, model, tokens, None, counts
    )
    for name in names:
      if spec.steps.by_name[name].dgd is None:
        continue
      maps = optimizers.find_maps(loss, {name: weights[name]})
      if not any(jax.tree.leaves(maps)):
        raise errors.UserError(
          f'level {name!r} has the optimizer dgd, which needs the inputs of '
          'its matrices, and none of its parameters was followed to a product '
          'with data; give it another optimizer, such as sgd.'
        )
  return tokens


def _among(tokens, logits):
  """Restricts logits [t, v] to the tokens [t]."""
  is_there = jnp.zeros(logits.shape[-1:], bool).at[tokens].set(True)
  # Half of the smallest number, so that sums with it stay finite.
  return jnp.where(is_there, logits, jnp.finfo(logits.dtype).min / 2)
