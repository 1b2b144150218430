"""A model's forward pass and gradients, each row with its own levels."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nested_learning.levels import steps
from nested_learning.levels import trees


@dataclasses.dataclass(frozen=True, eq=False)
class ReaderSpec:
  """A model and how its levels learn.

  Attributes:
    forward: `forward` of the model, see `models.make_model`.
    init_state: `init_state` of the model.
    steps: Which levels learn, when and how.
    gradient: How an outer loss is differentiated: 'second_order' through the
      steps, 'first_order' with inner gradients as constants.
    in_segment: Whether a token's loss tells it from the other targets of its
      segment only.
    local_gradients: `local_gradients(params, state, tokens, counts, *, reset)`
      returns logits, the state and, at the paths of the levels' parameters, the
      gradients of a local objective summed over the tokens, each weighted by
      counts [b, t]. They replace those of the next-token loss; None for these.
    prepare: See `Reader`. `steps.labels` are those of prepared parameters.
  """

  forward: Callable[..., tuple[jax.Array, Any]]
  init_state: Callable[[Any, int], Any]
  steps: steps.StepSpec
  gradient: str = 'second_order'
  in_segment: bool = False
  local_gradients: Callable[..., tuple[jax.Array, Any, Any]] | None = None
  prepare: Callable[[Any], Any] = lambda params: params


def forward(
  spec: ReaderSpec,
  params: Any,
  levels: Mapping[str, steps.InnerLevel],
  model: Any,
  tokens: jax.Array,
  *,
  reset: jax.Array | None,
  mask: jax.Array | None,
  write: bool,
) -> tuple[jax.Array, Any]:
  """Reads tokens, each row with its own levels, which do not change.

  Args:
    spec: The model and how its levels learn.
    params: Prepared parameters.
    levels: State of the levels.
    model: The model's state, rows first.
    tokens: int [b, t].
    reset: bool [b, t] or None.
    mask: bool [b, t] or None.
    write: Whether memories are written.

  Returns:
    Logits [b, t, v], and the model's state, rows first.
  """
  axes = trees.row_axes(spec.init_state, params)
  weights = {name: level.params for name, level in levels.items()}
  row = functools.partial(_forward_row, spec, params, axes, write)
  return jax.vmap(row)(weights, model, tokens, reset, mask)


def gradients(
  spec: ReaderSpec,
  params: Any,
  levels: Mapping[str, steps.InnerLevel],
  model: Any,
  tokens: jax.Array,
  reset: jax.Array | None,
) -> tuple[dict[str, Any], jax.Array, Any, jax.Array]:
  """Reads a full segment of every row and differentiates its losses.

  Args:
    spec: The model and how its levels learn.
    params: Prepared parameters.
    levels: State of the levels.
    model: The model's state before the segment, rows first.
    tokens: int [b, s].
    reset: bool [b, s] or None.

  Returns:
    Gradients by level, summed over the segment [b, ...]; logits [b, s, v]; the
    model's state, rows first; and the number of targets, float32 [b].
  """
  axes = trees.row_axes(spec.init_state, params)
  weights = {name: level.params for name, level in levels.items()}
  row = functools.partial(_gradients_row, spec, params, axes)
  found, *rest = jax.vmap(row)(weights, model, tokens, reset)
  if spec.gradient == 'first_order':
    found = jax.lax.stop_gradient(found)
  return found, *rest


def _forward_row(
  spec, params, axes, write, weights, model, tokens, reset, mask
):
  """Returns logits [t, v] and the model's state of one row."""
  add_axis = lambda x: None if x is None else x[None]
  logits, model = spec.forward(
    trees.merge(params, spec.steps.labels, weights),
    trees.add_row_axis(axes, model),
    tokens[None],
    reset=add_axis(reset),
    mask=add_axis(mask),
    write=write,
  )
  return logits[0], trees.drop_row_axis(axes, model)


def _gradients_row(spec, params, axes, weights, model, tokens, reset):
  """Reads a full segment [s] of one row; see `gradients`."""
  counts = jnp.ones((tokens.shape[0] - 1,), jnp.float32)  # of targets
  if reset is not None:  # a document does not predict the next one
    counts = 1 - reset[1:].astype(jnp.float32)
  labels = spec.steps.labels
  if spec.local_gradients is not None:
    logits, model, found = spec.local_gradients(
      trees.merge(params, labels, weights),
      trees.add_row_axis(axes, model),
      tokens[None],
      jnp.pad(counts, (0, 1))[None],
      reset=None if reset is None else reset[None],
    )
    gradients = {name: trees.select(found, labels, name) for name in weights}
    model = trees.drop_row_axis(axes, model)
    return gradients, logits[0], model, jnp.sum(counts)

  def loss(weights):
    logits, after = _forward_row(
      spec, params, axes, True, weights, model, tokens, reset, None
    )
    predicted, targets = logits[:-1], tokens[1:]
    if spec.in_segment:
      predicted = _among(targets, predicted)
    losses = optax.softmax_cross_entropy_with_integer_labels(predicted, targets)
    return jnp.sum(losses * counts), (logits, after)

  gradients, (logits, model) = jax.grad(loss, has_aux=True)(weights)
  return gradients, logits, model, jnp.sum(counts)


def _among(tokens, logits):
  """Restricts logits [t, v] to the tokens [t]."""
  is_there = jnp.zeros(logits.shape[-1:], bool).at[tokens].set(True)
  # Half of the smallest number, so that sums with it stay finite.
  return jnp.where(is_there, logits, jnp.finfo(logits.dtype).min / 2)
