r"""Titans' MAC: attention in segments, with a memory of what came before.

The stream is cut into segments of `memory.chunk_size` tokens, counted from its
start; a document border ends one early. With M_0 the memory at the start of a
segment and M_t the memory after the writes of y_1 ... y_t, token t is

.. math::
   h_t &= norm(M_0(x_t)) \\
   y_t &= norm(A(P, h_1, x_1, ..., h_t, x_t)) \\
   o_t &= y_t \odot silu(norm(M_t(y_t)))

Two readings make it causal, so that a stream may be cut anywhere. In print the
segment attends to the reads of all its tokens, and o is read from the memory
that the whole segment has written: both look ahead of a token. Here a token
sees the reads up to its own, and o_t is read after the writes up to its own,
which is what the engine reads with a chunk as long as the segment. At the last
token of a segment the two agree.

h and x share the attention's projections, and reads and writes those of the
memory; the convolution of the reads runs over x and that of the writes over y.
Persistent tokens P are the attention's `num_persistent`.

References:
  Behrouz et al., Titans, arXiv:2501.00663, 2024, eqs. 21-25.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import context_parallel
from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import hybrids
from nested_learning.layers import memory_mixer
from nested_learning.layers import norm
from nested_learning.memory import rows


@dataclasses.dataclass(frozen=True)
class MemoryAsContextConfig:
  """A memory read into attention's context; its chunk is the segment."""

  memory: memory_mixer.MemoryMixerConfig
  attention: attention.AttentionConfig

  def __post_init__(self):
    if self.attention.window is not None:
      raise ValueError(
        f'attention.window={self.attention.window} has no place in MAC, which '
        'attends within segments of memory.chunk_size='
        f'{self.memory.chunk_size} tokens; set it to None.'
      )
    if self.memory.window not in (None, 1):
      raise ValueError(
        f'memory.window={self.memory.window} has no place in MAC, which reads '
        'a memory as it was where the segment began; set it to None.'
      )
    if self.memory.adaptive:
      raise ValueError(
        f'memory.adaptive={self.memory.adaptive} has no place in MAC, whose '
        'memory is read and written with different inputs; set it to ().'
      )

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return True

  @property
  def granularity(self) -> int:
    """Tokens of a segment; see `base.MixerConfig`."""
    return self.memory.chunk_size

  def make(self, *, embed_dim: int, max_length: int, dtype: Any) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    del max_length
    return make_memory_as_context(self, embed_dim=embed_dim, dtype=dtype)


class ContextState(NamedTuple):
  """What the layer carries.

  Attributes:
    reads: The convolution of the reads, [b, 3, channels].
    titans: The memory, with the convolution of the writes.
    attention: The reads and tokens of the segment so far.
    offset: int32 [b], tokens of the segment so far.
  """

  reads: jax.Array
  titans: memory_mixer.MemoryMixerState
  attention: Any
  offset: jax.Array


