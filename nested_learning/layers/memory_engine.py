"""The engine that a layer's memories take, and the devices they are on."""

from collections.abc import Callable
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
  marks: base.TokenInfo,
  *,
  engine: str = 'chunk',
) -> tuple[memory.Result, memory.State]:
  """Reads and writes memories, chunk by chunk or a single token.

  Where devices share the tokens of rows, in whole chunks, each waits for the
  memories as the one before it leaves them: see `context_parallel.hand_over`.

  Args:
    make: `make(params, num_rows) -> (network, project)`, of
      `memory.scan_chunks`.
    params: What that needs of the layer's parameters.
    rule: How the memories are written and read.
    initial: Initial memory per map, [h, ..., out, in].
    state: Where the stream stands; None is its start.
    inputs: What `project` takes, a pytree of [b, h, t, ...].
    marks: Of the tokens.
    engine: 'token' for the definition, which is slow.

  Returns:
    The `Result`, and the state after the tokens.
  """
  num_rows, _, num_tokens = jax.tree.leaves(inputs)[0].shape[:3]
  if (
    engine == 'chunk'
    and state is None
    and marks.mask is None
    and context_parallel.num_parts(num_tokens, multiple=rule.chunk_size) > 1
  ):
    return _run_parts(make, params, rule, initial, inputs, marks)
  call = memory.scan_chunks
  if engine == 'token' or (state is not None and num_tokens == 1):
    call = memory.scan_tokens
    if state is None:
      state = _start(rule, initial, num_rows)
  network, project = make(params, num_rows)
  with jax.named_scope('memory'):  # in profiles and compiled programs
    return call(
      network,
      rule,
      initial,
      state,
      inputs,
      project=project,
      reset=marks.reset,
      mask=marks.mask,
      write=marks.write,
    )


def _run_parts(make, params, rule, initial, inputs, marks):
  """A stream's start, over the devices."""
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
        write=marks.write,
        starts_chunk=True,
      )
    return result, state._replace(anchor=None)

  result, state = context_parallel.hand_over(
    scan,
    (params, initial),
    _start(rule, initial, num_rows)._replace(anchor=None),
    (inputs, marks.reset),
    in_axes=(2, 1),
    out_axes=2,
  )
  return result, state._replace(anchor=state.memory)


def _start(rule, initial, num_rows):
  return memory.init_state(rule, initial, num_rows)
