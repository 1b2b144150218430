r"""DeltaTTT: two maps that both learn the value, each by a delta rule.

.. math::
   A_t &= A_{t-1} + a_t (v_t - A_{t-1} k_t) k_t^T \\
   h_t &= \phi(A_{t-1} k_t) \\
   B_t &= B_{t-1} + b_t (v_t - B_{t-1} h_t) h_t^T \\
   y_t &= B_t \phi(A_t q_t)

No error passes through a map, and none depends on an anchor: a chunk is two
delta rules, one after the other, and exact at every chunk size.

a_t is `inner_lr`. b_t is here `hidden_lr` divided by the squared norm of h_t,
which may have any norm: `hidden_lr` is then the fraction of the error that a
write removes, and B stays finite where h is long. `retention` acts as
elsewhere, and is 1 in the paper.

References:
  DeltaTTT, Tsinghua LeapLab, 2025 (local targets, the tokenwise recurrence).
"""

import dataclasses

from nested_learning import errors
from nested_learning.memory import chunked
from nested_learning.memory import decays as decays_lib
from nested_learning.memory import networks
from nested_learning.memory import rule as rules
from nested_learning.memory import writes

_MAPS = ('in', 'vector')


@dataclasses.dataclass(frozen=True)
class LocalTargets:
  """Writes both maps of an MLP memory towards the value."""

  @property
  def inputs(self):
    """The inner learning rate of the second map."""
    return {'hidden_lr': 'inner_lr'}

  def check(self, rule: rules.Rule) -> None:
    """Raises `errors.UserError` unless the rule is DeltaTTT's."""
    rule.require(
      'LocalTargets',
      erase='every_map',
      learns='every_map',
      erase_from='previous',
      momentum=False,
      read='token',
      target='value',
    )

  def check_network(self, network: networks.Network) -> None:
    """Raises `errors.UserError` unless it is an MLP as wide as its values."""
    if set(network.table) != set(_MAPS):
      raise errors.UserError(
        "LocalTargets is defined for a memory of two maps; use kind='mlp'."
      )
    dim, hidden_dim = network.table['vector'].shape[-2:]
    if hidden_dim != dim:
      raise errors.UserError(
        f'LocalTargets makes the hidden layer learn the value; {hidden_dim=} '
        f'must be head_dim={dim}.'
      )

  def init_state(self, initial, batch_size):
    """Returns None: it carries nothing."""
    del initial, batch_size

  def write_token(self, network, rule, initial, state, anchor, inputs, write):
    """Writes both maps for one token; see `memory.Extension`."""
    del anchor
    linear = networks.linear_of(state.memory)
    map_inputs = _map_inputs(network, linear, inputs.key)
    carries = {}
    for name in _MAPS:
      x = map_inputs[name]
      carries[name] = rules.write_token(
        rules.Carry(state.memory[name]),
        writes.reference(rule, initial[name]),
        x,
        # The delta rule erases the prediction, which leaves the error -v.
        -writes.per_map(inputs.value, name),
        _rates(name, inputs, x, write),
        erase=True,
      )
    return carries, None

  def prepare(self, rule, initial, state, chunks, *, write):
    """Inverts the systems of all chunks' keys; see `memory.Extension`."""
    del rule, initial
    if not write:
      return None, state.extra
    reset, does_write = chunks.columns()
    inputs = chunks.inputs
    rates = writes.token_rates(inputs, does_write)
    decays = decays_lib.make_decays(rates, reset)
    keys = chunked.make_keys(inputs.key, rates, decays, erase=True)
    return (keys, chunked.make_scores(keys, inputs.query)), None

  def solve_chunk(self, network, rule, initial, state, anchor, chunk):
    """Writes both maps for a chunk; see `memory.Extension`."""
    del anchor
    inputs = chunk.inputs
    first, scores = chunk.known  # of the map that reads the key
    solved = {}

    # Stands in for a map that is not solved yet: only its input is used.
    def linear_before(name, x):
      return chunked.read_before(solved[name], x) if name in solved else x

    for name in _MAPS:
      x = _map_inputs(network, linear_before, inputs.key)[name]
      rates = _rates(name, inputs, x, chunk.columns()[1])
      keys = first
      if name != 'in':
        decays = writes.per_map(first.decays, name)
        keys = chunked.make_keys(x, rates, decays, erase=True)
      solved[name] = chunked.solve_chunk(
        rules.Carry(state.memory[name]),
        writes.reference(rule, initial[name]),
        initial[name],
        keys,
        -writes.per_map(inputs.value, name),
        rates,
      )
    return chunked.make_linear(solved, scores), chunked.end_chunks(solved)


def _rates(name, inputs, x, does_write):
  """Returns the rates of a map with inputs x."""
  rates = writes.token_rates(inputs, does_write)
  if name == 'in':
    return rates
  rates = rates._replace(inner_lr=inputs.extra['hidden_lr'])
  return writes.normalized(writes.per_map(rates, name), x)


def _map_inputs(network, linear, x):
  """Returns the input of each map of a network."""
  inputs = {}

  def record(name, x):
    inputs[name] = x
    return linear(name, x)

  network.apply(record, x)
  return inputs
