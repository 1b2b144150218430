"""Runs the memories of a layer: chunk by chunk, for one token, or in parts."""

from collections.abc import Callable
import functools
from typing import Any

import jax

from nested_learning import context_parallel
from nested_learning import memory
from nested_learning.layers import base


def run(
  make: Callable[[Any, int], tuple[memory.Network, Any]],
  params: Any,
  rule: memory.Rule,
  initial: Any,
  state: memory.State | None,
  inputs: Any,
  info: base.TokenInfo,
  *,
  engine: str = 'chunk',
) -> tuple[memory.Result, memory.State]:
  """Reads and writes memories, chunk by chunk or a single token.

  If devices share the tokens of rows, in whole chunks, each device waits for
  the memories of the device before it; see `context_parallel.hand_over`.

  Args:
    make: `make(params, num_rows) -> (network, project)`, the arguments of
      `memory.scan_chunks`.
    params: Parameters that `make` needs; gradients flow through them.
    rule: How the memories are written and read.
    initial: Initial memory per map, [h, ..., out, in].
    state: State of the stream; None at its start. One without an anchor stands
      between two chunks in every row, and the tokens are then whole chunks.
    inputs: Argument of `project`, a pytree of [b, h, t, ...].
    info: Borders and padding among the tokens, and whether to write.
    engine: 'chunk'; 'fused', the same in a kernel; or 'token' for the
      definition, which is slow.

  Returns:
    The `Result`, and the state after the tokens.
  """
  num_rows, _, num_tokens = jax.tree.leaves(inputs)[0].shape[:3]
  if (
    engine != 'token'
    and state is None
    and info.mask is None
    and context_parallel.num_parts(num_tokens, multiple=rule.chunk_size) > 1
  ):
    return _run_parts(make, params, rule, initial, inputs, info)
  call = functools.partial(
    memory.scan_fused if engine == 'fused' else memory.scan_chunks,
    starts_chunk=state is not None and state.anchor is None,
  )
  if engine == 'token' or (state is not None and num_tokens == 1):
    call = memory.scan_tokens
    if state is None:
      state = memory.init_state(rule, initial, num_rows)
    elif state.anchor is None:
      state = state._replace(anchor=state.memory)
  network, project = make(params, num_rows)
  with jax.named_scope('memory'):  # in profiles and compiled programs
    return call(
      network,
      rule,
      initial,
      state,
      inputs,
      project=project,
      reset=info.reset,
      mask=info.mask,
      write=info.write,
    )


def _run_parts(make, params, rule, initial, inputs, info):
  """Runs a stream's start over devices that share its tokens."""
  num_rows = jax.tree.leaves(inputs)[0].shape[0]

  def scan(shared, state, tokens):
    (params, initial), (inputs, reset) = shared, tokens
    network, project = make(params, jax.tree.leaves(inputs)[0].shape[0])
    with jax.named_scope('memory'):
      result, state = memory.scan_chunks(
        network,
        rule,
        initial,
        state,
        inputs,
        project=project,
        reset=reset,
        write=info.write,
        starts_chunk=True,
      )
    return result, state._replace(anchor=None)

  result, state = context_parallel.hand_over(
    scan,
    (params, initial),
    memory.init_state(rule, initial, num_rows)._replace(anchor=None),
    (inputs, info.reset),
    in_axes=(2, 1),
    out_axes=2,
  )
  return result, state._replace(anchor=state.memory)
