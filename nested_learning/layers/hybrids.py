r"""Titans' hybrids of attention A and a memory M: MAL, MAG and MAC.

.. math::
   \text{memory as a layer (MAL):}\quad y &= A(norm(M(x))) \\
   \text{memory as a gate (MAG):}\quad y &= norm(A(x)) \odot silu(norm(M(x)))

Memory as context (MAC) cuts the stream into segments of `memory.chunk_size`
tokens, counted from its start; a document border ends a segment early. With M_0
the memory at the start of a segment and M_t the memory after the writes of
y_1 ... y_t, token t of the segment is

.. math::
   h_t &= norm(M_0(x_t)) \\
   y_t &= norm(A(P, h_1, x_1, ..., h_t, x_t)) \\
   o_t &= y_t \odot silu(norm(M_t(y_t)))

MAC differs from the paper in two points, which make it causal. In the paper a
segment attends to the reads of all its tokens, and o is read from the memory
after the writes of the whole segment: both look ahead. Here a token sees the
reads up to its own, and o_t is read after the writes up to its own. At the last
token of a segment the two agree. h and x share the projections of attention,
reads and writes share those of the memory; reads are convolved over x, writes
over y.

Persistent tokens P are `AttentionConfig.num_persistent`. They do not write into
the memory, whose initial value is learned anyway. The paper leaves
the gate open ("normalised with learnable vectors, followed by a
non-linearity"). The norm between the layers of MAL is ours.

References:
  Behrouz et al., Titans, arXiv:2501.00663, 2024, eqs. 21-31.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nested_learning import context_parallel
from nested_learning import errors
from nested_learning.layers import attention
from nested_learning.layers import base
from nested_learning.layers import memory_mixer
from nested_learning.layers import norm
from nested_learning.memory import layout


@dataclasses.dataclass(frozen=True)
class _PartsConfig:
  """A memory and attention that read the same tokens."""

  memory: memory_mixer.MemoryMixerConfig
  attention: attention.AttentionConfig

  @property
  def holds_any_length(self) -> bool:
    """Whether a stream may have any length; see `base.MixerConfig`."""
    return self.attention.holds_any_length

  @property
  def granularity(self) -> int:
    """Tokens of a chunk; see `base.MixerConfig`."""
    return self.memory.granularity


@dataclasses.dataclass(frozen=True)
class MemoryAsLayerConfig(_PartsConfig):
  """A memory, and attention to its outputs."""

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    parts = _make_parts(self, embed_dim, max_length, dtype)
    return _make_memory_as_layer(parts, embed_dim)


@dataclasses.dataclass(frozen=True)
class MemoryAsGateConfig(_PartsConfig):
  """Attention and a memory side by side, the one gated by the other."""

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    parts = _make_parts(self, embed_dim, max_length, dtype)
    return _make_memory_as_gate(parts, embed_dim)


@dataclasses.dataclass(frozen=True)
class MemoryAsContextConfig:
  """A memory read into attention's context; its chunk is the segment."""

  memory: memory_mixer.MemoryMixerConfig
  attention: attention.AttentionConfig

  def __post_init__(self):
    if self.attention.window is not None:
      raise errors.UserError(
        f'attention.window={self.attention.window} has no place in MAC, which '
        'attends within segments of memory.chunk_size='
        f'{self.memory.chunk_size} tokens; set it to None.'
      )
    if self.memory.extension is not None:
      raise errors.UserError(
        f'memory.extension={self.memory.extension} has no place in MAC, which '
        'reads a memory as it was where the segment began; set it to None.'
      )
    if self.memory.adaptive:
      raise errors.UserError(
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

  def make(
    self, *, embed_dim: int, dtype: Any, max_length: int | None = None
  ) -> base.Layer:
    """Makes the layer; see `base.MixerConfig`."""
    del max_length
    return _make_memory_as_context(self, embed_dim, dtype)


class ContextState(NamedTuple):
  """State of MAC.

  Attributes:
    reads: State of the convolution of the reads, [b, 3, channels].
    titans: State of the memory, with the convolution of the writes.
    attention: Keys and values of the segment so far, of reads and tokens.
    offset: int32 [b], tokens of the segment so far.
  """

  reads: jax.Array
  titans: memory_mixer.MemoryMixerState
  attention: Any
  offset: jax.Array


def _make_parts(config, embed_dim, max_length, dtype) -> dict[str, base.Layer]:
  sizes = {'embed_dim': embed_dim, 'dtype': dtype, 'max_length': max_length}
  return {
    'titans': config.memory.make(**sizes),
    'attention': config.attention.make(**sizes),
  }


def _make_memory_as_layer(parts, embed_dim) -> base.Layer:
  table = {**_tables(parts), 'norm': norm.scale_param(embed_dim)}

  def apply(params, state, inputs, info):
    run = _runner(parts, params, state, info)
    remembered, memory_state = run('titans', inputs)
    normed = norm.rms_norm(params['norm'], remembered)
    out, attention_state = run('attention', normed)
    return out, {'titans': memory_state, 'attention': attention_state}

  return base.make_layer(table, _init_state(parts), apply)


def _make_memory_as_gate(parts, embed_dim) -> base.Layer:
  table = {
    **_tables(parts),
    'norm': {name: norm.scale_param(embed_dim) for name in parts},
  }

  def apply(params, state, inputs, info):
    run = _runner(parts, params, state, info)
    attended, attention_state = run('attention', inputs)
    remembered, memory_state = run('titans', inputs)
    normed = norm.rms_norm(params['norm']['attention'], attended)
    out = _gate(params['norm']['titans'], normed, remembered)
    return out, {'titans': memory_state, 'attention': attention_state}

  return base.make_layer(table, _init_state(parts), apply)


def _tables(parts):
  return {name: part.table for name, part in parts.items()}


def _init_state(parts):
  return lambda params, batch_size: {
    name: part.init_state(params[name], batch_size)
    for name, part in parts.items()
  }


def _runner(parts, params, state, info):
  def run(name, inputs):
    start = None if state is None else state[name]
    return parts[name].apply(params[name], start, inputs, info)

  return run


def _gate(scale, x, by):
  """Computes x * silu(norm(by)), the gate of MAG and MAC, all [b, t, e]."""
  return x * jax.nn.silu(norm.rms_norm(scale, by))


class _Parts(NamedTuple):
  """Layers of MAC.

  Attributes:
    size: Tokens of a segment, c.
    memory: The memory, whose chunks are the segments.
    attend: Attention to all reads and tokens of a segment.
  """

  size: int
  memory: base.Layer
  attend: base.Layer


def _make_memory_as_context(
  config: MemoryAsContextConfig, embed_dim, dtype
) -> base.Layer:
  size = config.memory.chunk_size
  # Each token of a segment adds two keys, its read and itself; all are visible.
  window = dataclasses.replace(config.attention, window=2 * size)
  parts = _Parts(
    size,
    memory=config.memory.make(embed_dim=embed_dim, dtype=dtype),
    attend=window.make(embed_dim=embed_dim, dtype=dtype),
  )
  table = {
    'titans': parts.memory.table,
    'attention': parts.attend.table,
    'norm': {
      name: norm.scale_param(embed_dim)
      for name in ('read', 'attention', 'titans')
    },
  }

  def init_state(params, batch_size):
    titans_state = parts.memory.init_state(params['titans'], batch_size)
    return ContextState(
      reads=titans_state.conv,
      titans=titans_state,
      attention=parts.attend.init_state(params['attention'], batch_size),
      offset=jnp.zeros((batch_size,), jnp.int32),
    )

  def apply(params, state, inputs, info):
    num_tokens = inputs.shape[1]
    num_parts = context_parallel.num_parts(num_tokens, multiple=size)
    is_aligned = state is None and info.mask is None
    if state is None:
      state = init_state(params, inputs.shape[0])
    if num_tokens == 1:
      tokens = inputs[:, None], info.reset, info.mask
      state, out = _read_segment(parts, params, info.write, state, tokens)
      return out[:, 0], state
    if num_parts == 1 or not is_aligned:
      return _scan_segments(
        parts, params, state, inputs, info, is_aligned=is_aligned
      )

    def scan(params, state, tokens):
      inputs, reset = tokens
      own = info._replace(reset=reset)
      return _scan_segments(parts, params, state, inputs, own, is_aligned=True)

    return context_parallel.hand_over(
      scan, params, state, (inputs, info.reset), in_axes=1, out_axes=1
    )

  return base.make_layer(table, init_state, apply)


def _scan_segments(parts, params, state, inputs, info, *, is_aligned):
  """Reads inputs [b, t, e] segment by segment."""
  # The engine lays out tokens [b, h, t, ...]: here with one head.
  segments, restore = layout.lay_out(
    parts.size,
    state.offset,
    inputs[:, None],
    is_aligned=is_aligned,
    reset=info.reset,
    mask=info.mask,
  )
  run = functools.partial(_read_segment, parts, params, info.write)
  # Recomputed in the backward pass, which keeps one state per segment.
  run = jax.checkpoint(run, prevent_cse=False)
  tokens = segments.inputs, segments.reset, segments.mask
  state, out = jax.lax.scan(run, state, tokens)
  return restore(out)[:, 0], state


def _read_segment(parts, params, write, state, tokens):
  """Reads one segment [b, 1, c, e], or its tokens that the mask leaves."""
  x, reset, mask = tokens
  x = x[:, 0]  # [b, c, e]
  batch_size, length, _ = x.shape
  # A whole segment sees no key of an earlier call: attention needs no state,
  # and the memory no anchor.
  is_whole = mask is None and length == parts.size
  titans, start = state.titans, _at_segment_start(state)
  if is_whole:
    titans = start = _without_anchor(titans)
    start = start._replace(conv=state.reads)
  read, after = parts.memory.apply(
    params['titans'],
    start,
    x,
    base.TokenInfo(reset, mask, write=False),
  )
  read = norm.rms_norm(params['norm']['read'], read)
  pairs, attention_state = parts.attend.apply(
    params['attention'],
    None if is_whole else state.attention,
    jnp.stack([read, x], axis=2).reshape(batch_size, 2 * length, -1),
    base.TokenInfo(
      None if reset is None else _interleave(reset, jnp.zeros_like(reset)),
      None if mask is None else _interleave(mask, mask),
    ),
  )
  y = norm.rms_norm(params['norm']['attention'], pairs[:, 1::2])  # [b, c, e]
  remembered, titans_state = parts.memory.apply(
    params['titans'], titans, y, base.TokenInfo(reset, mask, write)
  )
  out = _gate(params['norm']['titans'], y, remembered)
  count = length if mask is None else jnp.sum(mask, 1, dtype=jnp.int32)
  offset = (state.offset + count) % parts.size
  empty = parts.attend.init_state(params['attention'], batch_size)
  attention_state = layout.where(offset == 0, empty, attention_state)
  state = ContextState(after.conv, titans_state, attention_state, offset)
  return state, out[:, None]


def _at_segment_start(state: ContextState) -> memory_mixer.MemoryMixerState:
  """Returns the memory at the segment's start, with the reads' convolution."""
  main = state.titans.main
  found = layout.where(main.offset == 0, main.memory, main.anchor)
  main = main._replace(memory=found, anchor=found)
  return state.titans._replace(conv=state.reads, main=main)


def _without_anchor(
  state: memory_mixer.MemoryMixerState,
) -> memory_mixer.MemoryMixerState:
  """Says that all rows are between two chunks; see `memory_engine.run`."""
  return state._replace(main=state.main._replace(anchor=None))


def _interleave(of_reads, of_tokens):
  """Interleaves flags [b, t] of reads and of tokens to [b, 2 t]."""
  pairs = jnp.stack([of_reads, of_tokens], axis=2)
  return pairs.reshape(pairs.shape[0], -1)
