"""The type of a layer, of its inputs' marks, and of a mixer's config."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from nested_learning import parameters


class TokenInfo(NamedTuple):
  """What is marked on the tokens of a call; None where nothing is.

  Attributes:
    reset: bool [b, t], True at the first token of a document: everything that
      came before in its row is forgotten.
    mask: bool [b, t], False for padding: an exact no-op on every state.
    write: Whether memories write. With False they are read as they stand.
    lesson: A `layers.cms.Lesson` where the levels of a chain say on the way how
      they would learn from it; only trunks look at it.
  """

  reset: jax.Array | None = None
  mask: jax.Array | None = None
  write: bool = True
  lesson: Any = None


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes the backward pass compute elementwise work again, not keep it.

  Of such work the arguments alone are kept, which are there anyway or a few
  among many; a product of matrices that it ends in is not computed again.

  Args:
    function: Of arrays.

  Returns:
    The same function.
  """
  return jax.checkpoint(function, prevent_cse=False)


class Layer(NamedTuple):
  """A layer as a table of parameters and two pure functions.

  Attributes:
    table: Its parameters, see `nested_learning.parameters`.
    init_state: `init_state(params, batch_size) -> state` at a stream's start.
    apply: `apply(params, state, inputs, marks) -> (outputs, state)` with inputs
      and outputs [b, t, e]. `state=None` means a stream's start, and spares the
      bookkeeping that a call in the middle of a stream needs.
  """

  table: parameters.Table
  init_state: Callable[[Any, int], Any]
  apply: Callable[[Any, Any, jax.Array, TokenInfo], tuple[jax.Array, Any]]


def make_layer(
  table: parameters.Table,
  init_state: Callable[[Any, int], Any],
  apply: Callable[[Any, Any, jax.Array, TokenInfo], tuple[jax.Array, Any]],
) -> Layer:
  """Makes a layer; a call without tokens leaves its state as it is.

  Args:
    table: See `Layer`.
    init_state: See `Layer`.
    apply: See `Layer`; it is called with at least one token.

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
  """The config of a layer that mixes tokens."""

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; False if the state can fill up."""

  @property
  def granularity(self) -> int:
    """Tokens that devices must not divide when they share a row."""

  def make(self, *, embed_dim: int, max_length: int, dtype: Any) -> Layer:
    """Makes the layer.

    Args:
      embed_dim: Width e of inputs and outputs.
      max_length: Tokens a stream may have, if `holds_any_length` is False.
      dtype: Type of the projections.

    Returns:
      A `Layer`.
    """
