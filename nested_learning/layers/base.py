"""Types of layers: parameters, state and two pure functions."""

from collections.abc import Callable
import enum
from typing import Any, NamedTuple, Protocol

import jax

from nested_learning import parameters


@jax.tree_util.register_static
class Part(enum.Enum):
  """Blocks of a trunk, by where the blocks that learn begin."""

  BELOW = 'below'
  ABOVE = 'above'


class TokenInfo(NamedTuple):
  """Facts about the tokens of a call.

  Attributes:
    reset: bool [b, t], True at the first token of a document, which forgets
      everything before it in its row; None for no document borders.
    mask: bool [b, t], False for padding, which changes no state; None for no
      padding.
    write: Whether memories are written; False only reads them.
    local_loss: A `layers.local_losses.LocalLoss` whose gradients the levels of
      the chain return, or None. Only trunks read it.
    part: Blocks that a trunk applies, of `models.stacks`; None for all.
  """

  reset: jax.Array | None = None
  mask: jax.Array | None = None
  write: bool = True
  local_loss: Any = None
  part: Part | None = None


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
  """Recomputes a function in the backward pass, which saves its inputs only.

  Use it around elementwise operations, which cost less than the memory of their
  results. A matrix product at the end is not recomputed: its gradient needs its
  inputs alone.

  Args:
    function: A function of arrays.

  Returns:
    The same function.
  """
  # Blocks run in a scan, in which XLA cannot merge the recomputation with the
  # forward pass: the barriers that prevent this would only cost time.
  return jax.checkpoint(function, prevent_cse=False)


class Layer(NamedTuple):
  """A layer as a table of parameters and two pure functions.

  Attributes:
    table: Declarations of the parameters, see `nested_learning.parameters`.
    init_state: `init_state(params, batch_size) -> state` at a stream's start.
    apply: `apply(params, state, inputs, info) -> (outputs, state)` with inputs
      and outputs [b, t, e] and a `TokenInfo`. `state=None` means a stream's
      start, which is faster than a call with the state of `init_state`.
  """

  table: parameters.Table
  init_state: Callable[[Any, int], Any]
  apply: Callable[[Any, Any, jax.Array, TokenInfo], tuple[jax.Array, Any]]


def make_layer(
  table: parameters.Table,
  init_state: Callable[[Any, int], Any],
  apply: Callable[[Any, Any, jax.Array, TokenInfo], tuple[jax.Array, Any]],
) -> Layer:
  """Makes a layer whose calls without tokens leave the state unchanged.

  Args:
    table: See `Layer`.
    init_state: See `Layer`.
    apply: See `Layer`; called with at least one token.

  Returns:
    A `Layer`.
  """

  def apply_any(params, state, inputs, info):
    if inputs.shape[1]:
      return apply(params, state, inputs, info)
    if state is None:
      state = init_state(params, inputs.shape[0])
    return inputs, state

  return Layer(table, init_state, apply_any)


class MixerConfig(Protocol):
  """Config of a layer that mixes tokens."""

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; False if its state can be full."""

  @property
  def granularity(self) -> int:
    """Tokens per device must be a multiple of it if devices share a row."""

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> Layer:
    """Makes the layer.

    Args:
      embed_dim: Width e of inputs and outputs.
      dtype: Type of the projections.
      max_length: Longest stream in tokens; needed if `holds_any_length` is
        False.

    Returns:
      A `Layer`.
    """
