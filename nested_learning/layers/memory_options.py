"""What newer papers add to the main memory of a mixer, and when it fits.

Windows and orthogonal steps (Atlas), local errors (DeltaTTT), kept segments
(Memory Caching) and growing capacity (Proteus) are the engine's; see
`nested_learning.memory`. All are of the main memory alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nested_learning import memory
from nested_learning.layers import base


def check(config: Any) -> None:
  """Checks the options of a `MemoryMixerConfig`.

  Args:
    config: The config, otherwise valid.

  Raises:
    ValueError: An option is out of its range, or does not go with another.
  """
  c = config
  for name, least in (
    ('cached_segments', 0),
    ('segment_chunks', 1),
    ('capacity_blocks', 1),
  ):
    if getattr(c, name) < least:
      raise ValueError(f'{name}={getattr(c, name)} must be at least {least}.')
  of_tokens = {
    'window': c.window not in (None, 1),
    'step': c.step != 'gradient',
    'errors': c.errors != 'propagated',
  }
  for name, is_set in of_tokens.items():
    if is_set and c.adaptive:
      raise ValueError(
        f'{name}={getattr(c, name)!r} is not defined for memories that make '
        f'adaptive={c.adaptive}; set adaptive to ().'
      )
  if of_tokens['errors']:
    _check_local(c)
  if c.capacity_blocks == 1:
    return
  units = _num_units(c)
  if c.capacity_blocks > min(units, c.capacity_tokens):
    raise ValueError(
      f'capacity_blocks={c.capacity_blocks} must be at most the {units} units '
      f'of the memory and capacity_tokens={c.capacity_tokens}.'
    )
  for name, is_set in of_tokens.items():
    if is_set:
      raise ValueError(
        f'{name}={getattr(c, name)!r} is not defined for a memory that grows; '
        f'set capacity_blocks={c.capacity_blocks} to 1.'
      )


def _check_local(c: Any) -> None:
  if c.kind != 'mlp':
    raise ValueError(
      f'errors={c.errors!r} are of the maps of an MLP; set kind={c.kind!r} to '
      "'mlp'."
    )
  if c.hidden_dim not in (0, c.head_dim):
    raise ValueError(
      f'errors={c.errors!r} make the hidden layer learn the value: '
      f'hidden_dim={c.hidden_dim} must be head_dim={c.head_dim}.'
    )


def _num_units(c: Any) -> int:
  """Units of the main memory, which become active one after the other."""
  return c.head_dim if c.kind == 'matrix' else c.hidden_dim or c.head_dim


def init_state(
  config: Any, initial: Any, batch_size: int
) -> tuple[memory.Cache | None, jax.Array | None]:
  """What the options carry at a stream's start.

  Args:
    config: A `MemoryMixerConfig`.
    initial: Initial main memory per map, [h, ..., out, in].
    batch_size: Rows b.

  Returns:
    The cache and the place in the document, each None without its option.
  """
  cache = position = None
  if config.cached_segments:
    cache = memory.init_cache(
      initial, batch_size, num_segments=config.cached_segments
    )
  if config.capacity_blocks > 1:
    position = jnp.zeros((batch_size,), jnp.int32)
  return cache, position


def limit_capacity(
  config: Any,
  state: memory.State | None,
  position: jax.Array | None,
  feed: memory.Feed,
  marks: base.TokenInfo,
) -> tuple[memory.Feed, jax.Array]:
  """The feed with how many units of the main memory each token has.

  Args:
    config: A `MemoryMixerConfig` with several blocks.
    state: Of the main memory, or None at a stream's start.
    position: int [b], tokens of the document that were read; None there.
    feed: Of the tokens, [b, h, t, ...].
    marks: Of the tokens.

  Returns:
    The feed, and the place in the document after the tokens.
  """
  num_rows, _, num_tokens, _ = feed.key.shape
  start = jnp.zeros((num_rows,), jnp.int32)
  begin, position = memory.chunk_positions(
    start if position is None else position,
    start if state is None else state.offset,
    config.chunk_size,
    num_tokens=num_tokens,
    reset=marks.reset,
    mask=marks.mask,
  )
  active = memory.active_units(
    begin,
    num_units=_num_units(config),
    num_blocks=config.capacity_blocks,
    num_tokens=config.capacity_tokens,
  )
  return feed._replace(active=active[:, None, :, None]), position


def run_cached(
  config: Any,
  network: memory.Network,
  initial: Any,
  state: tuple[memory.State | None, memory.Cache | None],
  feed: memory.Feed,
  ask: jax.Array,
  marks: base.TokenInfo,
) -> tuple[jax.Array, memory.State, memory.Cache]:
  """The main memory, and what is kept of its segments.

  Args:
    config: A `MemoryMixerConfig` with cached segments.
    network: Of the main memory.
    initial: Initial memory per map, [h, ..., out, in].
    state: Of the memory and of the cache; None for both at a stream's start.
    feed: Of the tokens, [b, h, t, ...].
    ask: What tokens ask segments with, [b, h, t, d].
    marks: Of the tokens.

  Returns:
    The reads [b, h, t, d], and both states after the tokens.
  """
  rule, num_rows = config.rule('main'), ask.shape[0]
  is_start = state[0] is None
  if is_start:
    state = (
      memory.init_state(
        initial, num_rows, momentum=rule.momentum, window=rule.window
      ),
      init_state(config, initial, num_rows)[0],
    )

  def call(state, feed, reset, mask):
    engine = functools.partial(memory.chunk_scan, starts_chunk=mask is None)
    if config.engine == 'token' or feed.key.shape[2] == 1:
      engine = memory.token_loop
    with jax.named_scope('memory'):  # in profiles and compiled programs
      return engine(
        network,
        rule,
        initial,
        state,
        feed,
        project=None,
        reset=reset,
        mask=mask,
        write=marks.write,
      )

  return memory.scan_segments(
    call,
    network,
    rule,
    *state,
    feed._replace(extra=None),
    ask,
    segment_size=config.segment_chunks * config.chunk_size,
    is_start=is_start,
    reset=marks.reset,
    mask=marks.mask,
    write=marks.write,
  )
