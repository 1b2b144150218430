"""Updates the levels of a model on clocks of their own, as one optimiser.

Nested Learning orders the parts of a model by how often they are updated.
Here, every level owns some of the parameters, an optax transformation, and a
clock that counts tokens.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_learning.optimizers import clocks
from nested_learning.optimizers import level_steps
from nested_learning.optimizers import settings
from nested_learning.optimizers import trees


@dataclasses.dataclass(frozen=True)
class Level:
  """Parameters that share a clock and an optimiser.

  Attributes:
    name: The label of the level's parameters.
    every: Tokens between two updates (steps, if no tokens_per_step is given);
      NL writes C.
    optimizer: Any optax transformation. It sees only this level's parameters,
      and only the steps on which the level updates.
  """

  name: str
  every: int
  optimizer: optax.GradientTransformation


class MultiTimescaleState(NamedTuple):
  """State of `multi_timescale`.

  Attributes:
    step: Steps taken so far, int32.
    levels: State of every level, by name.
  """

  step: jax.Array
  levels: Mapping[str, level_steps.LevelState]


def multi_timescale(
  levels: Sequence[Level],
  label_fn: Callable[[Any], Any] | Any,
  *,
  tokens_per_step: int | None = None,
  reduce: str = 'mean',
  phases: str = 'staggered',
  accumulate: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Updates every level of a model by its own optimiser on its own clock.

  With C_l the period of level l in steps (every / tokens_per_step), f_l its
  optimiser and g_t the gradient of step t,

  .. math::
    \theta^{(l)}_{t+1} = \theta^{(l)}_t + \begin{cases}
      f_l\left(\frac{1}{C_l} \sum_{s=t-C_l+1}^{t} g^{(l)}_s\right)
        & \text{if } t \equiv \text{phase}_l \pmod{C_l} \\
      0 & \text{otherwise.} \end{cases}

  On the other steps, a level costs one addition per parameter: its optimiser
  runs under `jax.lax.cond`. A level with a period of one step is exactly its
  own optimiser and holds no gradient buffer. Schedules inside a level count
  its own updates.

  Deviations from print: the sum of NL eq. 71 has C + 1 terms, so that two
  neighbouring periods share one; here every gradient is used once. The default
  is the mean, the gradient of the loss averaged over the period: neither
  learning rates nor clipping thresholds depend on the clock then. The printed
  form is 'sum'.

  The phase of a level is the step of a period on which it updates. With
  'aligned' it is the last one, so that levels whose periods divide each other
  update together. With 'staggered', levels avoid each other, in their order:
  each takes the latest phase at which the smallest share of its updates falls
  on an update of a level before it (levels that update on every step do not
  count). The first period of a level may then be a few steps short; its mean
  is over the steps that it has. Levels whose periods have no common divisor
  meet now and then.

  Args:
    levels: The levels, in any order; names must differ.
    label_fn: Tree of level names with the structure of the parameters or of a
      prefix of it, or a function from the parameters to such a tree.
    tokens_per_step: Tokens of one training step (batch size times sequence
      length). Every clock must be a multiple of it. None: clocks count steps.
    reduce: 'mean' or 'sum' of the gradients of a period.
    phases: 'staggered' or 'aligned'.
    accumulate: Extra arguments to be reduced like the gradients, by name:
      trees like the parameters, of arrays or shapes. For `dgd`, whose step
      depends on the energy of all inputs since the last update:
      `jax.eval_shape(value_and_grad, params, batch)[2]`.

  Returns:
    An optax gradient transformation. Extra arguments with the structure of the
    parameters are cut to the level's own. Those not accumulated reach its
    optimiser as they are on the update step.

  Raises:
    ValueError: On construction, if a clock is not a multiple of
      tokens_per_step or a setting is unknown; at `init`, if a level matches no
      parameter, a label names no level, or a parameter is not of a floating
      type; at `update`, if an extra argument is missing, or shaped like the
      parameters and not accumulated although a level needs several steps.

  References:
    Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eq. 71.
  """
  levels = tuple(levels)
  periods = clocks.make_periods(levels, tokens_per_step)
  settings.check_choice(('mean', 'sum'), reduce=reduce)
  offsets = clocks.make_phases(tuple(periods.values()), phases)
  offsets = dict(zip(periods, offsets, strict=True))
  optimizers = {
    level.name: optax.with_extra_args_support(level.optimizer)
    for level in levels
  }
  accumulate = dict(accumulate or {})

  def labels_of(tree):
    labels = label_fn(tree) if callable(label_fn) else label_fn
    return trees.broadcast(labels, tree, 'label_fn')

  def init_fn(params):
    # optax.tree.map_params calls init with a placeholder that has no leaves.
    empty = not jax.tree.leaves(params)
    settings.check_params(params)
    labels = None if empty else labels_of(params)
    if not empty:
      _check_labels(labels, periods)
    states = {}
    for name, period in periods.items():
      own = params if empty else trees.select_level(params, labels, name)
      extra = {}
      if period > 1:
        extra = {
          key: _init_extra(example, params, labels, name)
          for key, example in accumulate.items()
        }
      states[name] = level_steps.init(optimizers[name], own, extra, period)
    return MultiTimescaleState(jnp.zeros((), jnp.int32), states)

  def update_fn(updates, state, params=None, **extra_args):
    if params is not None:
      trees.check_like(updates, params, 'the parameters')
    labels = labels_of(updates)
    for name, level in state.levels.items():
      if periods[name] > 1:
        own = trees.select_level(updates, labels, name)
        trees.check_like(own, level.accumulated)
    _check_extra_args(extra_args, accumulate, updates, periods)
    new_updates, new_states = {}, {}
    for name, period in periods.items():
      arguments = (
        trees.select_level(updates, labels, name),
        state.levels[name],
        None if params is None else trees.select_level(params, labels, name),
        _select_extra_args(extra_args, updates, labels, name),
      )
      if period == 1:  # No cond, and no buffer of gradients.
        new_update, new_state = level_steps.update(optimizers[name], *arguments)
      else:
        due = state.step % period == offsets[name]
        new_update, new_state = level_steps.update_if_due(
          optimizers[name], due, reduce, *arguments
        )
      new_updates[name] = new_update
      new_states[name] = new_state
    merged = trees.merge_levels(updates, labels, new_updates)
    step = optax.safe_increment(state.step)
    return merged, MultiTimescaleState(step, new_states)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def telemetry(state) -> dict[str, jax.Array]:
  """Collects the telemetry of levels from any optax state that holds them.

  Args:
    state: An optimiser state with a `MultiTimescaleState` anywhere inside.

  Returns:
    Scalars under '<level>/num_updates', '<level>/gradient_norm',
    '<level>/update_norm' and '<level>/update_ratio'; empty without levels. The
    gradient norm of a dying level falls; the update ratio of a level that does
    not learn is near zero.
  """
  is_levels = lambda node: isinstance(node, MultiTimescaleState)
  nodes = jax.tree.leaves(state, is_leaf=is_levels)
  report = ('num_updates', 'gradient_norm', 'update_norm', 'update_ratio')
  return {
    f'{name}/{field}': getattr(level, field)
    for node in filter(is_levels, nodes)
    for name, level in node.levels.items()
    for field in report
  }