def make_memory_as_context(
  config: MemoryAsContextConfig, *, embed_dim: int, dtype: Any
) -> base.Layer:
  """Makes Titans' MAC.

  Args:
    config: Memory and attention.
    embed_dim: Width e of inputs and outputs.
    dtype: Type of the projections.

  Returns:
    A `Layer`.
  """
  size = config.memory.chunk_size
  memory = memory_mixer.make_memory_mixer(
    config.memory, embed_dim=embed_dim, dtype=dtype
  )
  # A segment is a read and a token for each of its tokens: all are in sight.
  window = 2 * size
  attend = attention.make_attention(
    dataclasses.replace(config.attention, window=window),
    embed_dim=embed_dim,
    max_length=window,
    dtype=dtype,
  )
  table = {
    'titans': memory.table,
    'attention': attend.table,
    'norm': {
      name: norm.scale_param(embed_dim)
      for name in ('read', 'attention', 'titans')
    },
  }

  def init_state(params, batch_size):
    titans_state = memory.init_state(params['titans'], batch_size)
    return ContextState(
      reads=titans_state.conv,
      titans=titans_state,
      attention=attend.init_state(params['attention'], batch_size),
      offset=jnp.zeros((batch_size,), jnp.int32),
    )

  def segment(params, write, state, tokens):
    """One segment [b, c, e], or the part of it that the mask leaves."""
    x, reset, mask = tokens
    batch_size, length, _ = x.shape
    read, after = memory.apply(
      params['titans'],
      _at_segment_start(state),
      x,
      base.TokenInfo(reset, mask, write=False),
    )
    read = norm.rms_norm(params['norm']['read'], read)
    is_whole = mask is None and length == size
    pairs, attention_state = attend.apply(
      params['attention'],
      None if is_whole else state.attention,
      jnp.stack([read, x], axis=2).reshape(batch_size, 2 * length, -1),
      base.TokenInfo(
        None if reset is None else _pairs(reset, jnp.zeros_like(reset)),
        None if mask is None else _pairs(mask, mask),
      ),
    )
    y = norm.rms_norm(params['norm']['attention'], pairs[:, 1::2])
    remembered, titans_state = memory.apply(
      params['titans'], state.titans, y, base.TokenInfo(reset, mask, write)
    )
    out = hybrids.gate(params['norm']['titans'], y, remembered)
    count = length if mask is None else jnp.sum(mask, 1, dtype=jnp.int32)
    offset = (state.offset + count) % size
    empty = attend.init_state(params['attention'], batch_size)
    attention_state = rows.where(offset == 0, empty, attention_state)
    return ContextState(after.conv, titans_state, attention_state, offset), out

  def apply(params, state, inputs, marks):
    num_tokens = inputs.shape[1]
    num_parts = context_parallel.num_parts(num_tokens, multiple=size)
    if state is None and marks.mask is None and num_parts > 1:
      out, state = context_parallel.hand_over(
        lambda params, state, tokens: apply(
          params, state, tokens[0], marks._replace(reset=tokens[1])
        ),
        params,
        init_state(params, inputs.shape[0]),
        (inputs, marks.reset),
        in_axes=1,
        out_axes=1,
      )
      return out, state
    is_whole = state is None and marks.mask is None and not num_tokens % size
    if state is None:
      state = init_state(params, inputs.shape[0])
    run = functools.partial(segment, params, marks.write)
    tokens = inputs, marks.reset, marks.mask
    if num_tokens == 1:
      state, out = run(state, tokens)
      return out, state
    if not is_whole:
      tokens, slot = _to_slots(state.offset, *tokens, size)
    cut = lambda x: jnp.moveaxis(
      x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0
    )
    run = jax.checkpoint(run, prevent_cse=False)
    state, out = jax.lax.scan(run, state, jax.tree.map(cut, tokens))
    out = jnp.moveaxis(out, 0, 1)
    out = out.reshape(inputs.shape[0], -1, inputs.shape[2])
    return out if is_whole else rows.take(out, slot, 1), state

  return base.make_layer(table, init_state, apply)


def _at_segment_start(state: ContextState) -> memory_mixer.MemoryMixerState:
  """The memory as the segment found it, with the convolution of the reads."""
  main = state.titans.main
  found = rows.where(main.offset == 0, main.memory, main.anchor)
  main = main._replace(memory=found, anchor=found)
  return state.titans._replace(conv=state.reads, main=main)


def _to_slots(offset, inputs, reset, mask, size):
  """Tokens with their marks in slots of segments, and the slot of each."""
  num_tokens = inputs.shape[1]
  if mask is None:
    mask = jnp.ones(inputs.shape[:2], bool)
  num_slots = -(-(num_tokens + size - 1) // size) * size
  order, slot, present = rows.to_slots(offset, mask, num_slots)
  if reset is not None:
    reset = rows.take(reset & mask, order, 1) & present
  return (rows.take(inputs, order, 1), reset, present), slot


def _pairs(of_reads, of_tokens):
  """Interleaves [b, t] for reads and tokens to [b, 2 t] for their pairs."""
  pairs = jnp.stack([of_reads, of_tokens], axis=2)
  return pairs.reshape(pairs.shape[0], -1)
