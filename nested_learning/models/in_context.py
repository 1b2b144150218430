"""A model whose levels learn from what they read, as a model."""

import functools

from nested_learning import errors
from nested_learning.levels import cms
from nested_learning.levels import in_context
from nested_learning.levels import inner
from nested_learning.levels import stream
from nested_learning.models import language_model
from nested_learning.models import stacks


def make_reader(
  model: language_model.Model, config: inner.InnerConfig
) -> stream.Reader:
  """Makes the levels of a model's chain learn while they read.

  Args:
    model: From `make_model`, or another around the same trunk.
    config: Which levels, how often and how.

  Returns:
    A `Reader`. The weights of its levels are those of the last blocks, as
    `stacks.split_blocks` has them.

  Raises:
    errors.UserError: The config does not fit the model's chain.
  """
  names = [level.name for level in model.config.levels]
  learning = inner.make_levels(config, names)
  num_blocks = model.config.num_layers // len(model.config.pattern)
  num_last = config.num_blocks(num_blocks)
  split = functools.partial(stacks.split_blocks, num_last=num_last)
  labels = language_model.level_labels(model.config, model.table, of='chain')
  teach = None
  if config.objective in cms.LOCAL_OBJECTIVES:
    if model.teach is None:
      raise errors.UserError(
        f'inner.objective={config.objective!r} is about the next token, which '
        'this model does not predict; set inner.chunk_sizes=().'
      )
    teach = functools.partial(
      model.teach,
      objective=config.objective,
      names=tuple(level.name for level in learning),
    )
  reader = in_context.make_reader(
    model.forward,
    model.init_state,
    learning,
    stacks.split_labels(labels, num_blocks, num_last),
    reduce=config.reduce,
    nested=model.config.chain.connection == 'nested',
    gradient=config.gradient,
    max_drift=config.max_drift,
    in_segment=config.objective == 'in_segment',
    teach=teach,
  )

  def of_split(function):
    return lambda params, *args, **kwargs: function(
      split(params), *args, **kwargs
    )

  functions = ('init_state', 'read', 'read_segments', 'read_piece', 'losses')
  return reader._replace(
    prepare=split,
    **{name: of_split(getattr(reader, name)) for name in functions},
  )


def learn_in_context(
  model: language_model.Model,
  config: inner.InnerConfig,
  *,
  whole_segments: bool = False,
) -> language_model.Model:
  """The same model, its levels learning while it reads.

  Its parameters are those of `model`, which no call changes; its state has the
  levels of every row. So whatever trains, evaluates or samples a model does
  that with one that learns.

  Args:
    model: From `make_model`.
    config: Which levels, how often and how; if none, `model` is returned.
    whole_segments: Whether every call is of whole segments, with no mask, which
      is a third cheaper.

  Returns:
    A `Model`, with `losses`.
  """
  if not config.is_on:
    return model
  reader = make_reader(model, config)

  def forward(params, state, tokens, *, reset=None, mask=None, write=True):
    if whole_segments and write and mask is None:
      return reader.read_segments(params, state, tokens, reset=reset)
    return reader.read(
      params, state, tokens, reset=reset, mask=mask, write=write
    )

  return model._replace(
    init_state=reader.init_state, forward=forward, losses=reader.losses
  )
