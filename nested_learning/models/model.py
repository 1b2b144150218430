"""A model: a trunk with an input and an output, as pure functions.

    model = make_model(config)
    logits, state = model.forward(params, state, tokens)

One `forward` trains, evaluates and generates. Splitting a stream into calls
anywhere, also token by token, gives the same logits.
"""

from collections.abc import Callable
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning import levels
from nested_learning import parameters
from nested_learning.layers import base
from nested_learning.layers import local_losses
from nested_learning.models import heads
from nested_learning.models import learning as learning_lib
from nested_learning.models import stacks
from nested_learning.models import trunk as trunk_lib

_LANGUAGE = heads.LanguageHead()


class Model(NamedTuple):
  """A model as pure functions.

  Attributes:
    config: The config that it was made from.
    head: Its inputs and outputs.
    table: Its parameters, see `nested_learning.parameters`.
    init_params: `init_params(key) -> params`.
    init_state: `init_state(params, batch_size) -> state` at a stream's start.
    forward: See `make_model`.
    decode: `decode(params, state, tokens, *, mask=None)` is `forward` for
      tokens that the model itself has generated: memories are written, and
      levels that learn inside the sequence do not learn from them. The state
      must not be given to `forward` again.
    to_layers: `to_layers(params, state)` returns both in another form, which
      `decode` takes too and is faster with; `from_layers(state)` undoes it.
    losses: `losses(params, state, tokens, targets, token_loss, *, reset=None)`
      returns the losses [b, t] of whole segments and the state, and takes less
      memory than `forward` followed by the loss; None for a model whose levels
      do not learn inside the sequence.
    reader: Functions of the levels that learn inside the sequence, by segment;
      None for a model without such levels.
  """

  config: trunk_lib.ModelConfig
  head: heads.Head
  table: parameters.Table
  init_params: Callable[[jax.Array], Any]
  init_state: Callable[[Any, int], Any]
  forward: Callable[..., tuple[jax.Array, Any]]
  decode: Callable[..., tuple[jax.Array, Any]]
  to_layers: Callable[[Any, Any], tuple[Any, Any]]
  from_layers: Callable[[Any], Any]
  losses: Callable[..., tuple[jax.Array, Any]] | None = None
  reader: levels.Reader | None = None


def make_model(
  config: trunk_lib.ModelConfig,
  inner: levels.InnerConfig | None = None,
  *,
  head: heads.Head = _LANGUAGE,
) -> Model:
  """Makes the model of a config.

  Its `forward(params, state, tokens, *, reset=None, mask=None, write=True)`
  takes tokens int [b, t] and a state (None at a stream's start), and returns
  logits [b, t, v] in float32 and the state after the tokens. `reset` bool
  [b, t] marks first tokens of documents, `mask` bool [b, t] is False for
  padding, `write=False` reads memories without writing them.

  With `inner`, levels of every row learn from what the row reads. The
  parameters are those of the model without it, and no call changes them; the
  state holds each row's own weights of its levels.

  Args:
    config: Sizes, mixer and levels.
    inner: Levels that learn inside the sequence; None, or a config that is off,
      for none.
    head: Inputs and outputs; logits of the next token by default.

  Returns:
    A `Model`.

  Raises:
    errors.UserError: `inner` does not fit the chain of levels, or the head has
      no next token to learn from.
  """
  trunk = trunk_lib.make_trunk(config)
  table, forward = head.make(config, trunk)

  def decode(params, state, tokens, *, mask=None):
    return forward(params, state, tokens, mask=mask)

  model = Model(
    config=config,
    head=head,
    table=table,
    init_params=lambda key: parameters.init(key, table),
    init_state=trunk.init_state,
    forward=forward,
    decode=decode,
    to_layers=stacks.split_layers,
    from_layers=stacks.join_layers,
  )
  if inner is None or not inner.is_on:
    return model
  if not head.predicts_tokens:
    raise errors.UserError(
      f'inner.levels, with update_every={inner.update_every}: a model with '
      f'{type(head).__name__} has no next token for levels to learn from; set '
      'inner.levels=().'
    )
  return with_reader(model, _make_reader(model, trunk, inner))


def with_reader(model: Model, reader: levels.Reader) -> Model:
  """Returns a model whose functions are those of a reader."""

  def decode_at_rest(params, state, tokens, *, mask=None):
    # The open segment may overflow its buffer: no level looks at it again.
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    reset = jnp.zeros(tokens.shape, bool)
    return reader.read_piece(params, state, tokens, reset=reset, mask=mask)

  return model._replace(
    init_state=reader.init_state,
    forward=reader.read,
    decode=decode_at_rest,
    to_layers=lambda params, state: (reader.prepare(params), state),
    from_layers=lambda state: state,
    losses=reader.losses,
    reader=reader,
  )


def level_labels(
  config: trunk_lib.ModelConfig,
  table: parameters.Table | None = None,
  *,
  of: Literal['training', 'chain'] = 'training',
) -> Any:
  """Labels each parameter with its level, or 'base' outside the chain.

  Args:
    config: The model.
    table: Table of a model with another head; None for the language model.
    of: 'chain' labels every level; 'training' labels levels 'base' as well
      that have neither a clock nor an optimiser of their own.

  Returns:
    A tree of names with the table's structure.
  """
  labels = {
    level.name: 'base'
    if of == 'training' and not level.trains_apart
    else level.name
    for level in config.levels
  }

  def label(path, _):
    names = parameters.path_name(path).split('/')
    in_block = names[2:] if config.is_grouped else names[1:]
    return labels[in_block[1]] if in_block[:1] == ['levels'] else 'base'

  table = make_model(config).table if table is None else table
  return jax.tree_util.tree_map_with_path(
    label, table, is_leaf=lambda x: isinstance(x, parameters.Param)
  )


def _make_reader(
  model: Model, trunk: base.Layer, inner: levels.InnerConfig
) -> levels.Reader:
  """Makes the last blocks' levels learn, split as by `stacks.split_blocks`."""
  config = model.config
  learning = levels.make_levels(inner, [level.name for level in config.levels])
  num_blocks = config.num_layers // len(config.pattern)
  num_last = inner.num_blocks(num_blocks)
  labels = inner.own_labels(level_labels(config, model.table, of='chain'))
  local_levels = {
    level.name: local_losses.LocalLevel(level.objective, level.dgd)
    for level in learning
    if level.objective in local_losses.OBJECTIVES
  }
  below = num_blocks - num_last
  split = learning_lib.make_split(config, model.head, trunk, below)
  local_sums = None
  if local_levels:
    split = None  # the blocks above do not see the embeddings for the losses
    if not isinstance(model.head, heads.LanguageHead):
      name, level = next(iter(local_levels.items()))
      raise errors.UserError(
        f'objective={level.objective!r} of level {name!r} is about the '
        f'embedding of the next token, which {type(model.head).__name__} does '
        "not have; set objective='next_token'."
      )
    local_sums = learning_lib.make_local_sums(config, trunk, local_levels)
  return levels.make_reader(
    levels.ReaderSpec(
      model.forward,
      model.init_state,
      levels.StepSpec(
        learning,
        stacks.split_labels(labels, num_blocks, num_last),
        reduce=inner.reduce,
        nested=config.chain.connection == 'nested',
        max_drift=inner.max_drift,
      ),
      gradient=inner.gradient,
      local_sums=local_sums,
      split=split,
      prepare=functools.partial(stacks.split_blocks, num_last=num_last),
    ),
    rank=inner.rank if inner.learns == 'low_rank' else None,
  )
