"""The protocol of other ways to write a memory; see `memory/extensions`."""

from collections.abc import Mapping
import typing
from typing import Any, Literal, Protocol

import jax

from nested_learning.memory import layout
from nested_learning.memory import networks

if typing.TYPE_CHECKING:  # `rule.py` imports this file
  from nested_learning.memory import rule as rules


class Extension(Protocol):
  """Another way to write a memory.

  An extension is a frozen dataclass of its settings, set as `Rule.extension`.
  Its memory is static: `project` is None.
  """

  @property
  def inputs(self) -> Mapping[str, Literal['inner_lr', 'fraction']]:
    """Numbers per token that writes need in `WriteInputs.extra`, by name.

    Each is an 'inner_lr', >= 0, or a 'fraction' in [0, 1].
    """

  def check(self, rule: 'rules.Rule') -> None:
    """Raises `errors.UserError` if it is not defined for the rule."""

  def check_network(self, network: networks.Network) -> None:
    """Raises `errors.UserError` if it is not defined for the network."""

  def init_state(self, initial: Any, batch_size: int) -> Any:
    """Makes `State.extra` of a stream's start, a pytree [b, ...], or None."""

  def write_token(
    self,
    network: networks.Network,
    rule: 'rules.Rule',
    initial: Any,
    state: 'rules.State',
    anchor: Any,
    inputs: 'rules.WriteInputs',
    write: jax.Array,
  ) -> tuple[dict[str, 'rules.Carry'], Any]:
    """Writes one token: the definition.

    Args:
      network: The memory's network.
      rule: How it is written and read.
      initial: Initial memory per map, [h, ..., out, in].
      state: Before the token.
      anchor: Weights per map at the start of the chunk, [b, h, ..., out, in].
      inputs: The token's `WriteInputs`, [b, h, 1, ...].
      write: bool [b, 1, 1, 1], False makes the token an exact no-op.

    Returns:
      The carry of each map and `State.extra` after the token.
    """

  def prepare(
    self,
    rule: 'rules.Rule',
    initial: Any,
    state: 'rules.State',
    chunks: layout.Chunks,
    *,
    write: bool,
  ) -> tuple[Any, Any]:
    """Computes what is known of all chunks of a call before they are scanned.

    Args:
      rule: How the memory is written and read.
      initial: Initial memory per map, [h, ..., out, in].
      state: Before the call.
      chunks: The tokens in chunks; `inputs` are `WriteInputs`.
      write: Whether the tokens write.

    Returns:
      A pytree [n, ...] that becomes each chunk's `known`, and `State.extra`
      after the call.
    """

  def solve_chunk(
    self,
    network: networks.Network,
    rule: 'rules.Rule',
    initial: Any,
    state: 'rules.State',
    anchor: Any,
    chunk: layout.Chunks,
  ) -> tuple[networks.Linear, dict[str, 'rules.Carry']]:
    """Writes all tokens of a chunk at once; equal to `write_token`.

    Args:
      network: The memory's network.
      rule: How it is written and read.
      initial: Initial memory per map and row, [b, h, ..., out, in].
      state: Before the chunk; its `extra` is None.
      anchor: Weights per map, [b, h, ..., out, in].
      chunk: One chunk, without the leading axis.

    Returns:
      The `linear` that applies each token's own weights, after its write, and
      the carry of each map after the last token.
    """
