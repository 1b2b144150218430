r"""The update rule of a memory: its definition, settings, inputs and state.

For a linear map W [o, i] with inputs x_t and errors delta_t at its output:

.. math::
   S_t &= momentum_t S_{t-1} + inner\_lr_t \, delta_t x_t^T \\
   W_t &= W_{ref} + retention_t (W_{t-1} - W_{ref})
          - erase \, inner\_lr_t (W_{t-1} x_t) x_t^T - S_t                  (1)

W_ref is zero, or the initial memory. Every array has its token axis last but
one; rates are [..., t, 1].

References:
  Behrouz et al., Nested Learning, arXiv:2512.24695, 2025, eqs. 88, 90, 93 (DGD
  with retention); Titans, arXiv:2501.00663, 2024, eqs. 13-18 (momentum).
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import errors
from nested_learning.memory import extension as extension_lib
from nested_learning.memory import networks
from nested_learning.memory import objectives


@dataclasses.dataclass(frozen=True)
class Rule:
  """How a memory is written and read."""

  chunk_size: int  # tokens that share one anchor; 1 is the token recurrence
  objective: objectives.Objective = objectives.l2
  # Maps that the delta rule erases: the one that reads the 'input', those that
  # make an 'output', 'every_map' or 'none'. The map of a matrix does both.
  erase: Literal['none', 'input', 'output', 'every_map'] = 'input'
  learns: Literal['every_map', 'output'] = 'every_map'  # maps that are written
  # Weights whose output is erased: those before the token, or those after
  # retention (Gated DeltaNet).
  erase_from: Literal['previous', 'retained'] = 'previous'
  retain_to: Literal['zero', 'initial'] = 'initial'  # W_ref
  momentum: bool = False  # whether `WriteInputs` have a momentum
  # The weights that queries read: after each token's write, the anchor, none.
  read: Literal['token', 'chunk', 'none'] = 'token'
  # Target of the objective: the memory's own output for the value, or the value
  # itself.
  target: Literal['own', 'value'] = 'own'
  normalize_target: Callable[[jax.Array], jax.Array] | None = None  # if 'own'
  # Bound on |W - W_init| per map at the end of a chunk, Frobenius norm.
  max_norm: float | None = None
  # Miras' retention map: from the weights that are written to those that are
  # read, applied at the start of a chunk. None is the identity.
  to_weights: Callable[[Any], Any] | None = None
  extension: extension_lib.Extension | None = None  # another way to write

  def __post_init__(self):
    errors.check_choices(self)
    errors.check_field(
      self, 'chunk_size', self.chunk_size >= 1, 'at least 1 token'
    )
    if self.to_weights and (self.read == 'token' or self.erase != 'none'):
      raise errors.UserError(
        'weights that differ from what is written are made at the start of a '
        f"chunk; use read='chunk' instead of {self.read!r} and erase='none' "
        f'instead of {self.erase!r}.'
      )
    if self.extension is not None:
      self.extension.check(self)

  def weights(self, memory: Any) -> Any:
    """Returns the weights that are read, from those that are written."""
    return memory if self.to_weights is None else self.to_weights(memory)

  def require(self, extension: str, **settings: Any) -> None:
    """Raises unless fields have the values that an extension needs.

    Args:
      extension: Its name and setting, for the message.
      **settings: Required value by field.

    Raises:
      errors.UserError: If a field has another value.
    """
    for name, value in settings.items():
      if getattr(self, name) != value:
        raise errors.UserError(
          f'{extension} is not defined with {name}={getattr(self, name)!r}; '
          f'set it to {value!r}.'
        )


class WriteInputs(NamedTuple):
  """Inputs of the tokens' writes and reads; the token axis is last but one.

  Attributes:
    key: [b, h, t, d].
    value: [b, h, t, d].
    inner_lr: Inner learning rate, [b, h, t, 1], >= 0.
    retention: Fraction kept, [b, h, t, 1], in [0, 1].
    momentum: [b, h, t, 1], in [0, 1]; None without.
    query: [b, h, t, d]; None where nothing is read.
    extra: More numbers per token by name, [b, h, t, ...]: those that the rule's
      extension needs, and whatever else `project` hands on to the `Result`.
  """

  key: jax.Array
  value: jax.Array
  inner_lr: jax.Array | None
  retention: jax.Array | None
  momentum: jax.Array | None = None
  query: jax.Array | None = None
  extra: Mapping[str, jax.Array] | None = None


class State(NamedTuple):
  """A memory between two calls, one row per sequence.

  Attributes:
    memory: Weights per map, [b, h, ..., out, in].
    anchor: The weights at the start of the current chunk.
    trace: The momentum's buffer per map; None without momentum.
    offset: int32 [b], tokens of the current chunk that were read.
    extra: State of the rule's extension; None without.
  """

  memory: Any
  anchor: Any
  trace: Any
  offset: jax.Array
  extra: Any = None


class Result(NamedTuple):
  """Outputs of a call, per token.

  Attributes:
    read: [b, h, t, d]; None with rule.read 'none'.
    inputs: The `WriteInputs` that `project` made, with rule.read 'none'; else
      None.
  """

  read: jax.Array | None
  inputs: WriteInputs | None


# Makes the `WriteInputs` of some tokens from the anchor's weights and the
# inputs of a self-modifying memory. None for a static memory, whose inputs are
# its `WriteInputs`.
Project = Callable[[Any, Any], WriteInputs] | None


class Rates(NamedTuple):
  """Rates at which tokens write one map, all [..., t, 1].

  Attributes:
    inner_lr: Inner learning rate, >= 0.
    retention: Fraction kept, in [0, 1].
    momentum: Fraction of the trace kept, in [0, 1]; None without momentum.
    write: bool, False makes the token an exact no-op; None writes every token.
  """

  inner_lr: jax.Array
  retention: jax.Array
  momentum: jax.Array | None = None
  write: jax.Array | None = None

  def masked(self) -> 'Rates':
    """Returns the rates, neutral for tokens that do not write."""
    if self.write is None:
      return self
    neutral = lambda x, value: jnp.where(self.write, x, value)
    return Rates(
      inner_lr=neutral(self.inner_lr, 0.0),
      retention=neutral(self.retention, 1.0),
      momentum=None if self.momentum is None else neutral(self.momentum, 1.0),
      write=self.write,
    )


class Carry(NamedTuple):
  """Weights [..., o, i] of a map, and its trace if there is momentum."""

  weights: jax.Array
  trace: jax.Array | None = None


def init_state(rule: Rule, initial: Any, batch_size: int) -> State:
  """Makes the state of a stream's start: every row holds the initial memory.

  Args:
    rule: How the memory is written.
    initial: Initial memory per map, [h, ..., out, in].
    batch_size: Rows b.

  Returns:
    A `State`.
  """
  memory = jax.tree.map(
    lambda w: jnp.broadcast_to(w, (batch_size, *w.shape)), initial
  )
  trace = jax.tree.map(jnp.zeros_like, memory) if rule.momentum else None
  offset = jnp.zeros((batch_size,), jnp.int32)
  extra = None
  if rule.extension is not None:
    extra = rule.extension.init_state(initial, batch_size)
  return State(memory, memory, trace, offset, extra)


def write_token(
  carry: Carry,
  reference: jax.Array | None,
  x: jax.Array,
  delta: jax.Array,
  rates: Rates,
  *,
  erase: bool,
  erase_from: Literal['previous', 'retained'] = 'previous',
) -> Carry:
  """Writes one token, or a sum of tokens, by equation (1): the definition.

  Args:
    carry: Weights [..., o, i] and trace before the token.
    reference: W_ref [..., o, i], or None for zero.
    x: [..., 1, i]; several tokens here are summed, all with one retention.
    delta: [..., 1, o].
    rates: Each [..., 1, 1].
    erase: Whether the rule is Delta Gradient Descent.
    erase_from: As in `Rule`.

  Returns:
    The carry after the token.
  """
  rates = rates.masked()
  weights, trace = carry
  outer = lambda y: jnp.einsum('...to,...ti->...oi', y, x)
  kept = rates.retention * weights
  if reference is not None:
    kept = kept + (1.0 - rates.retention) * reference
  if erase:
    before = kept if erase_from == 'retained' else weights
    kept = kept - outer(rates.inner_lr * networks.apply_map(before, x))
  step = outer(rates.inner_lr * delta)
  if rates.momentum is None:
    return Carry(kept - step)
  trace = rates.momentum * trace + step
  # A token that does not write keeps the trace and must not apply it either.
  applied = trace if rates.write is None else jnp.where(rates.write, trace, 0.0)
  return Carry(kept - applied, trace)
