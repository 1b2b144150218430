"""Streams: states that go on from step to step, and reading by segments."""

from typing import Any

import jax

from nested_learning import levels
from nested_learning.levels import trees
from nested_learning.models import model as model_lib


def restart(
  model: model_lib.Model, params: Any, state: Any, rows: jax.Array
) -> Any:
  """Begins new streams in some rows.

  Args:
    model: The model.
    params: Its parameters.
    state: Its state.
    rows: bool [b].

  Returns:
    The state; memories and levels of these rows are where streams start.
  """
  if model.reader is not None:
    return model.reader.restart(params, state, rows, levels=True)
  axes = trees.row_axes(model.init_state, params)
  both = model.init_state(params, rows.shape[0]), state
  picked = trees.where(rows, *(trees.rows_first(axes, x) for x in both))
  return trees.rows_back(axes, picked)


def follow(model: model_lib.Model, state: Any, old: Any, new: Any) -> Any:
  """Moves the levels of streams by the difference of two parameters.

  A stream that goes on after an optimiser step thus keeps what its levels have
  learned, and gets what training has learned. With `old` a constant that equals
  `new`, no value changes, and the levels get a gradient.

  Args:
    model: The model.
    state: Its state, perhaps with more axes in front, or None.
    old: Parameters before.
    new: Parameters after.

  Returns:
    The state; that of a model without levels that learn does not change.
  """
  if model.reader is None or state is None:
    return state
  return model.reader.follow(state, old, new)


def read_by_segments(model: model_lib.Model, size: int) -> model_lib.Model:
  """Returns a model that reads segments, as one whose levels learn.

  Its memories hold the same bits however a stream is cut into calls, because a
  segment that was read in pieces is read again whole.

  Args:
    model: A model without levels that learn.
    size: Tokens of a segment.
  """
  labels = model_lib.level_labels(model.config, model.table, of='chain')
  resting = jax.tree.map(lambda _: 'base', labels)
  spec = levels.StepSpec((), resting, resting_size=size)
  reader = levels.make_reader(
    levels.ReaderSpec(model.forward, model.init_state, spec)
  )
  return model_lib.with_reader(model, reader)