def _select_extra_args(extra_args, updates, labels, name):
  """Cuts extra arguments shaped like the parameters to one level's part."""
  structure = jax.tree.structure(updates)
  return {
    key: trees.select_level(value, labels, name)
    if jax.tree.structure(value) == structure
    else value
    for key, value in extra_args.items()
  }


def _init_extra(example, params, labels, name):
  """Returns zeros for the part of an extra argument that a level gets."""
  # By position: NNX wraps parameters in variables here, but not in `update`.
  leaves, structure = jax.tree.leaves(example), jax.tree.structure(params)
  if not structure.num_leaves:
    return jnp.zeros(())  # params is the placeholder of map_params.
  if len(leaves) != structure.num_leaves:
    raise ValueError(
      f'accumulate has a tree of {len(leaves)} leaves for '
      f'{structure.num_leaves} parameters: give one array or shape for each.'
    )
  tree = structure.unflatten(leaves)
  return trees.zeros(trees.select_level(tree, labels, name))


def _check_extra_args(extra_args, accumulate, updates, periods):
  missing = sorted(set(accumulate) - set(extra_args))
  if missing:
    raise ValueError(
      f'multi_timescale accumulates the extra arguments {missing}, which '
      'update was not given: call update(..., **extra).'
    )
  structure = jax.tree.structure(updates)
  slowest = max(periods, key=periods.get)
  if periods[slowest] == 1 or structure.num_leaves < 2:
    return
  for key, value in extra_args.items():
    if key not in accumulate and jax.tree.structure(value) == structure:
      raise ValueError(
        f'The extra argument {key} has a value per parameter, and level '
        f'{slowest!r} updates every {periods[slowest]} steps, so it would see '
        f'the last value alone: give multi_timescale accumulate='
        f'{{{key!r}: shapes}}.'
      )


def _check_labels(labels, periods):
  found = set(jax.tree.leaves(labels))
  unknown = sorted(str(label) for label in found if label not in periods)
  if unknown:
    raise ValueError(
      f'Labels {unknown} name no level; the levels are {sorted(periods)}.'
    )
  unused = [name for name in periods if name not in found]
  if unused:
    raise ValueError(
      f'Levels {unused} match no parameter; the labels are {sorted(found)}: '
      'correct the name or drop the level.'
    )
